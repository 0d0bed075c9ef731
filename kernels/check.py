"""Compare a backend with the eager reference honestly: both against eager in fp64 on the same rounded inputs.

The backend's maximal and rms error may be at most twice eager's own rounding error plus one ulp of the largest value.
A backend may thus be more exact than eager, never much less, and no tolerance is chosen by hand. What a backend
allocates starts as NaN, and its inputs and outputs lie between guard bands: a cell never written, a read or a write
outside show. Used by tests and by benches, which do not time what fails here.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping

import torch

from kernels.registry import BACKENDS, OPS, Op, callable_of

RATIO = 2.0


def small_cases(op: Op) -> list[str]:
    """Return the cases for a CPU or an interpreter; those called by a depth (d12, d20, ...) are for a GPU."""
    return [name for name in op.cases if not re.match(r"d\d", name)]


def assert_parity(op_name: str, backend: str, case: str, dtype: torch.dtype, device: torch.device, seed: int = 0,
                  strided: bool = False) -> None:
    """Raise AssertionError naming tensor, error and bound when `backend` is less exact than eager allows.

    Compares every output, every gradient of op.grad_inputs for one random cotangent, and every mutated input.
    With `strided` the backend gets inputs whose last dimension is not contiguous.
    """
    op = OPS[op_name]
    inputs = op.make_inputs(op.cases[case], dtype, device, torch.Generator().manual_seed(seed))
    wide = {name: _map(value, _to_fp64) for name, value in inputs.items()}
    if "compute_dtype" in wide:
        wide["compute_dtype"] = torch.float64
    eager = callable_of(op_name, "eager")
    results = {"eager": run(op, eager, inputs), "exact": run(op, eager, wide),
               "kernel": run(op, callable_of(op_name, backend), inputs, _strided if strided else _banded)}
    largest = max(map(_largest, results["exact"].values()))
    sqnr = BACKENDS[op_name][backend].sqnr
    for name, exact in results["exact"].items():
        kernel, eager = results["kernel"][name], results["eager"][name]
        if sqnr:
            _assert_sqnr(f"{op_name}={backend} {case} {name}", kernel, eager, exact, sqnr[name.startswith("gradient")])
            continue
        # A gradient that is 0 by cancellation (one visible key) has no scale of its own: take the call's.
        scale = _largest(exact) or largest
        _assert_close(f"{op_name}={backend} {case} {name}", kernel, eager, exact, scale)


def run(op: Op, fn: Callable, inputs: Mapping, copy: Callable = torch.clone) -> dict[str, torch.Tensor]:
    """Call `fn` on a copy of the inputs; return outputs, gradients and mutated inputs by name."""
    inputs = {name: _map(value, copy) for name, value in inputs.items()}
    with contextlib.nullcontext() if copy is torch.clone else guarded_allocations():
        return _run(op, fn, inputs)


def _run(op: Op, fn: Callable, inputs: Mapping) -> dict[str, torch.Tensor]:
    for name in op.grad_inputs:
        inputs[name].requires_grad_()
    result = fn(**inputs)
    outputs = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if op.grad_inputs:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, [inputs[name] for name in op.grad_inputs], cotangents)
        found |= {f"gradient of {name}": g for name, g in zip(op.grad_inputs, gradients, strict=True)}
    for name in op.mutates:
        values = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
        values = [value for value in values if value is not None]
        found |= {f"{name}[{i}] afterwards": value for i, value in enumerate(values)}
    return found


# --- guard bands ----------------------------------------------------------------------------------

BAND = 64  # cells on each side: a multiple of 16 bytes in every dtype, so alignment stays


def _unwritten(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def _in_band(empty: torch.Tensor, allocate: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a tensor of the same layout between two bands, its whole buffer), every cell NaN or the largest int."""
    cells = sum((n - 1) * stride for n, stride in zip(empty.shape, empty.stride(), strict=True)) + 1
    cells = cells if empty.numel() else 0
    buffer = allocate(cells + 2 * BAND, dtype=empty.dtype, device=empty.device).fill_(_unwritten(empty.dtype))
    return buffer[BAND:].as_strided(empty.shape, empty.stride(), BAND), buffer


