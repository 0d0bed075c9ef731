"""Append new keys and values to paged KV memory: rotate and normalize q and k, write k and v into their slots.

Slot s is row s % P of page s // P; slot -1 writes nothing (padding rows of a fixed-size batch). Returns the rotated
and normalized q, the input of paged_attention. Rotation and norm are those of training (kernels/qk_norm_rope.py).
"""

import torch

from kernels.qk_norm_rope import qk_norm_rope_eager, rotary_table
from kernels.registry import Op, declare, register

# N new tokens, H query heads, K kv heads, D head dim, P page size


@register("paged_append", "eager")
def paged_append_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                       k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Write k, v (N, K, D) to k_pages, v_pages (pages, P, K, D) at slots (N,) int64; return q (N, H, D).

    cos, sin (N, D/2) fp32 are the rows of the rotary table at the tokens' positions.
    """
    q, k = qk_norm_rope_eager(q, k, cos, sin)
    kept = slots >= 0
    k_pages.flatten(0, 1)[slots[kept]] = k[kept].to(k_pages.dtype)
    v_pages.flatten(0, 1)[slots[kept]] = v[kept].to(v_pages.dtype)
    return q


def _inputs(case, dtype, device, generator) -> dict:
    N, H, K, D, P, pages = (case[name] for name in ("N", "H", "K", "D", "P", "pages"))
    q, k, v = (torch.randn(N, heads, D, generator=generator).to(device, dtype) for heads in (H, K, K))
    cos, sin = rotary_table(N, D, device=device)
    slots = torch.randperm(pages * P, generator=generator)[:N]
    slots[:: case["skip_every"]] = -1
    k_pages, v_pages = (torch.randn(pages, P, K, D, generator=generator).to(device, dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_pages": k_pages, "v_pages": v_pages,
            "slots": slots.to(device)}


OP = declare(Op(
    "paged_append",
    cases={"tiny": dict(N=9, H=2, K=2, D=64, P=16, pages=3, skip_every=4),
           "odd_gqa": dict(N=1, H=4, K=1, D=64, P=16, pages=1, skip_every=7),
           "d20_decode_b64": dict(N=64, H=10, K=10, D=128, P=256, pages=512, skip_every=65)},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: 2 * c["N"] * (c["H"] + 2 * c["K"]) * c["D"] * itemsize,
    mutates=("k_pages", "v_pages"),
))
