"""Append new keys and values to paged KV memory: rotate and normalize q and k, write k and v into their slots.

Slot s is row s % P of page s // P; slot -1 writes nothing (padding rows of a fixed-size batch). Returns the rotated
and normalized q, the input of paged_attention. Rotation and norm are those of training (kernels/qk_norm_rope.py).

Fused: one launch reads q, k, v and writes q and the pages, where eager needs the two results of qk_norm_rope in memory
and a scatter for each of k and v. At decode it is the launches that count: 1 instead of about 20.
Numerics: as qk_norm_rope; a page of another dtype rounds once more, from the compute dtype. Limits: as qk_norm_rope.

fp8 pages hold e4m3. A normalized key is at most sqrt(D), so one power of two per model brings it into range (32 at
D = 128) and nothing is stored for it. Values have no bound: each token and head has its own power of two, 4 bytes
beside 2 x 128 of codes, 260 in all against 512 in bf16. Powers of two make a code one rounding of the fp32 result.
"""

import torch

from kernels.device import pick_tile, tl, triton
from kernels.qk_norm_rope import MAX_D, key_scale, norm_rope, qk_norm_rope_eager, rotary_table
from kernels.registry import RMS_NORM_EPS, KernelError, Op, custom_op, declare, register

# N new tokens, H query heads, K kv heads, D head dim, P page size

TOP_EXPONENT = 8  # e4m3's largest number is 1.75 * 2^8
UP_TO_1_75 = 0x1FFFFF  # added to the bits of a float it carries into the exponent when the mantissa is above 1.75
INFINITY = 0x7F800000


@register("paged_append", "eager")
def paged_append_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                       k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor,
                       v_scales: torch.Tensor | None = None) -> torch.Tensor:
    """Write k, v (N, K, D) to k_pages, v_pages (pages, P, K, D) at slots (N,) int64; return q (N, H, D).

    cos, sin (N, D/2) fp32 are the rows of the rotary table at the tokens' positions. With v_scales (pages, P, K) fp32
    the pages are uint8, codes of e4m3: k ~ codes / key_scale(D), v ~ codes * v_scales.
    """
    kept = slots >= 0
    if v_scales is not None:
        q, k = qk_norm_rope_eager(q, k.float(), cos, sin)
        k = (k * key_scale(k.size(-1))).to(torch.float8_e4m3fn).view(torch.uint8)
        v, scales = _cast_values(v.float())
        v_scales.flatten(0, 1)[slots[kept]] = scales[kept].to(v_scales.dtype)
    else:
        q, k = qk_norm_rope_eager(q, k, cos, sin)
    k_pages.flatten(0, 1)[slots[kept]] = k[kept].to(k_pages.dtype)
    v_pages.flatten(0, 1)[slots[kept]] = v[kept].to(v_pages.dtype)
    return q


