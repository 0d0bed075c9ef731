"""Attention of ragged queries over paged keys and values: decode, chunked prefill and prefix hits in one op.

Sequence s owns query rows cu_seqlens_q[s] .. cu_seqlens_q[s+1] and context_lens[s] keys, the new ones included and
already appended. Its queries are the last of its context, so query i stands at position context - n_queries + i and
sees keys up to itself; a window w >= 0 keeps the last w + 1 of them. Key j lies in page block_tables[s, j // P].
q comes rotated and normalized from paged_append.
"""

import torch

from kernels.registry import Op, declare, register

# S sequences, N query rows in all, H query heads, K kv heads, D head dim, P page size


@register("paged_attention", "eager")
def paged_attention_eager(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_tables: torch.Tensor,
                          cu_seqlens_q: torch.Tensor, context_lens: torch.Tensor, window: int = -1) -> torch.Tensor:
    """Attend q (N, H, D) over pages (n, P, K, D) -> (N, H, D).

    block_tables (S, max_pages), cu_seqlens_q (S + 1,), context_lens (S,) are integers. A row of no sequence is 0.
    """
    y = torch.zeros_like(q)
    page_size = k_pages.size(1)
    bounds = cu_seqlens_q.tolist()
    for s, context in enumerate(context_lens.tolist()):
        queries = q[bounds[s]:bounds[s + 1]]
        if not len(queries) or not context:
            continue
        pages = block_tables[s, : -(-context // page_size)].long()
        keys, values = (p[pages].flatten(0, 1)[:context].to(q.dtype) for p in (k_pages, v_pages))
        y[bounds[s]:bounds[s + 1]] = _attend(queries, keys, values, window)
    return y


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attend the last rows' queries q (n, H, D) over one sequence's k, v (context, K, D)."""
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,shd->hqs", q, k) * q.size(-1) ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    position = torch.arange(len(k) - len(q), len(k), device=q.device)
    distance = position[:, None] - torch.arange(len(k), device=q.device)[None, :]
    hidden = (distance < 0) | (distance > window) if window >= 0 else distance < 0
    return torch.einsum("hqs,shd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(v.dtype), v)


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
