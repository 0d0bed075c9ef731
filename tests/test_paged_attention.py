"""Eager paged attention against one dense softmax per query, with everything that must not be read poisoned."""

import pytest
import torch

from kernels import paged_attention
from kernels.paged_attention import paged_attention_eager

H, K, D = 4, 2, 16


def one_query(q, k, v, window):
    """Attend q (H, D) over all of k, v (s, K, D), or the last window + 1 of them, in fp64."""
    k, v = (x[-window - 1:] if window >= 0 else x for x in (k.double(), v.double()))
    heads = [((k[:, h // (H // K)] @ q[h].double()) / D ** 0.5).softmax(0) @ v[:, h // (H // K)] for h in range(H)]
    return torch.stack(heads)


def paged(contexts, queries, page_size):
    """Random inputs whose unused pages, and rows behind each context, are NaN; and k, v per sequence."""
    need = [-(-c // page_size) for c in contexts]
    order = torch.randperm(sum(need) + 2).tolist()
    pages = [torch.full((len(order), page_size, K, D), float("nan")) for _ in "kv"]
    tables = torch.full((len(contexts), max(need)), order[-1], dtype=torch.int32)
    dense = []
    for s, context in enumerate(contexts):
        own, order = order[:need[s]], order[need[s]:]
        tables[s, : need[s]] = torch.tensor(own, dtype=torch.int32)
        kv = [torch.randn(context, K, D) for _ in "kv"]
        for store, x in zip(pages, kv, strict=True):
            for j in range(context):
                store[own[j // page_size], j % page_size] = x[j]
        dense.append(kv)
    bounds = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    return [torch.randn(sum(queries), H, D), *pages, tables, bounds, torch.tensor(contexts, dtype=torch.int32)], dense


@pytest.mark.parametrize("window", [-1, 0, 5, 100])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_query_sees_its_own_past_and_nothing_else(page_size, window):
    contexts = [1, 3, 4, 5, 15, 16, 17, 33, 20, 20]
    queries = [1, 1, 1, 3, 15, 1, 2, 1, 20, 3]
    args, dense = paged(contexts, queries, page_size)
    y = paged_attention_eager(*args, window=window)
    row = 0
    for (k, v), context, n in zip(dense, contexts, queries, strict=True):
        for position in range(context - n, context):
            want = one_query(args[0][row], k[: position + 1], v[: position + 1], window)
            assert torch.allclose(y[row].double(), want, atol=1e-6)
            row += 1


def test_the_size_of_chunks_does_not_matter(monkeypatch):
    contexts, queries = [7, 30, 12, 30, 1, 19, 8], [1, 1, 1, 2, 1, 1, 2]
    args, _ = paged(contexts, queries, 4)
    whole = paged_attention_eager(*args)
    for most in (1, 13 * K * D, 40 * K * D):
        monkeypatch.setitem(paged_attention.CHUNK_ELEMENTS, "cpu", most)
        assert torch.allclose(paged_attention_eager(*args), whole, atol=1e-6)


def test_chunks_hold_equal_query_counts_within_the_limit():
    counts, contexts = [1, 2, 1, 0, 1, 1, 2], [9, 4, 3, 5, 0, 4, 50]
    chunks = list(paged_attention._chunks(counts, contexts, 12))
    assert sorted(s for chunk in chunks for s in chunk) == [0, 1, 2, 5, 6]
    assert all(len({counts[s] for s in chunk}) == 1 for chunk in chunks)
    assert all(len(chunk) == 1 or len(chunk) * max(contexts[s] for s in chunk) <= 12 for chunk in chunks)
    assert [2, 5] in chunks


def test_rows_of_no_sequence_are_zero():
    args, _ = paged([5, 4], [1, 2], 4)
    args[0] = torch.cat((args[0], torch.randn(2, H, D)))
    args[5] = torch.tensor([5, 0], dtype=torch.int32)
    y = paged_attention_eager(*args)
    assert y[0].abs().sum() > 0 and not y[1:].any()
