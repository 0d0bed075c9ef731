"""Attention of ragged queries over paged keys and values: decode, chunked prefill and prefix hits in one op.

Sequence s owns query rows cu_seqlens_q[s] .. cu_seqlens_q[s+1] and context_lens[s] keys, the new ones included and
already appended. Its queries are the last of its context, so query i stands at position context - n_queries + i and
sees keys up to itself; a window w >= 0 keeps the last w + 1 of them. Key j lies in page block_tables[s, j // P].
q comes rotated and normalized from paged_append.

Built for CUDA graphs: grids follow from tensor shapes, lengths are read on the device only. A program takes a block
of queries with all heads of one kv head and walks its keys; where that gives too few programs for the GPU, the keys are
cut in splits whose number the device chooses by the context, and a second kernel merges the partial results by their
log-sum-exp. One query of one head is a product of a matrix with a vector, without tensor cores: 1 FLOP per byte read.
Numerics: scores, softmax and merge in fp32, in powers of two. Sources: vLLM's unified attention and SGLang's split
decode (ideas, serving notes of 2025 and 2026), FlashAttention-2.
Limits: D a power of two from 16 to 256, at most 64 heads per kv head, q, k, v of one dtype.
"""

from collections.abc import Iterator

import torch

from kernels.device import pick_tile, sm_count, tl, triton
from kernels.qk_norm_rope import key_scale
from kernels.registry import KernelError, Op, custom_op, declare, register

# S sequences, N query rows in all, n query rows per sequence, H query heads, K kv heads, D head dim, P page size
# L longest context

# Gathered keys per chunk. 2^19 elements are 2 MiB of fp32, one core's L2: 64 decode rows of up to 250 keys took 5 ms
# in chunks of 8 rows against 10 ms at once, one core. A GPU gains nothing from small chunks; there it bounds memory.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


@register("paged_attention", "eager")
def paged_attention_eager(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_tables: torch.Tensor,
                          cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, window: int = -1,
                          v_scales: torch.Tensor | None = None, alone: bool = False) -> torch.Tensor:
    """Attend q (N, H, D) over pages (n, P, K, D) -> (N, H, D).

    block_tables (S, max_pages), cu_seqlens_q (S + 1,), context_lens (S,) are integers. A row of no sequence is 0.
    With v_scales (n, P, K) fp32 the pages are uint8, codes of e4m3 as paged_append writes them. alone: no sequence is
    computed with another, so that the last bits do not depend on which there are. Nothing outside a sequence's own
    context is read, so stale pages may hold NaN.
    """
    y = torch.zeros_like(q)
    starts, counts = cu_seqlens_q[:-1].tolist(), cu_seqlens_q.diff().tolist()
    most = 0 if alone else CHUNK_ELEMENTS[q.device.type] // (k_pages.size(2) * k_pages.size(3))
    for chunk in _chunks(counts, context_lens.tolist(), most):
        n = counts[chunk[0]]
        first = torch.tensor([starts[s] for s in chunk], device=q.device)
        rows = first[:, None] + torch.arange(n, device=q.device)  # (S, n)
        sequences = torch.tensor(chunk, device=q.device)
        contexts = context_lens[sequences].long()
        index = _key_index(block_tables[sequences].long(), contexts, k_pages)
        k, v = (pages.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, -1)
                for pages in (k_pages, v_pages))
        if v_scales is None:
            k, v = k.to(q.dtype), v.to(q.dtype)
        else:
            k, v = (x.view(torch.float8_e4m3fn).to(q.dtype) for x in (k, v))
            k, v = k / key_scale(q.size(2)), v * v_scales.flatten()[index][..., None].to(q.dtype)
        y[rows] = _attend(q[rows], k, v, contexts, window)
    return y


def _chunks(counts: list[int], contexts: list[int], most: int) -> Iterator[list[int]]:
    """Yield lists of sequences with equally many queries whose padded contexts add up to at most `most` keys."""
    chunk = []
    for s in sorted((s for s, n in enumerate(counts) if n and contexts[s]), key=lambda s: (counts[s], contexts[s])):
        if chunk and (counts[s] != counts[chunk[0]] or (len(chunk) + 1) * contexts[s] > most):
            yield chunk
            chunk = []
        chunk.append(s)
    if chunk:
        yield chunk


