"""Rotary position embedding and QK-norm: rotate each head of q and k by position, then RMS-normalize it.

Half-split layout: with x = (x1, x2), y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos, a rotation by minus theta; then
y / sqrt(mean(y^2) + eps) over D. The order matters only for rounding, a rotation keeps the mean square. One
definition for training (B, T) rows and for the flat rows of paged decode, so that the two cannot drift apart.

Fused: one launch reads q and k and writes both results, 2 passes of memory where eager in bf16 makes the like of 21
(products, sums and concatenation in fp32, cast, norm). With z the result and r = 1 / rms, backward reads dz and z and
writes dx = R^-1 r (dz - z mean(dz z)), R the rotation. z and r (4 bytes a head) are kept, not x: attention keeps z in
any case, so x is free after the forward pass.
Numerics: cos and sin are fp32. Eager rounds the rotation before the norm, Triton computes both in fp32 and rounds once.
Source: nanochat (Nov 2025). Limits of Triton: D even and at most 256.
"""

import math

import torch
import torch.nn.functional as F

from kernels.device import pick_tile, tl, triton
from kernels.registry import RMS_NORM_EPS, KernelError, Op, custom_op, declare, register

# B batch (all leading dimensions), T tokens, N = B T rows, H query heads, K kv heads, D head dim

MAX_D = 256


@register("qk_norm_rope", "eager")
def qk_norm_rope_eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor,
                       sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and normalize q (..., T, H, D) and k (..., T, K, D) with cos and sin (T, D/2) in fp32.

    Returns new q and k in their own dtypes.
    """
    return _rotate_then_norm(q, cos, sin), _rotate_then_norm(k, cos, sin)


def _rotate_then_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, D/2), the same angle for every head
    x1, x2 = x.chunk(2, dim=-1)
    y = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
    return F.rms_norm(y.to(x.dtype), (x.size(-1),), eps=RMS_NORM_EPS)


def rotary_table(n_positions: int, head_dim: int, base: float = 10_000.0,
                 device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (n_positions, D/2) in fp32 for theta_i = position * base^(-2i/D)."""
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(n_positions, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def key_scale(head_dim: int) -> float:
    """Return the power of two that normalized keys, at most sqrt(D) each, are multiplied by before they become e4m3."""
    return 2.0 ** math.floor(math.log2(448 / head_dim ** 0.5))


# keyed (sm, N >= 4,096); not tuned on a GPU yet. Many rows: a program turns all heads of 16 tokens, so that cos and sin
# are read once. Few rows (decode): a program per head, or 20 heads of d20 would wait for each other.
TILES = {
    (0, False): dict(TOKENS=4, HEADS=3, num_warps=1),
    (0, True): dict(TOKENS=16, HEADS=32, num_warps=4),
    (80, False): dict(TOKENS=4, HEADS=1, num_warps=1),
    (80, True): dict(TOKENS=16, HEADS=32, num_warps=4),
}


# --- device functions, for attention and paged_append too: a head is its two halves, each (rows, D/2) in fp32 ------


@triton.jit
def rotate(x1, x2, cos, sin):
    return x1 * cos + x2 * sin, x2 * cos - x1 * sin


@triton.jit
def norm_rope(x1, x2, cos, sin, D: tl.constexpr, EPS: tl.constexpr):
    """Rotate and normalize; returns both halves and r (rows,)."""
    r = 1 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + EPS)
    y1, y2 = rotate(x1, x2, cos, sin)
    return y1 * r[:, None], y2 * r[:, None], r


@triton.jit
def norm_rope_grad(dz1, dz2, z1, z2, r, cos, sin, D: tl.constexpr):
    """Take the gradient of norm_rope's output back to its input."""
    mean = (tl.sum(dz1 * z1 + dz2 * z2, axis=1) / D)[:, None]
    return rotate(r[:, None] * (dz1 - z1 * mean), r[:, None] * (dz2 - z2 * mean), cos, -sin)


