"""Rotary position embedding and QK-norm: rotate each head of q and k by position, then RMS-normalize it.

Half-split layout: with x = (x1, x2), y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos, a rotation by minus theta; then
y / sqrt(mean(y^2) + eps) over D. The order matters only for rounding, a rotation keeps the mean square. One
definition for training (B, T) rows and for the flat rows of paged decode, so that the two cannot drift apart.
Numerics: cos and sin are fp32, so the rotation is computed in fp32 and rounded once before the norm.
Source: nanochat (Nov 2025).
"""

import torch
import torch.nn.functional as F

from kernels.registry import RMS_NORM_EPS, Op, declare, register

# B batch, T tokens, H query heads, K kv heads, D head dim


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


def _inputs(case, dtype, device, generator) -> dict:
    B, T, H, K, D = (case[name] for name in "BTHKD")
    q = torch.randn(B, T, H, D, generator=generator).to(device, dtype)
    k = torch.randn(B, T, K, D, generator=generator).to(device, dtype)
    cos, sin = rotary_table(T, D, device=device)
    return {"q": q, "k": k, "cos": cos, "sin": sin}


OP = declare(Op(
    "qk_norm_rope",
    cases={"tiny": dict(B=2, T=16, H=2, K=2, D=64), "odd_T63_gqa": dict(B=1, T=63, H=4, K=2, D=64),
           "one_token": dict(B=1, T=1, H=2, K=1, D=128), "d12": dict(B=32, T=2048, H=6, K=6, D=128),
           "d20": dict(B=32, T=2048, H=10, K=10, D=128), "d26": dict(B=16, T=2048, H=13, K=13, D=128)},
    make_inputs=_inputs,
    flops=lambda c: 10 * c["B"] * c["T"] * (c["H"] + c["K"]) * c["D"],
    bytes=lambda c, itemsize: 2 * c["B"] * c["T"] * (c["H"] + c["K"]) * c["D"] * itemsize,
    grad_inputs=("q", "k"),
))
