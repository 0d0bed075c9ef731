"""RMSNorm without weight: y = x / sqrt(mean(x^2) + eps) over the last dimension.

Fused: forward reads x and writes y, two passes over memory; backward reads x and dy and writes dx, three, and takes
r = 1 / rms from the forward pass (4 bytes a row): dx = r (dy - y mean(dy y)).
Numerics: eps is fp32's epsilon in every dtype, also fp64, where torch's default is another number (2.2e-16); all
arithmetic in fp32, one rounding of the result. Source: nanochat (Nov 2025), arXiv 1910.07467.
Limits: a row must fit one block, C <= 16,384.
"""

import torch
import torch.nn.functional as F

from kernels.device import pick_tile, tl, triton
from kernels.registry import RMS_NORM_EPS, KernelError, Op, custom_op, declare, register

# N rows, C model dim

MAX_C = 16_384


@register("rms_norm", "eager")
def rms_norm_eager(x: torch.Tensor) -> torch.Tensor:
    """Normalize x (..., C) over C; same shape and dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


# keyed (sm, C <= 2,048); not tuned on a GPU yet: 4 KiB of x per program, a warp per 512 columns
TILES = {
    (0, True): dict(ROWS=4, num_warps=1),
    (0, False): dict(ROWS=1, num_warps=1),
    (80, True): dict(ROWS=4, num_warps=4),
    (80, False): dict(ROWS=1, num_warps=8),
}


@triton.jit
def _rms_norm_fwd_kernel(x_ptr, y_ptr, r_ptr, N, C, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, axis=1) / C + EPS)
    tl.store(y_ptr + at, (x * r[:, None]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(r_ptr + rows, r, mask=rows < N)


@triton.jit
def _rms_norm_bwd_kernel(dy_ptr, x_ptr, r_ptr, dx_ptr, N, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + rows, mask=rows < N, other=0.0)[:, None]
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * r
    dx = r * (dy - y * (tl.sum(dy * y, axis=1) / C)[:, None])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, like: torch.Tensor, *tensors: torch.Tensor, **constants) -> None:
    N, C = like.numel() // like.size(-1), like.size(-1)
    tile = pick_tile(TILES, like.device, C <= 2048)
    kernel[(triton.cdiv(N, tile["ROWS"]),)](*tensors, N, C, BLOCK_C=triton.next_power_of_2(C), **constants, **tile)


def _fake_fwd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape[:-1], dtype=torch.float32)


@custom_op("rms_norm_fwd", fake=_fake_fwd)
def _rms_norm_fwd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, r = _fake_fwd(x)
    _launch(_rms_norm_fwd_kernel, x, x.contiguous(), y, r, EPS=RMS_NORM_EPS)
    return y, r


@custom_op("rms_norm_bwd", fake=lambda dy, x, r: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _rms_norm_bwd(dy: torch.Tensor, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_rms_norm_bwd_kernel, x, dy.contiguous(), x.contiguous(), r, dx)
    return dx


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])


_rms_norm_fwd.register_autograd(lambda ctx, dy, _: _rms_norm_bwd(dy, *ctx.saved_tensors), setup_context=_save)


def _rule(shapes) -> str | None:
    return None if shapes["n_embd"] <= MAX_C else f"n_embd must be at most {MAX_C}, got {shapes['n_embd']}"


@register("rms_norm", "triton", needs=("triton",), check=_rule, rank=40,
          dtypes=(torch.float32, torch.bfloat16, torch.float16))
def rms_norm_triton(x: torch.Tensor) -> torch.Tensor:
    """Our kernels; x (..., C) of any strides."""
    if x.size(-1) > MAX_C:
        raise KernelError(f"rms_norm[triton]: C must be at most {MAX_C}, got {x.size(-1)} "
                          f"(x is {tuple(x.shape)}, {x.dtype})")
    return _rms_norm_fwd(x)[0]


@register("rms_norm", "liger", needs=("cuda", "liger_kernel"), rank=60)
def rms_norm_liger(x: torch.Tensor) -> torch.Tensor:
    """Liger-Kernel's; in_place=False because its default overwrites dy."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    return LigerRMSNormFunction.apply(x, None, RMS_NORM_EPS, 0.0, "llama", False)


def _inputs(case, dtype, device, generator) -> dict:
    x = torch.randn(case["rows"], case["C"], generator=generator) * case.get("scale", 1.0)
    return {"x": x.to(device, dtype)}


OP = declare(Op(
    "rms_norm",
    cases={"tiny": {"rows": 8, "C": 64}, "odd_rows_7_c_80": {"rows": 7, "C": 80}, "one_row": {"rows": 1, "C": 256},
           "wide_3_c_2050": {"rows": 3, "C": 2050}, "eps_matters": {"rows": 5, "C": 64, "scale": 1e-2},
           "d12": {"rows": 65536, "C": 768}, "d20": {"rows": 65536, "C": 1280}, "d26": {"rows": 32768, "C": 1664},
           "d40": {"rows": 16384, "C": 2560}},
    make_inputs=_inputs,
    flops=lambda c: 3 * c["rows"] * c["C"],
    bytes=lambda c, itemsize: 2 * c["rows"] * c["C"] * itemsize,
    grad_inputs=("x",),
))
