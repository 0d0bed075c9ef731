"""Append new keys and values to paged KV memory: rotate and normalize q and k, write k and v into their slots.

Slot s is row s % P of page s // P; slot -1 writes nothing (padding rows of a fixed-size batch). Returns the rotated
and normalized q, the input of paged_attention. Rotation and norm are those of training (kernels/qk_norm_rope.py).

Fused: one launch reads q, k, v and writes q and the pages, where eager needs the two results of qk_norm_rope in memory
and a scatter for each of k and v. At decode it is the launches that count: 1 instead of about 20.
Numerics: as qk_norm_rope; a page of another dtype rounds once more, from the compute dtype. Limits: as qk_norm_rope.
"""

import torch

from kernels.device import pick_tile, tl, triton
from kernels.qk_norm_rope import MAX_D, norm_rope, qk_norm_rope_eager, rotary_table
from kernels.registry import RMS_NORM_EPS, KernelError, Op, custom_op, declare, register

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


# keyed (sm,): a program takes one head of TOKENS tokens; not tuned on a GPU yet
TILES = {(0,): dict(TOKENS=4, num_warps=1), (80,): dict(TOKENS=16, num_warps=2)}


@triton.jit
def _paged_append_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, y_ptr, N, H, K,
                         stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, EPS: tl.constexpr,
                         D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)  # H heads of q, then K of k, then K of v
    cols = tl.arange(0, HALF)[None, :]
    mask = (rows < N)[:, None] & (cols < D // 2)
    slots = tl.load(slots_ptr + rows, mask=rows < N, other=-1)
    kept = mask & (slots >= 0)[:, None]
    if head >= H + K:
        own = head - H - K
        v = v_ptr + (rows * stride_vn + own * stride_vh)[:, None] + cols
        out = v_pages_ptr + (slots * K + own)[:, None] * D + cols
        tl.store(out, tl.load(v, mask=kept, other=0.0).to(v_pages_ptr.dtype.element_ty), mask=kept)
        tl.store(out + D // 2, tl.load(v + D // 2, mask=kept, other=0.0).to(v_pages_ptr.dtype.element_ty), mask=kept)
    else:
        if head < H:
            x = q_ptr + (rows * stride_qn + head * stride_qh)[:, None] + cols
        else:
            x = k_ptr + (rows * stride_kn + (head - H) * stride_kh)[:, None] + cols
        angle = rows[:, None] * (D // 2) + cols
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + D // 2, mask=mask, other=0.0).to(tl.float32)
        z1, z2, _ = norm_rope(x1, x2, cos, sin, D, EPS)
        # rounded to the compute dtype first, like the k that training attends with
        z1, z2 = z1.to(y_ptr.dtype.element_ty), z2.to(y_ptr.dtype.element_ty)
        if head < H:
            out = y_ptr + (rows * H + head)[:, None] * D + cols
            tl.store(out, z1, mask=mask)
            tl.store(out + D // 2, z2, mask=mask)
        else:
            out = k_pages_ptr + (slots * K + head - H)[:, None] * D + cols
            tl.store(out, z1.to(k_pages_ptr.dtype.element_ty), mask=kept)
            tl.store(out + D // 2, z2.to(k_pages_ptr.dtype.element_ty), mask=kept)


def _fake(q, k, v, cos, sin, k_pages, v_pages, slots) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@custom_op("paged_append", fake=_fake, mutates=("k_pages", "v_pages"))
def _paged_append(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                  k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    (N, H, D), K = q.shape, k.size(1)
    y = _fake(q, k, v, cos, sin, k_pages, v_pages, slots)
    tile = pick_tile(TILES, q.device)
    _paged_append_kernel[(triton.cdiv(N, tile["TOKENS"]), H + 2 * K)](
        q, k, v, cos, sin, k_pages, v_pages, slots, y, N, H, K, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        EPS=RMS_NORM_EPS, D=D, HALF=triton.next_power_of_2(D // 2), **tile)
    return y


@register("paged_append", "triton", needs=("triton",), rank=40, dtypes=(torch.float32, torch.bfloat16, torch.float16),
          check=lambda shapes: None if shapes["head_dim"] <= MAX_D
          else f"head_dim must be at most {MAX_D}, got {shapes['head_dim']}")
def paged_append_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                        k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Our kernel, one launch; the pages must be contiguous, the rest may have any strides."""
    rule = None
    if q.size(-1) > MAX_D:
        rule = f"D must be at most {MAX_D}, got {q.size(-1)}"
    elif not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        rule = f"pages must be contiguous, got strides {k_pages.stride()} and {v_pages.stride()}"
    if rule:
        raise KernelError(f"paged_append[triton]: {rule} (q is {tuple(q.shape)}, {q.dtype})")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _paged_append(q, k, v, cos.contiguous(), sin.contiguous(), k_pages, v_pages, slots.contiguous())


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
           "odd_D10": dict(N=6, H=3, K=1, D=10, P=16, pages=2, skip_every=3),
           "odd_gqa": dict(N=1, H=4, K=1, D=64, P=16, pages=1, skip_every=7),
           "d20_decode_b64": dict(N=64, H=10, K=10, D=128, P=256, pages=512, skip_every=65)},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: 2 * c["N"] * (c["H"] + 2 * c["K"]) * c["D"] * itemsize,
    mutates=("k_pages", "v_pages"),
))
