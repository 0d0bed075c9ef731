"""Causal self-attention over (B, T, H, D), rotary and QK-norm included.

y_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s over s <= t, and with a window w >= 0 only s >= t - w (w + 1 keys, the
convention of flash-attn); -1 is no window. q, k come raw: rotation and norm belong to the op, so that a backend may
fuse them. Grouped queries: head h reads kv head h // (H // K).
Numerics: scores and softmax in fp32 or wider, probabilities rounded to v's dtype before the second product.
Our own kernels are in kernels/flash.py; the other backends run the resolved qk_norm_rope and then a library.
"""

import importlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.flash import DTYPES, attention_triton, head_dim_rule
from kernels.qk_norm_rope import qk_norm_rope_eager, rotary_table
from kernels.registry import KernelError, Op, declare, register

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


# Ranks: on an H100 flash-attn 3 and cuDNN beat Triton, and Triton beats flash-attn 2, which is what sdpa runs
# (reports of others, bf16, D = 128). Not measured here yet.
register("attention", "triton", needs=("triton",), check=head_dim_rule, rank=40, dtypes=DTYPES)(attention_triton)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Run torch's attention on rotated q, k, v (B, T, heads, D); causal without a mask."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


@register("attention", "sdpa", uses=("qk_norm_rope",), rank=50)
def attention_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                   window: int = -1, *, qk_norm_rope=qk_norm_rope_eager) -> torch.Tensor:
    """The same through torch's flash kernel, else its memory-efficient one; a window costs an explicit mask."""
    q, k = qk_norm_rope(q, k, cos, sin)
    mask = causal_mask(q.size(1), window, q.device) if window >= 0 else None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        return _sdpa(q, k, v, mask)


def _no_window(shapes) -> str | None:
    return None if "S" not in shapes["window_pattern"] else f"has no window, got pattern {shapes['window_pattern']}"


@register("attention", "cudnn", uses=("qk_norm_rope",), needs=("cuda", "sm80"), check=_no_window, rank=30,
          dtypes=(torch.bfloat16, torch.float16))
def attention_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                    window: int = -1, *, qk_norm_rope=qk_norm_rope_eager) -> torch.Tensor:
    """The same through cuDNN by way of torch, without a window. Not run on a GPU yet."""
    if window >= 0:
        raise KernelError(f"attention[cudnn]: there must be no window, got {window} (q is {tuple(q.shape)}, {q.dtype})")
    q, k = qk_norm_rope(q, k, cos, sin)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION], set_priority=True):
        return _sdpa(q, k, v, None)


def _flash_attn(module: str, no_window: int | None, q, k, v, window: int) -> torch.Tensor:
    """Call flash_attn_func of a release of flash-attn; some give (y, lse) and some y alone."""
    bounds = (window, 0) if window >= 0 else (no_window, no_window)
    y = importlib.import_module(module).flash_attn_func(
        q, k, v, causal=True, window_size=bounds, deterministic=torch.are_deterministic_algorithms_enabled())
    return y[0] if isinstance(y, tuple) else y


HALF = (torch.bfloat16, torch.float16)


@register("attention", "flash", uses=("qk_norm_rope",), needs=("cuda", "sm80", "flash_attn.flash_attn_interface"),
          rank=45, dtypes=HALF)
def attention_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                    window: int = -1, *, qk_norm_rope=qk_norm_rope_eager) -> torch.Tensor:
    """The same through flash-attn 2. Not run against the real package yet."""
    return _flash_attn("flash_attn.flash_attn_interface", -1, *qk_norm_rope(q, k, cos, sin), v, window)


@register("attention", "flash3", uses=("qk_norm_rope",), needs=("cuda", "sm90", "flash_attn_interface"),
          rank=20, dtypes=HALF)
def attention_flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                     window: int = -1, *, qk_norm_rope=qk_norm_rope_eager) -> torch.Tensor:
    """The same through flash-attn 3 (its hopper folder). Not run against the real package yet."""
    return _flash_attn("flash_attn_interface", -1, *qk_norm_rope(q, k, cos, sin), v, window)


@register("attention", "flash4", uses=("qk_norm_rope",), needs=("cuda", "sm90", "flash_attn.cute"),
          rank=25, dtypes=HALF)
def attention_flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                     window: int = -1, *, qk_norm_rope=qk_norm_rope_eager) -> torch.Tensor:
    """The same through flash-attn 4 (CuTe). Not run against the real package yet."""
    return _flash_attn("flash_attn.cute", None, *qk_norm_rope(q, k, cos, sin), v, window)


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
           "odd_T65_window_17": dict(B=1, T=65, H=2, K=2, D=128, window=17),
           "window_over_T": dict(B=1, T=9, H=2, K=1, D=64, window=50),
           "window_0": dict(B=1, T=9, H=2, K=1, D=128, window=0),
           "odd_T97_window_50": dict(B=1, T=97, H=2, K=1, D=64, window=50),
           "one_token": dict(B=1, T=1, H=2, K=2, D=128, window=-1),
           "d12": dict(B=32, T=2048, H=6, K=6, D=128, window=-1),
           "d20": dict(B=32, T=2048, H=10, K=10, D=128, window=-1),
           "d26": dict(B=16, T=2048, H=13, K=13, D=128, window=-1),
           "d20_window_512": dict(B=32, T=2048, H=10, K=10, D=128, window=512),
           "d12_D64_gqa": dict(B=32, T=2048, H=12, K=4, D=64, window=-1)},
    make_inputs=_inputs,
    flops=lambda c: 4 * c["B"] * c["H"] * c["D"] * _pairs(c),
    bytes=lambda c, itemsize: 2 * c["B"] * c["T"] * (c["H"] + c["K"]) * c["D"] * itemsize,
    grad_inputs=("q", "k", "v"),
))