def _key_index(block_tables: torch.Tensor, contexts: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Return where in pages.flatten(0, 2) the keys of each sequence and head lie, (S, K, L).

    Columns past a sequence's context repeat its first key: they are masked, and 0 times a stale NaN would be NaN.
    """
    P, K = pages.size(1), pages.size(2)
    position = torch.arange(int(contexts.max()), device=pages.device)
    slots = block_tables[:, position // P] * P + position % P  # (S, L)
    slots = torch.where(position < contexts[:, None], slots, slots[:, :1])
    return slots[:, None, :] * K + torch.arange(K, device=pages.device)[:, None]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, contexts: torch.Tensor, window: int) -> torch.Tensor:
    """Attend q (S, n, H, D), the last n positions of each context, over k, v (S, K, L, D) -> (S, n, H, D)."""
    (S, n, H, D), (K, L) = q.shape, k.shape[1:3]
    q = q.view(S, n, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(S, K, -1, D)
    scores = (q @ k.transpose(-1, -2) * D ** -0.5).view(S, K, H // K, n, L)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    query = contexts[:, None] - n + torch.arange(n, device=q.device)  # positions, (S, n)
    distance = query[:, :, None] - torch.arange(L, device=q.device)
    hidden = (distance < 0) | (distance > window) if window >= 0 else distance < 0
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(dim=-1).to(v.dtype)
    y = weights.view(S, K, -1, L) @ v
    return y.view(S, K, H // K, n, D).permute(0, 3, 1, 2, 4).reshape(S, n, H, D)


# --- Triton ---------------------------------------------------------------------------------------

# keyed (sm, kind): "vector" is one query of one head, "packed" one query of a group of heads, "block" many queries.
# Not tuned on a GPU yet.
TILES = {
    (0, "vector"): dict(BLOCK_M=1, BLOCK_N=8, num_warps=1, num_stages=1),
    (0, "packed"): dict(BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=1),
    (0, "block"): dict(BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=1),
    (80, "vector"): dict(BLOCK_M=1, BLOCK_N=32, num_warps=4, num_stages=2),
    (80, "packed"): dict(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),
    (80, "block"): dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
    (90, "vector"): dict(BLOCK_M=1, BLOCK_N=64, num_warps=4, num_stages=2),
    (90, "block"): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
}
MAX_SPLITS = 32
KEYS_PER_SPLIT = 256  # fewer keys per split and the merge costs more than the split saves (SGLang PR 35801)
LOG2_E = 1.4426950408889634


@triton.jit
def _sequence_of(block, cu_ptr, S, BLOCK_Q: tl.constexpr, STEPS: tl.constexpr):
    """Return the sequence of query block `block`. Sequence s owns the blocks from cu[s] // BLOCK_Q + s on, enough
    for all its queries and one too many for some; blocks of one query need no such slack."""
    low, high = 0, S
    for _ in range(STEPS):
        middle = (low + high) // 2
        slack = 0 if BLOCK_Q == 1 else middle
        before = tl.load(cu_ptr + middle) // BLOCK_Q + slack <= block
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before | (low > high), high, middle)
    return low - 1


@triton.jit
def _n_splits(context, SPLITS: tl.constexpr, KEYS: tl.constexpr):
    return tl.minimum(SPLITS, tl.cdiv(context, KEYS))


@triton.jit
def _products(a, b, DOT: tl.constexpr):
    """Return a (M, X) times b (N, X) transposed, in fp32."""
    if DOT:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        return tl.sum(a[:, None, :].to(tl.float32) * b[None, :, :].to(tl.float32), axis=2)


@triton.jit
def _weighted(p, v, DOT: tl.constexpr):
    """Return p (M, N) times v (N, D) in fp32."""
    if DOT:
        return tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        return tl.sum(p[:, :, None] * v[None, :, :].to(tl.float32), axis=1)


@triton.jit
def _paged_attention_kernel(q_ptr, k_ptr, v_ptr, v_scales_ptr, tables_ptr, cu_ptr, contexts_ptr, y_ptr, part_ptr,
                            lse_ptr, S, max_pages, stride_qn, scale, WINDOW: tl.constexpr, H: tl.constexpr,
                            K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr,
                            KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            STEPS: tl.constexpr, DOT: tl.constexpr, FP8: tl.constexpr):
    GROUP: tl.constexpr = H // K
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s = _sequence_of(block, cu_ptr, S, BLOCK_Q, STEPS)
    start = tl.load(cu_ptr + s)
    n_queries = tl.load(cu_ptr + s + 1) - start
    slack = 0 if BLOCK_Q == 1 else s
    first = (block - start // BLOCK_Q - slack) * BLOCK_Q  # the first query of this block within its sequence
    if first >= n_queries:
        return
    context = tl.load(contexts_ptr + s)
    n_splits = _n_splits(context, SPLITS, KEYS)
    if split >= n_splits:
        return

    m = tl.arange(0, BLOCK_M)
    query, head = first + m // GROUP, kv_head * GROUP + m % GROUP
    real = (m < BLOCK_Q * GROUP) & (query < n_queries)
    row = (start + query).to(tl.int64)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * stride_qn + head[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    position = context - n_queries + query  # of each query in its sequence

    # keys that some query of the block sees, then this split's share of them
    last = tl.minimum(context, context - n_queries + first + BLOCK_Q)
    lowest = tl.maximum(0, context - n_queries + first - WINDOW) if WINDOW >= 0 else 0
    share = tl.cdiv(tl.cdiv(last - lowest, n_splits), BLOCK_N) * BLOCK_N
    lowest += split * share
    last = tl.minimum(last, lowest + share)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for at in range(lowest, last, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        page = tl.load(tables_ptr + s.to(tl.int64) * max_pages + key // P, mask=key < last, other=0).to(tl.int64)
        head_cell = (page * P + key % P) * K + kv_head
        cell = head_cell[:, None] * D + d[None, :]
        k = tl.load(k_ptr + cell, mask=(key < last)[:, None], other=0)
        v = tl.load(v_ptr + cell, mask=(key < last)[:, None], other=0)
        if FP8:
            k = k.to(tl.float8e4nv, bitcast=True).to(q.dtype)
            v = v.to(tl.float8e4nv, bitcast=True).to(q.dtype)
        distance = position[:, None] - key[None, :]
        seen = (distance >= 0) & (key < last)[None, :]
        if WINDOW >= 0:
            seen &= distance <= WINDOW
        scores = tl.where(seen, _products(q, k, DOT) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: -inf minus -inf is NaN
        p = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, axis=1)
        if FP8:  # a weight takes its value's scale along; the sum above is without
            p *= tl.load(v_scales_ptr + head_cell, mask=key < last, other=0.0)[None, :]
        acc = acc * rescale[:, None] + _weighted(p, v, DOT)
        top = new_top
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS == 1:
        out = y_ptr + (row * H + head)[:, None] * D + d[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=real[:, None])
    else:
        part = (row * H + head) * SPLITS + split
        tl.store(part_ptr + part[:, None] * D + d[None, :], y, mask=real[:, None])
        tl.store(lse_ptr + part, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=real)


@triton.jit
def _merge_splits_kernel(part_ptr, lse_ptr, cu_ptr, contexts_ptr, y_ptr, S, H: tl.constexpr, D: tl.constexpr,
                         SPLITS: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = _sequence_of(row, cu_ptr, S, 1, STEPS)
    owned = row < tl.load(cu_ptr + S)
    n_splits = tl.where(owned, _n_splits(tl.load(contexts_ptr + s), SPLITS, KEYS), 0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, D)
    at = (row * H + head) * SPLITS + split
    lse = tl.load(lse_ptr + at, mask=split < n_splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=(split < n_splits)[:, None], other=0.0)
    total = tl.sum(weight, axis=0)
    y = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y_ptr + (row * H + head) * D + d, y.to(y_ptr.dtype.element_ty))


def _fake(q, k_pages, v_pages, block_tables, cu_seqlens_q, context_lens, window, v_scales) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@custom_op("paged_attention", fake=_fake)
def _paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_tables: torch.Tensor,
                     cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, window: int,
                     v_scales: torch.Tensor | None) -> torch.Tensor:
    (N, H, D), S, (P, K) = q.shape, context_lens.size(0), k_pages.shape[1:3]
    group = H // K
    kind = "block" if N != S else "packed" if group > 1 else "vector"
    tile = dict(pick_tile(TILES, q.device, kind))
    tile["BLOCK_M"] = max(tile["BLOCK_M"], triton.next_power_of_2(group))
    block_q = tile["BLOCK_M"] // group if kind == "block" else 1
    blocks = N // block_q + (0 if block_q == 1 else S)
    # As many splits as give every multiprocessor two programs: known from shapes, the device uses fewer.
    splits = min(MAX_SPLITS, triton.next_power_of_2(max(1, 2 * sm_count(q.device) // (blocks * K))))
    y = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # rows of no sequence stay 0
    parts = torch.empty((N, H, splits, D) if splits > 1 else (0,), dtype=torch.float32, device=q.device)
    lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=q.device)
    own = dict(H=H, D=D, SPLITS=splits, KEYS=KEYS_PER_SPLIT, STEPS=S.bit_length())
    fp8 = v_scales is not None
    scale = D ** -0.5 * LOG2_E / (key_scale(D) if fp8 else 1)
    _paged_attention_kernel[(blocks, K, splits)](
        q, k_pages, v_pages, v_scales, block_tables, cu_seqlens_q, context_lens, y, parts, lse, S, block_tables.size(1),
        q.stride(0), scale, WINDOW=window, K=K, P=P, BLOCK_Q=block_q, DOT=kind != "vector", FP8=fp8, **own, **tile)
    if splits > 1:
        _merge_splits_kernel[(N, H)](parts, lse, cu_seqlens_q, context_lens, y, S, num_warps=4, **own)
    return y


def _rule(shapes) -> str | None:
    D, group = shapes["head_dim"], shapes["n_head"] // shapes["n_kv_head"]
    if D & (D - 1) or not 16 <= D <= 256:
        return f"head_dim must be a power of two from 16 to 256, got {D}"
    return None if group <= 64 else f"a kv head must serve at most 64 heads, got {group}"


@register("paged_attention", "triton", needs=("triton",), check=_rule, rank=40,
          dtypes=(torch.float32, torch.bfloat16, torch.float16))
def paged_attention_triton(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_tables: torch.Tensor,
                           cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, window: int = -1,
                           v_scales: torch.Tensor | None = None, alone: bool = False) -> torch.Tensor:
    """Our kernels; the pages must be contiguous and of q's dtype, or uint8 with v_scales; fp8 needs sm89.

    Sequences of one query never meet, and calls of one shape cut their keys alike: `alone` asks for nothing more.
    """
    reason = _rule({"head_dim": q.size(2), "n_head": q.size(1), "n_kv_head": k_pages.size(2)})
    if reason is None and not all(x is None or x.is_contiguous() for x in (k_pages, v_pages, v_scales)):
        reason = f"pages must be contiguous, got strides {k_pages.stride()} and {v_pages.stride()}"
    dtype = q.dtype if v_scales is None else torch.uint8
    if reason is None and not k_pages.dtype == v_pages.dtype == dtype:
        reason = f"pages must be {dtype}, got {k_pages.dtype} and {v_pages.dtype}"
    if reason:
        raise KernelError(f"paged_attention[triton]: {reason} (q is {tuple(q.shape)}, {q.dtype})")
    q = q if q.stride()[1:] == (q.size(2), 1) else q.contiguous()
    block_tables, cu_seqlens_q, context_lens = (x.contiguous() for x in (block_tables, cu_seqlens_q, context_lens))
    return _paged_attention(q, k_pages, v_pages, block_tables, cu_seqlens_q, context_lens, window, v_scales)


def _inputs(case, dtype, device, generator) -> dict:
    H, K, D, P = (case[name] for name in "HKDP")
    contexts, queries = torch.tensor(case["contexts"]), torch.tensor(case["queries"])
    needed = [-(-c // P) for c in case["contexts"]]
    pages = torch.randperm(sum(needed) + 1, generator=generator)  # one page belongs to nobody
    block_tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    for row, own in zip(block_tables, pages[:-1].split(needed), strict=True):
        row[: len(own)] = own
    q = torch.randn(sum(case["queries"]) + case.get("padding", 0), H, D, generator=generator)
    k_pages, v_pages = (torch.randn(len(pages), P, K, D, generator=generator).to(device, dtype) for _ in range(2))
    v_scales = None
    if case.get("fp8"):
        codes = [(x * 32).to(torch.float8_e4m3fn).view(torch.uint8) for x in (k_pages, v_pages)]
        k_pages, v_pages = codes
        v_scales = (2.0 ** torch.randint(-9, 0, k_pages.shape[:3], generator=generator)).to(device)
    cu_seqlens_q = torch.cat((torch.zeros(1, dtype=torch.int64), queries.cumsum(0))).int()
    return {"q": q.to(device, dtype), "k_pages": k_pages, "v_pages": v_pages, "block_tables": block_tables.to(device),
            "cu_seqlens_q": cu_seqlens_q.to(device), "context_lens": contexts.int().to(device),
            "window": case.get("window", -1), "v_scales": v_scales}


OP = declare(Op(
    "paged_attention",
    cases={"tiny": dict(H=2, K=2, D=64, P=16, contexts=(5, 16, 17), queries=(1, 1, 1)),
           "odd_prefill_gqa": dict(H=4, K=2, D=64, P=16, contexts=(33, 7), queries=(20, 7)),
           "odd_window": dict(H=2, K=1, D=64, P=16, contexts=(40, 3), queries=(3, 1), window=9),
           "odd_splits_P24": dict(H=2, K=1, D=16, P=24, contexts=(700, 3, 300), queries=(1, 1, 1)),
           "odd_padding": dict(H=2, K=2, D=16, P=16, contexts=(300, 4), queries=(1, 2), padding=3),
           "odd_empty_rows": dict(H=1, K=1, D=16, P=16, contexts=(9, 20, 5), queries=(1, 2, 0)),
           "odd_gqa_decode": dict(H=6, K=2, D=16, P=16, contexts=(30, 3, 300), queries=(1, 1, 1)),
           "window_splits": dict(H=1, K=1, D=16, P=16, contexts=(600,), queries=(1,), window=40),
           "odd_fp8": dict(H=2, K=2, D=16, P=16, contexts=(5, 300), queries=(1, 1), fp8=True),
           "odd_fp8_prefill_gqa": dict(H=4, K=2, D=16, P=16, contexts=(33, 7), queries=(20, 7), fp8=True),
           "d20_fp8_b64": dict(H=10, K=10, D=128, P=256, contexts=(1024,) * 64, queries=(1,) * 64, fp8=True),
           "d20_fp8_gqa_b64": dict(H=10, K=2, D=128, P=256, contexts=(1024,) * 64, queries=(1,) * 64, fp8=True),
           "d20_fp8_prefill": dict(H=10, K=10, D=128, P=256, contexts=(1024,) * 4, queries=(512,) * 4, fp8=True),
           "d20_decode_b64": dict(H=10, K=10, D=128, P=256, contexts=(1024,) * 64, queries=(1,) * 64),
           "d20_decode_b1": dict(H=10, K=10, D=128, P=256, contexts=(2048,), queries=(1,)),
           "d20_gqa_b64": dict(H=10, K=2, D=128, P=256, contexts=(1024,) * 64, queries=(1,) * 64),
           "d20_prefill": dict(H=10, K=10, D=128, P=256, contexts=(1024,) * 4, queries=(512,) * 4)},
    make_inputs=_inputs,
    flops=lambda c: 4 * c["H"] * c["D"] * sum(n * q for n, q in zip(c["contexts"], c["queries"], strict=True)),
    bytes=lambda c, itemsize: sum(c["contexts"]) * c["K"] * (2 * c["D"] + 4 if c.get("fp8") else 2 * c["D"] * itemsize),
))