@triton.jit
def _fwd_heads(x_ptr, z_ptr, r_ptr, rows, at, cos, sin, mask, first, last, heads, stride_h, N,
               D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr):
    cols = tl.arange(0, HALF)[None, :]
    for h in range(first, last):
        x = x_ptr + at[:, None] + h * stride_h + cols
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + D // 2, mask=mask, other=0.0).to(tl.float32)
        z1, z2, r = norm_rope(x1, x2, cos, sin, D, EPS)
        z = z_ptr + (rows * heads + h)[:, None] * D + cols
        tl.store(z, z1.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(z + D // 2, z2.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(r_ptr + rows * heads + h, r, mask=rows < N)


@triton.jit
def _bwd_heads(dz_ptr, z_ptr, r_ptr, dx_ptr, rows, at, cos, sin, mask, first, last, heads, stride_h, N,
               D: tl.constexpr, HALF: tl.constexpr):
    cols = tl.arange(0, HALF)[None, :]
    for h in range(first, last):
        dz = dz_ptr + at[:, None] + h * stride_h + cols
        dz1 = tl.load(dz, mask=mask, other=0.0).to(tl.float32)
        dz2 = tl.load(dz + D // 2, mask=mask, other=0.0).to(tl.float32)
        own = (rows * heads + h)[:, None] * D + cols
        z1 = tl.load(z_ptr + own, mask=mask, other=0.0).to(tl.float32)
        z2 = tl.load(z_ptr + own + D // 2, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + rows * heads + h, mask=rows < N, other=0.0)
        dx1, dx2 = norm_rope_grad(dz1, dz2, z1, z2, r, cos, sin, D)
        tl.store(dx_ptr + own, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + own + D // 2, dx2.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of_program(cos_ptr, sin_ptr, N, T, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr):
    """Return this program's rows (int64), their mask (TOKENS, HALF) and the cos and sin of their positions."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, HALF)
    mask = (rows < N)[:, None] & (cols < D // 2)[None, :]
    angle = (rows % T)[:, None] * (D // 2) + cols[None, :]
    return rows, mask, tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)


@triton.jit
def _qk_norm_rope_fwd_kernel(q_ptr, k_ptr, cos_ptr, sin_ptr, zq_ptr, zk_ptr, rq_ptr, rk_ptr, N, T, H, K,
                             stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, EPS: tl.constexpr,
                             D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    rows, mask, cos, sin = _rows_of_program(cos_ptr, sin_ptr, N, T, D, HALF, TOKENS)
    first = tl.program_id(1) * HEADS  # of the H + K heads
    last = tl.minimum(first + HEADS, H + K)
    _fwd_heads(q_ptr, zq_ptr, rq_ptr, rows, rows // T * stride_qb + rows % T * stride_qt, cos, sin, mask,
               first, tl.minimum(last, H), H, stride_qh, N, D, HALF, EPS)
    _fwd_heads(k_ptr, zk_ptr, rk_ptr, rows, rows // T * stride_kb + rows % T * stride_kt, cos, sin, mask,
               tl.maximum(first, H) - H, last - H, K, stride_kh, N, D, HALF, EPS)


@triton.jit
def _qk_norm_rope_bwd_kernel(dzq_ptr, dzk_ptr, cos_ptr, sin_ptr, zq_ptr, zk_ptr, rq_ptr, rk_ptr, dq_ptr, dk_ptr,
                             N, T, H, K, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
                             D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    rows, mask, cos, sin = _rows_of_program(cos_ptr, sin_ptr, N, T, D, HALF, TOKENS)
    first = tl.program_id(1) * HEADS
    last = tl.minimum(first + HEADS, H + K)
    _bwd_heads(dzq_ptr, zq_ptr, rq_ptr, dq_ptr, rows, rows // T * stride_qb + rows % T * stride_qt, cos, sin, mask,
               first, tl.minimum(last, H), H, stride_qh, N, D, HALF)
    _bwd_heads(dzk_ptr, zk_ptr, rk_ptr, dk_ptr, rows, rows // T * stride_kb + rows % T * stride_kt, cos, sin, mask,
               tl.maximum(first, H) - H, last - H, K, stride_kh, N, D, HALF)


def _launch(kernel, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *tensors: torch.Tensor,
            **constants) -> None:
    """Launch over q and k (..., T, H or K, D) of any strides; `tensors` are contiguous."""
    q, k = (as_rows(x) for x in (q, k))
    (B, T, H, D), K = q.shape, k.size(2)
    tile = pick_tile(TILES, q.device, B * T >= 4096)
    grid = (triton.cdiv(B * T, tile["TOKENS"]), triton.cdiv(H + K, tile["HEADS"]))
    kernel[grid](q, k, cos.contiguous(), sin.contiguous(), *tensors, B * T, T, H, K, *q.stride()[:3], *k.stride()[:3],
                 D=D, HALF=triton.next_power_of_2(D // 2), **constants, **tile)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x (..., T, H, D) as (B, T, H, D) with unit stride over D; copies only where strides leave no view."""
    x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(*like: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in like]


def _fake_fwd(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_empty(q, k), *_empty(q[..., 0], k[..., 0], dtype=torch.float32)


@custom_op("qk_norm_rope_fwd", fake=_fake_fwd)
def qk_norm_rope_fwd(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor,
                     sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated and normalized q and k, contiguous, and r of each head (..., T, H or K) in fp32."""
    outputs = _fake_fwd(q, k, cos, sin)
    _launch(_qk_norm_rope_fwd_kernel, q, k, cos, sin, *outputs, EPS=RMS_NORM_EPS)
    return outputs


def _fake_bwd(dzq, dzk, zq, zk, rq, rk, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(_empty(zq, zk))


@custom_op("qk_norm_rope_bwd", fake=_fake_bwd)
def _qk_norm_rope_bwd(dzq: torch.Tensor, dzk: torch.Tensor, zq: torch.Tensor, zk: torch.Tensor, rq: torch.Tensor,
                      rk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dq, dk = _empty(zq, zk)
    _launch(_qk_norm_rope_bwd_kernel, dzq, dzk, cos, sin, zq, zk, rq, rk, dq, dk)
    return dq, dk


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[2:])


qk_norm_rope_fwd.register_autograd(
    lambda ctx, dzq, dzk, *_: (*_qk_norm_rope_bwd(dzq, dzk, *ctx.saved_tensors), None, None), setup_context=_save)


def _rule(shapes) -> str | None:
    D = shapes["head_dim"]
    return None if D <= MAX_D else f"head_dim must be at most {MAX_D}, got {D}"


def check_rotary(op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raise KernelError, naming the op, unless k, cos and sin fit q (..., T, H, D): a kernel reads what it is told."""
    T, D = q.size(-3), q.size(-1)
    if not cos.shape == sin.shape == (T, D // 2):
        raise KernelError(f"{op}[triton]: cos and sin must be (T, D/2) = {(T, D // 2)}, got {tuple(cos.shape)} and "
                          f"{tuple(sin.shape)} (q is {tuple(q.shape)}, {q.dtype})")
    if k.shape[:-2] != q.shape[:-2] or k.size(-1) != D or k.dtype != q.dtype:
        raise KernelError(f"{op}[triton]: k must have q's tokens, head dim and dtype, got {tuple(k.shape)}, {k.dtype} "
                          f"(q is {tuple(q.shape)}, {q.dtype})")


@register("qk_norm_rope", "triton", needs=("triton",), check=_rule, rank=40,
          dtypes=(torch.float32, torch.bfloat16, torch.float16))
def qk_norm_rope_triton(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor,
                        sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernels; q and k of any strides, free of copies where D is contiguous."""
    check_rotary("qk_norm_rope", q, k, cos, sin)
    if q.size(-1) > MAX_D or q.size(-1) % 2:
        raise KernelError(f"qk_norm_rope[triton]: D must be even and at most {MAX_D}, got {q.size(-1)} "
                          f"(q is {tuple(q.shape)}, {q.dtype})")
    return qk_norm_rope_fwd(q, k, cos, sin)[:2]


def _inputs(case, dtype, device, generator) -> dict:
    B, T, H, K, D = (case[name] for name in "BTHKD")
    leading = (B, T) if B else (T,)  # without B the flat rows of paged decode
    q, k = (torch.randn(*leading, heads, D, generator=generator) * case.get("std", 1) for heads in (H, K))
    cos, sin = rotary_table(T, D, device=device)
    return {"q": q.to(device, dtype), "k": k.to(device, dtype), "cos": cos, "sin": sin}


def _values(case) -> int:
    return (case["B"] or 1) * case["T"] * (case["H"] + case["K"]) * case["D"]


OP = declare(Op(
    "qk_norm_rope",
    cases={"tiny": dict(B=2, T=16, H=2, K=2, D=64), "odd_T63_gqa": dict(B=1, T=63, H=4, K=2, D=64),
           "one_token": dict(B=1, T=1, H=2, K=1, D=128), "odd_rows_D80": dict(B=None, T=5, H=3, K=1, D=80),
           "small_values": dict(B=1, T=3, H=1, K=1, D=64, std=1e-2),  # eps is 1e-3 of the mean square
           "d12": dict(B=32, T=2048, H=6, K=6, D=128), "d20": dict(B=32, T=2048, H=10, K=10, D=128),
           "d26": dict(B=16, T=2048, H=13, K=13, D=128), "d20_decode_64": dict(B=None, T=64, H=10, K=10, D=128)},
    make_inputs=_inputs,
    flops=lambda c: 10 * _values(c),
    bytes=lambda c, itemsize: 2 * _values(c) * itemsize,
    grad_inputs=("q", "k"),
))
