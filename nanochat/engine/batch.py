"""From rows to the tensors of one step: their new tokens end to end, and how to draw the next ones."""

import math

import numpy as np
import torch

from kernels.sample import kept_logits
from nanochat.engine.request import Row
from nanochat.gpt import PagedBatch, PagedCache

# S rows, N new tokens in all, R draws


def build_batch(counts_of: dict[Row, int], page_size: int, device: torch.device) -> PagedBatch:
    """Lay out the next tokens of each row, as many as `counts_of` says; logits are wanted after the last of each."""
    rows, counts = list(counts_of), np.array(list(counts_of.values()))
    computed = np.array([row.computed for row in rows])
    ends = counts.cumsum()
    contexts = computed + counts
    width = -(-int(contexts.max()) // page_size)
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for table, row in zip(tables, rows, strict=True):
        held = row.pages[:width]
        table[: len(held)] = held
    owner = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(ends[-1]) + np.repeat(contexts - ends, counts)
    slots = tables[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
    tokens = [token for row, n in counts_of.items() for token in row.tokens[row.computed:row.computed + n]]

    def on_device(values, dtype=torch.int64):
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(device)

    return PagedBatch(on_device(tokens), on_device(positions), on_device(slots), on_device(tables, torch.int32),
                      on_device(np.concatenate(([0], ends)), torch.int32), on_device(contexts, torch.int32),
                      on_device(ends - 1))


def draw(logits: torch.Tensor, rows: list[Row], sample) -> tuple[list[int], list[float]]:
    """Draw one token per row from logits (R, V); return ids and log-probabilities."""
    seeds = _on_device([row.seed for row in rows], torch.int64, logits)
    positions = _on_device([len(row.tokens) for row in rows], torch.int64, logits)
    ids, logprobs = sample(logits, *_shaping(rows, logits), seeds, positions)
    return ids.tolist(), logprobs.tolist()


def likeliest(logits: torch.Tensor, rows: list[Row]) -> list[tuple[tuple[int, float], ...]]:
    """Return for each row of logits (R, V) the (id, log-probability) of as many tokens as its request asks for.

    Likeliest first, of the distribution drawn from; fewer where top-k, top-p or min-p keep fewer.
    """
    best: list[tuple] = [()] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.request.params.logprobs]
    if asking:
        some, wanted = [rows[i] for i in asking], [rows[i].request.params.logprobs for i in asking]
        logits = logits[asking]
        found = kept_logits(logits, *_shaping(some, logits)).log_softmax(dim=-1).topk(max(wanted), dim=-1)
        for i, n, ids, logprobs in zip(asking, wanted, found.indices.tolist(), found.values.tolist(), strict=True):
            best[i] = tuple(pair for pair in zip(ids[:n], logprobs[:n], strict=True) if pair[1] > -math.inf)
    return best


def _shaping(rows: list[Row], logits: torch.Tensor) -> list[torch.Tensor]:
    """Return temperature, top_k, top_p, min_p of the rows as `sample` takes them."""
    params = [row.request.params for row in rows]
    return [_on_device([p.temperature for p in params], torch.float32, logits),
            _on_device([p.top_k or 0 for p in params], torch.int64, logits),
            _on_device([p.top_p for p in params], torch.float32, logits),
            _on_device([p.min_p for p in params], torch.float32, logits)]


def _on_device(values: list, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device)


def copy_pages(cache: PagedCache, copies: list[tuple[int, int]]) -> None:
    """Copy whole pages (source, destination) in every layer."""
    if not copies:
        return
    device = cache.k[0].device
    source, destination = torch.tensor(copies, device=device).unbind(dim=1)
    for pages in (*cache.k, *cache.v):
        pages[destination] = pages[source]
