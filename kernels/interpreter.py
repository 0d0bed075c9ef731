"""Triton's interpreter made exact enough to prove kernels on a CPU, for tests.

Measured on triton 3.7 to 3.9: `tl.dot` multiplies the raw bits of bf16 operands, and a cast from fp32 to bf16 or fp8
truncates where a GPU rounds to nearest even. `install()` mends these. `launches()` tells which kernels ran,
`shuffled(seed)` runs a launch's programs in another order: a kernel whose result changes has a race between programs.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round fp32 to the nearest bf16, ties to even; returns its bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen the bits of bf16 to fp32."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Mend the interpreter in place; a second call does nothing."""
    if getattr(interpreter, "_mended", False):
        return
    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def mended_convert(x, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(x.view(np.float32)).reshape(x.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bf16(x).view(np.uint32).reshape(x.shape)
        if source == tl.float32 and target in fp8:
            return torch.from_numpy(x.view(np.float32)).to(fp8[target]).view(torch.uint8).numpy()
        return convert(x, source, target, rounding_mode)

    def mended_dot(self, a, b, d, *args):
        a, b = (interpreter.TensorHandle(from_bf16(x.data).reshape(x.data.shape), tl.float32)
                if x.dtype == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *args)

    interpreter._convert_float = mended_convert
    interpreter.InterpreterBuilder.create_dot = mended_dot
    interpreter._mended = True


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Collect the names of the kernels launched inside."""
    names, call = [], interpreter.GridExecutor.__call__

    def noted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = noted
    try:
        yield names
    finally:
        interpreter.GridExecutor.__call__ = call


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of every launch inside in an order drawn from `seed`."""
    builder, orders = interpreter.InterpreterBuilder, {}
    original = builder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        X, Y, Z = self.grid_dim
        if (X, Y, Z) not in orders:
            orders[X, Y, Z] = random.Random(seed).sample(range(X * Y * Z), X * Y * Z)
        at = orders[X, Y, Z][(x * Y + y) * Z + z]
        original(self, at // (Y * Z), at // Z % Y, at % Z)

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_idx = original
