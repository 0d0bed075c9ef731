"""Attention of ragged queries over paged keys and values: decode, chunked prefill and prefix hits in one op.

Sequence s owns query rows cu_seqlens_q[s] .. cu_seqlens_q[s+1] and context_lens[s] keys, the new ones included and
already appended. Its queries are the last of its context, so query i stands at position context - n_queries + i and
sees keys up to itself; a window w >= 0 keeps the last w + 1 of them. Key j lies in page block_tables[s, j // P].
q comes rotated and normalized from paged_append.
"""

from collections.abc import Iterator

import torch

from kernels.registry import Op, declare, register

# S sequences, N query rows in all, n query rows per sequence, H query heads, K kv heads, D head dim, P page size
# L longest context

# Gathered keys per chunk. 2^19 elements are 2 MiB of fp32, one core's L2: 64 decode rows of up to 250 keys took 5 ms
# in chunks of 8 rows against 10 ms at once, one core. A GPU gains nothing from small chunks; there it bounds memory.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


@register("paged_attention", "eager")
def paged_attention_eager(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_tables: torch.Tensor,
                          cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, window: int = -1) -> torch.Tensor:
    """Attend q (N, H, D) over pages (n, P, K, D) -> (N, H, D).

    block_tables (S, max_pages), cu_seqlens_q (S + 1,), context_lens (S,) are integers. A row of no sequence is 0.
    Nothing outside a sequence's own context is read, so stale pages may hold NaN.
    """
    y = torch.zeros_like(q)
    starts, counts = cu_seqlens_q[:-1].tolist(), cu_seqlens_q.diff().tolist()
    most = CHUNK_ELEMENTS[q.device.type] // (k_pages.size(2) * k_pages.size(3))
    for chunk in _chunks(counts, context_lens.tolist(), most):
        n = counts[chunk[0]]
        first = torch.tensor([starts[s] for s in chunk], device=q.device)
        rows = first[:, None] + torch.arange(n, device=q.device)  # (S, n)
        sequences = torch.tensor(chunk, device=q.device)
        contexts = context_lens[sequences].long()
        index = _key_index(block_tables[sequences].long(), contexts, k_pages)
        k, v = (pages.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, -1).to(q.dtype)
                for pages in (k_pages, v_pages))
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


def _inputs(case, dtype, device, generator) -> dict:
    H, K, D, P = (case[name] for name in "HKDP")
    contexts, queries = torch.tensor(case["contexts"]), torch.tensor(case["queries"])
    needed = [-(-c // P) for c in case["contexts"]]
    pages = torch.randperm(sum(needed) + 1, generator=generator)  # one page belongs to nobody
    block_tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    for row, own in zip(block_tables, pages[:-1].split(needed), strict=True):
        row[: len(own)] = own
    q = torch.randn(int(queries.sum()), H, D, generator=generator)
    k_pages, v_pages = (torch.randn(len(pages), P, K, D, generator=generator).to(device, dtype) for _ in range(2))
    cu_seqlens_q = torch.cat((torch.zeros(1, dtype=torch.int64), queries.cumsum(0))).int()
    return {"q": q.to(device, dtype), "k_pages": k_pages, "v_pages": v_pages, "block_tables": block_tables.to(device),
            "cu_seqlens_q": cu_seqlens_q.to(device), "context_lens": contexts.int().to(device),
            "window": case.get("window", -1)}


OP = declare(Op(
    "paged_attention",
    cases={"tiny": dict(H=2, K=2, D=64, P=16, contexts=(5, 16, 17), queries=(1, 1, 1)),
           "odd_prefill_gqa": dict(H=4, K=2, D=64, P=16, contexts=(33, 7), queries=(20, 7)),
           "odd_window": dict(H=2, K=1, D=64, P=16, contexts=(40, 3), queries=(3, 1), window=9),
           "d20_decode_b64": dict(H=10, K=10, D=128, P=256, contexts=(1024,) * 64, queries=(1,) * 64),
           "d20_decode_b1": dict(H=10, K=10, D=128, P=256, contexts=(2048,), queries=(1,))},
    make_inputs=_inputs,
    flops=lambda c: 4 * c["H"] * c["D"] * sum(n * q for n, q in zip(c["contexts"], c["queries"], strict=True)),
    bytes=lambda c, itemsize: 2 * sum(c["contexts"]) * c["K"] * c["D"] * itemsize,
))
