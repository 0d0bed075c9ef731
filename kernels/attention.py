"""Causal self-attention over (B, T, H, D), rotary and QK-norm included.

y_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s over s <= t, and with a window w >= 0 only s >= t - w (w + 1 keys, the
convention of flash-attn); -1 is no window. q, k come raw: rotation and norm belong to the op, so that a backend may
fuse them. Grouped queries: head h reads kv head h // (H // K).
Numerics: scores and softmax in fp32 or wider, probabilities rounded to v's dtype before the second product.
"""

import torch
import torch.nn.functional as F

from kernels.qk_norm_rope import qk_norm_rope_eager, rotary_table
from kernels.registry import Op, declare, register

# B batch, T tokens, H query heads, K kv heads, D head dim


def causal_mask(T: int, window: int, device: torch.device) -> torch.Tensor:
    """Return the boolean (T, T) mask of visible keys: row t sees s <= t and, with a window, s >= t - window."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)[None, :]
    visible = distance >= 0
    return visible & (distance <= window) if window >= 0 else visible


@register("attention", "eager", rank=100)
def attention_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                    window: int = -1) -> torch.Tensor:
    """Attend causally: q (B, T, H, D), k and v (B, T, K, D), cos and sin (T, D/2) fp32 -> (B, T, H, D)."""
    q, k = qk_norm_rope_eager(q, k, cos, sin)
    group = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~causal_mask(q.size(1), window, q.device), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1).to(v.dtype), v)


@register("attention", "sdpa", uses=("qk_norm_rope",), rank=50)
def attention_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                   window: int = -1, *, qk_norm_rope=qk_norm_rope_eager) -> torch.Tensor:
    """The same through torch's scaled_dot_product_attention; a window costs an explicit mask."""
    q, k = qk_norm_rope(q, k, cos, sin)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    mask = causal_mask(q.size(2), window, q.device) if window >= 0 else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def _inputs(case, dtype, device, generator) -> dict:
    B, T, H, K, D = (case[name] for name in "BTHKD")
    q, k, v = (torch.randn(B, T, heads, D, generator=generator).to(device, dtype) for heads in (H, K, K))
    cos, sin = rotary_table(T, D, device=device)
    return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "window": case["window"]}


def _pairs(case) -> int:
    """Count the (query, key) pairs of one head."""
    T, w = case["T"], case["window"]
    return T * (T + 1) // 2 if w < 0 or w >= T else (w + 1) * T - w * (w + 1) // 2


OP = declare(Op(
    "attention",
    cases={"tiny": dict(B=2, T=32, H=2, K=2, D=64, window=-1),
           "odd_T63_gqa": dict(B=1, T=63, H=4, K=2, D=64, window=-1),
           "odd_T65_window_17": dict(B=1, T=65, H=2, K=2, D=64, window=17),
           "window_over_T": dict(B=1, T=9, H=2, K=1, D=64, window=50),
           "window_0": dict(B=1, T=9, H=2, K=1, D=64, window=0),
           "one_token": dict(B=1, T=1, H=2, K=2, D=128, window=-1),
           "d12": dict(B=32, T=2048, H=6, K=6, D=128, window=-1),
           "d20": dict(B=32, T=2048, H=10, K=10, D=128, window=-1),
           "d26": dict(B=16, T=2048, H=13, K=13, D=128, window=-1)},
    make_inputs=_inputs,
    flops=lambda c: 4 * c["B"] * c["H"] * c["D"] * _pairs(c),
    bytes=lambda c, itemsize: 2 * c["B"] * c["T"] * (c["H"] + c["K"]) * c["D"] * itemsize,
    grad_inputs=("q", "k", "v"),
))