def _assert_bands(buffer: torch.Tensor) -> None:
    bands = torch.cat((buffer[:BAND], buffer[-BAND:])).float()
    want = torch.tensor(_unwritten(buffer.dtype), dtype=buffer.dtype).float().item()
    intact = bands.isnan() if want != want else bands == want
    assert intact.all(), f"wrote outside a tensor of {buffer.numel() - 2 * BAND} cells of {buffer.dtype}"


@contextlib.contextmanager
def guarded_allocations() -> Iterator[None]:
    """Put what torch.empty, empty_like and new_empty give inside between bands; AssertionError if one was written."""
    patched = {(torch, "empty"): torch.empty, (torch, "empty_like"): torch.empty_like,
               (torch.Tensor, "new_empty"): torch.Tensor.new_empty}
    allocate, buffers = torch.empty, []

    def guarded(original):
        def fn(*args, **kwargs):
            empty = original(*args, **kwargs)
            if empty.device.type == "meta" or type(empty) is not torch.Tensor:
                return empty
            tensor, buffer = _in_band(empty, allocate)
            buffers.append(buffer)
            return tensor
        return fn

    for (owner, name), original in patched.items():
        setattr(owner, name, guarded(original))
    try:
        yield
    finally:
        for (owner, name), original in patched.items():
            setattr(owner, name, original)
    for buffer in buffers:
        _assert_bands(buffer)


def _banded(x: torch.Tensor) -> torch.Tensor:
    """Copy x between bands of NaN: what reads outside its tensor gets NaN."""
    tensor, _ = _in_band(x, torch.empty)
    return tensor.copy_(x)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Copy x to every second cell of a buffer, NaN between them."""
    if not x.dim():
        return x.clone()
    wide = torch.empty(*x.shape[:-1], 2 * x.size(-1), dtype=x.dtype, device=x.device).fill_(_unwritten(x.dtype))
    wide[..., ::2] = x
    return wide[..., ::2]


# --- errors ---------------------------------------------------------------------------------------


def _assert_close(what: str, kernel: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    assert kernel.shape == eager.shape and kernel.dtype == eager.dtype, \
        f"{what}: must be {tuple(eager.shape)} {eager.dtype}, got {tuple(kernel.shape)} {kernel.dtype}"
    if not kernel.is_floating_point():
        assert torch.equal(kernel, eager), f"{what}: integers must be equal"
        return
    ulp = torch.finfo(kernel.dtype).eps * scale
    for measure in (_max_error, _rms_error):
        got, bound = measure(kernel, exact), RATIO * measure(eager, exact) + ulp
        assert got <= bound, f"{what}: {measure.__name__[1:]} must be at most {bound:.3e}, got {got:.3e}"


def _assert_sqnr(what: str, kernel: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, least: float) -> None:
    """Signal to quantization noise, 10 log10(sum exact^2 / sum error^2): for backends that round on purpose."""
    assert kernel.shape == eager.shape and kernel.dtype == eager.dtype, \
        f"{what}: must be {tuple(eager.shape)} {eager.dtype}, got {tuple(kernel.shape)} {kernel.dtype}"
    got = 20 * math.log10(_rms_error(exact, 0 * exact) / max(_rms_error(kernel, exact), 1e-300))
    assert got >= least, f"{what}: SQNR must be at least {least} dB, got {got:.1f}"


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _max_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).abs().max().item()  # NaN compares false with any bound


def _rms_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).square().mean().sqrt().item()


def _map(value, fn: Callable):
    if isinstance(value, torch.Tensor):
        return fn(value)
    return [fn(v) for v in value] if isinstance(value, list) else value


def _to_fp64(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x
