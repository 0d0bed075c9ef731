"""Squared ReLU: y = relu(x)^2, the MLP's activation.

Fused: forward reads x and writes y, two passes over memory; backward reads x and dy and writes dx, three:
dx = 2 relu(x) dy. Eager writes relu(x) too and reads it back, unless torch.compile fuses it.
Numerics: fp32 arithmetic, one rounding of the result; NaN stays NaN. Source: nanochat (Nov 2025), arXiv 2109.08668.
"""

import torch
import torch.nn.functional as F

from kernels.device import pick_tile, tl, triton
from kernels.registry import Op, custom_op, declare, register


@register("relu2", "eager")
def relu2_eager(x: torch.Tensor) -> torch.Tensor:
    """Square the positive part of x (any shape); same shape and dtype."""
    return F.relu(x).square()


# keyed (sm,); not tuned on a GPU yet: two 16-byte loads of bf16 per thread
TILES = {
    (0,): dict(BLOCK=256, num_warps=1),
    (80,): dict(BLOCK=2048, num_warps=4),
}


@triton.jit
def _relu2_fwd_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.where(x < 0, 0.0, x * x)  # tl.maximum would turn NaN into 0
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _relu2_bwd_kernel(dy_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    dx = tl.where(x <= 0, 0.0, 2 * x * dy)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)


def _launch(kernel, *tensors: torch.Tensor) -> None:
    out = tensors[-1]
    tile = pick_tile(TILES, out.device)
    kernel[(triton.cdiv(out.numel(), tile["BLOCK"]),)](*tensors, out.numel(), **tile)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("relu2_fwd", fake=_fake)
def _relu2_fwd(x: torch.Tensor) -> torch.Tensor:
    y = _fake(x)
    _launch(_relu2_fwd_kernel, x.contiguous(), y)
    return y


@custom_op("relu2_bwd", fake=lambda dy, x: _fake(x))
def _relu2_bwd(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = _fake(x)
    _launch(_relu2_bwd_kernel, dy.contiguous(), x.contiguous(), dx)
    return dx


_relu2_fwd.register_autograd(lambda ctx, dy: _relu2_bwd(dy, *ctx.saved_tensors),
                             setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# Behind eager for auto: training is compiled by default, and torch.compile makes the same single passes from eager,
# fused with their neighbours.
@register("relu2", "triton", needs=("triton",), rank=110, dtypes=(torch.float32, torch.bfloat16, torch.float16))
def relu2_triton(x: torch.Tensor) -> torch.Tensor:
    """Our kernels; x of any shape and strides."""
    return _relu2_fwd(x)


# custom_op: torch.compile cannot trace Liger's launcher
@custom_op("relu2_liger_fwd", fake=_fake)
def _relu2_liger_fwd(x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.relu_squared import relu_squared_forward
    return relu_squared_forward(x.contiguous())


@custom_op("relu2_liger_bwd", fake=lambda dy, x: _fake(x))
def _relu2_liger_bwd(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.relu_squared import relu_squared_backward
    return relu_squared_backward(x.contiguous(), dy.contiguous())


_relu2_liger_fwd.register_autograd(lambda ctx, dy: _relu2_liger_bwd(dy, *ctx.saved_tensors),
                                   setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@register("relu2", "liger", needs=("cuda", "liger_kernel"), rank=120)
def relu2_liger(x: torch.Tensor) -> torch.Tensor:
    """Liger-Kernel's: a row of the last dimension per program, squared in x's dtype. Not run on a GPU yet."""
    return _relu2_liger_fwd(x)


def _inputs(case, dtype, device, generator) -> dict:
    return {"x": torch.randn(case["rows"], case["C"], generator=generator).to(device, dtype)}


OP = declare(Op(
    "relu2",
    cases={"tiny": dict(rows=8, C=64), "odd_rows_7_c_81": dict(rows=7, C=81),
           "d12": dict(rows=65536, C=3072), "d20": dict(rows=65536, C=5120), "d26": dict(rows=32768, C=6656)},
    make_inputs=_inputs,
    flops=lambda c: 2 * c["rows"] * c["C"],
    bytes=lambda c, itemsize: 2 * c["rows"] * c["C"] * itemsize,
    grad_inputs=("x",),
))