def _cast_values(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast v (N, K, D) fp32 -> codes uint8 and the scales (N, K) that undo them, NaN for values that are not finite."""
    bits = v.abs().amax(dim=-1).view(torch.int32)
    exponent = (TOP_EXPONENT + 254 - ((bits + UP_TO_1_75) >> 23)).clamp(max=253)  # biased by 127
    up, down = (torch.where(bits < INFINITY, (e << 23).view(torch.float32), torch.nan)
                for e in (exponent, 254 - exponent))
    return (v * up[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), down


# keyed (sm,): a program takes one head of TOKENS tokens; not tuned on a GPU yet
TILES = {(0,): dict(TOKENS=4, num_warps=1), (80,): dict(TOKENS=16, num_warps=2)}


@triton.jit
def _page_cells(x1, x2, dtype: tl.constexpr, FP8: tl.constexpr):
    """Return both halves as the pages hold them."""
    if FP8:
        return x1.to(tl.float8e4nv).to(tl.uint8, bitcast=True), x2.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return x1.to(dtype), x2.to(dtype)


@triton.jit
def _value_scales(v1, v2, TOP: tl.constexpr, CARRY: tl.constexpr, INF: tl.constexpr):
    """Return per row the power of two that brings its largest value into e4m3, and the one that undoes it."""
    largest = tl.maximum(v1.to(tl.int32, bitcast=True) & 0x7FFFFFFF, v2.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, axis=1)
    exponent = tl.minimum(TOP + 254 - ((bits + CARRY) >> 23), 253)
    nan = 0x7FC00000
    up = tl.where(bits < INF, exponent << 23, nan)
    down = tl.where(bits < INF, (254 - exponent) << 23, nan)
    return up.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True)


@triton.jit
def _paged_append_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pages_ptr, v_pages_ptr, v_scales_ptr, slots_ptr,
                         y_ptr, N, H, K, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
                         EPS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
                         FP8: tl.constexpr, KEY_SCALE: tl.constexpr, TOP: tl.constexpr, CARRY: tl.constexpr,
                         INF: tl.constexpr):
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
        v1, v2 = tl.load(v, mask=kept, other=0.0), tl.load(v + D // 2, mask=kept, other=0.0)
        if FP8:
            v1, v2 = v1.to(tl.float32), v2.to(tl.float32)
            up, down = _value_scales(v1, v2, TOP, CARRY, INF)
            tl.store(v_scales_ptr + slots * K + own, down, mask=(rows < N) & (slots >= 0))
            v1, v2 = v1 * up[:, None], v2 * up[:, None]
        v1, v2 = _page_cells(v1, v2, v_pages_ptr.dtype.element_ty, FP8)
        tl.store(out, v1, mask=kept)
        tl.store(out + D // 2, v2, mask=kept)
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
        y1, y2 = z1.to(y_ptr.dtype.element_ty), z2.to(y_ptr.dtype.element_ty)
        if head < H:
            out = y_ptr + (rows * H + head)[:, None] * D + cols
            tl.store(out, y1, mask=mask)
            tl.store(out + D // 2, y2, mask=mask)
        else:
            cell = k_pages_ptr + (slots * K + head - H)[:, None] * D + cols
            if FP8:
                z1, z2 = z1 * KEY_SCALE, z2 * KEY_SCALE
            else:  # rounded to the compute dtype first, like the k that training attends with
                z1, z2 = y1.to(tl.float32), y2.to(tl.float32)
            k1, k2 = _page_cells(z1, z2, k_pages_ptr.dtype.element_ty, FP8)
            tl.store(cell, k1, mask=kept)
            tl.store(cell + D // 2, k2, mask=kept)


def _fake(q, k, v, cos, sin, k_pages, v_pages, slots, v_scales) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@custom_op("paged_append", fake=_fake, mutates=("k_pages", "v_pages", "v_scales"))
def _paged_append(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                  k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor,
                  v_scales: torch.Tensor | None) -> torch.Tensor:
    (N, H, D), K = q.shape, k.size(1)
    y = _fake(q, k, v, cos, sin, k_pages, v_pages, slots, v_scales)
    tile = pick_tile(TILES, q.device)
    _paged_append_kernel[(triton.cdiv(N, tile["TOKENS"]), H + 2 * K)](
        q, k, v, cos, sin, k_pages, v_pages, v_scales, slots, y, N, H, K, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], EPS=RMS_NORM_EPS, D=D, HALF=triton.next_power_of_2(D // 2), FP8=v_scales is not None,
        KEY_SCALE=key_scale(D), TOP=TOP_EXPONENT, CARRY=UP_TO_1_75, INF=INFINITY, **tile)
    return y


@register("paged_append", "triton", needs=("triton",), rank=40, dtypes=(torch.float32, torch.bfloat16, torch.float16),
          check=lambda shapes: None if shapes["head_dim"] <= MAX_D
          else f"head_dim must be at most {MAX_D}, got {shapes['head_dim']}")
def paged_append_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                        k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor,
                        v_scales: torch.Tensor | None = None) -> torch.Tensor:
    """Our kernel, one launch; the pages must be contiguous, the rest may have any strides. fp8 needs sm89."""
    rule = None
    if q.size(-1) > MAX_D:
        rule = f"D must be at most {MAX_D}, got {q.size(-1)}"
    elif not all(pages is None or pages.is_contiguous() for pages in (k_pages, v_pages, v_scales)):
        rule = f"pages must be contiguous, got strides {k_pages.stride()} and {v_pages.stride()}"
    if rule:
        raise KernelError(f"paged_append[triton]: {rule} (q is {tuple(q.shape)}, {q.dtype})")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _paged_append(q, k, v, cos.contiguous(), sin.contiguous(), k_pages, v_pages, slots.contiguous(),
                         v_scales)


def _inputs(case, dtype, device, generator) -> dict:
    N, H, K, D, P, pages = (case[name] for name in ("N", "H", "K", "D", "P", "pages"))
    q, k, v = (torch.randn(N, heads, D, generator=generator).to(device, dtype) for heads in (H, K, K))
    cos, sin = rotary_table(N, D, device=device)
    slots = torch.randperm(pages * P, generator=generator)[:N]
    slots[:: case["skip_every"]] = -1
    k_pages, v_pages = (torch.randn(pages, P, K, D, generator=generator).to(device, dtype) for _ in range(2))
    v_scales = None
    if case.get("fp8"):
        k_pages, v_pages = ((32 * x).to(torch.float8_e4m3fn).view(torch.uint8) for x in (k_pages, v_pages))
        v_scales = torch.rand(pages, P, K, generator=generator).to(device)
        v[1], v[2, 0, 0], v[2, -1, 0] = 0, 7.9, 7  # nothing; above and just at the largest mantissa of e4m3
    return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_pages": k_pages, "v_pages": v_pages,
            "slots": slots.to(device), "v_scales": v_scales}


OP = declare(Op(
    "paged_append",
    cases={"tiny": dict(N=9, H=2, K=2, D=64, P=16, pages=3, skip_every=4),
           "odd_D10": dict(N=6, H=3, K=1, D=10, P=16, pages=2, skip_every=3),
           "odd_gqa": dict(N=1, H=4, K=1, D=64, P=16, pages=1, skip_every=7),
           "odd_fp8": dict(N=9, H=2, K=2, D=16, P=16, pages=3, skip_every=4, fp8=True),
           "d20_decode_b64": dict(N=64, H=10, K=10, D=128, P=256, pages=512, skip_every=65),
           "d20_fp8_b64": dict(N=64, H=10, K=10, D=128, P=256, pages=512, skip_every=65, fp8=True)},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: 2 * c["N"] * (c["H"] + 2 * c["K"]) * c["D"] * itemsize,
    mutates=("k_pages", "v_pages", "v_scales"),
))
