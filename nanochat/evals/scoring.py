"""How likely a model finds given continuations: what in-context tasks and letters of multiple choice are judged by.

A row is a token sequence and the place where its scored continuation starts. Rows of a task begin alike - the choices
of a question share all of its context - and what they share is computed once: the sorted rows of a batch form a trie
whose every token is one token of a single ragged forward. Its keys and values lie in a paged cache with pages of one
token, so a row's block table is its path through the trie. A layer writes all keys before any query reads, hence a row
may read tokens that another row computes in the same forward. Without padding, lengths need not be alike.
Logits are computed at the scored positions only, in chunks: 8,192 tokens of 65,536 logits would take 2 GiB.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kernels.cross_entropy import softcapped_logits
from kernels.qk_norm_rope import rotary_table
from nanochat.gpt import GPT, PagedBatch, PagedCache

# S rows, T tokens of the longest, N tokens to compute, R scored positions, V vocab

# Computed in a forward. Their cache takes 0.8 GiB at d20 in bf16; on a CPU's core 2,048 tokens of d4 stay in its cache
# and are scored in half the time per token of 8,192.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
LOGITS = 1 << 26  # in a chunk: 256 MiB in fp32
CONTEXTS = 10  # of the longest row: nanochat's table of rotations ends there, and up to there it scores rows whole


@dataclass(frozen=True)
class Row:
    """A token sequence, 1-D of integers; ids[start:] is the continuation that is scored, 1 <= start < len(ids)."""

    ids: np.ndarray
    start: int


@dataclass(frozen=True)
class Score:
    """nats: mean loss per token of the continuation. greedy: whether greedy decoding would give just it."""

    nats: float
    greedy: bool


class Scorer(Protocol):
    """Scores rows of at most `max_len` tokens."""

    max_len: int

    def score(self, rows: Sequence[Row]) -> list[Score]: ...


class PagedScorer:
    """Scores with our model; rows that begin alike share what they share. The weights may change between calls.

    Rows may be longer than the context that the model was trained on, up to CONTEXTS times.
    """

    def __init__(self, model: GPT, batch_tokens: int | None = None):
        self.model, self.max_len = model, CONTEXTS * model.config.sequence_len
        self.rotary = rotary_table(self.max_len, model.config.head_dim, device=model.device)
        self._make_room(max(batch_tokens or BATCH_TOKENS[model.device.type], model.config.sequence_len))

    def score(self, rows: Sequence[Row]) -> list[Score]:
        longest = max((len(row.ids) for row in rows), default=0)
        if longest > self.batch_tokens:
            self._make_room(longest)
        return _score_in_batches(rows, tries(rows, self.batch_tokens), self._score_batch)

    def _make_room(self, tokens: int) -> None:
        """Take batches of `tokens` from here on. Ten contexts from the start would be 2 GiB of cache at d20."""
        self.batch_tokens = tokens
        self.cache = None  # given back first
        self.cache = PagedCache.allocate(self.model.config, tokens, 1, self.model.dtype, self.model.device)

    def _score_batch(self, rows: Sequence[Row]) -> list[Score]:
        hidden = self.model.hidden_paged(trie_batch(rows, self.model.device), self.cache, self.rotary)  # (R, C)
        head = self.model.lm_head.weight
        return _judge(rows, lambda chunk: softcapped_logits(hidden[chunk], head), head.size(0), head.device)


class DenseScorer:
    """Scores with any causal model, `logits`: (S, T) int64 -> (S, T, V); rows of similar length share a batch, padded
    on the right, where no earlier token sees it. Nothing is shared: the plain way, that PagedScorer has to agree with.
    """

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor], device: torch.device, max_len: int, pad_id: int,
                 batch_tokens: int | None = None):
        self.logits, self.device, self.max_len, self.pad_id = logits, device, max_len, pad_id
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device.type]

    def score(self, rows: Sequence[Row]) -> list[Score]:
        return _score_in_batches(rows, by_length(rows, self.batch_tokens), self._score_batch)

    def _score_batch(self, rows: Sequence[Row]) -> list[Score]:
        width = max(len(row.ids) for row in rows) - 1
        x = np.full((len(rows), width), self.pad_id, np.int64)
        for padded, row in zip(x, rows, strict=True):
            padded[: len(row.ids) - 1] = row.ids[:-1]
        logits = self.logits(torch.from_numpy(x).to(self.device)).flatten(0, 1)
        where = np.concatenate([np.arange(row.start - 1, len(row.ids) - 1) + i * width for i, row in enumerate(rows)])
        wanted = torch.from_numpy(where).to(self.device)
        return _judge(rows, lambda chunk: logits[wanted[chunk]].float(), logits.size(1), self.device)


@torch.inference_mode()
def _score_in_batches(rows: Sequence[Row], batches: Iterable[list[int]],
                      score_batch: Callable[[Sequence[Row]], list[Score]]) -> list[Score]:
    """Score the rows in batches of row numbers; return the scores in the order of the rows."""
    scores = {}
    for numbers in batches:
        scores |= zip(numbers, score_batch([rows[i] for i in numbers]), strict=True)
    return [scores[i] for i in range(len(rows))]


# --- batches --------------------------------------------------------------------------------------


def tries(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of all rows, sorted by their tokens so that neighbours share most, in groups that need at most
    `batch_tokens` tokens to be computed."""
    batch, tokens, before = [], 0, np.empty(0, np.int64)
    for i in sorted(range(len(rows)), key=lambda i: rows[i].ids.astype(">u4").tobytes()):
        known = rows[i].ids[:-1]
        new = len(known) - common_prefix(before, known)
        if tokens + new > batch_tokens:
            yield batch
            batch, tokens, new = [], 0, len(known)
        batch.append(i)
        tokens, before = tokens + new, known
    if batch:
        yield batch


def trie_batch(rows: Sequence[Row], device: torch.device) -> PagedBatch:
    """Lay out sorted rows so that each computes what the row before it does not have; logits are wanted where a scored
    token comes next. The last token of a row is not read."""
    before, path = np.empty(0, np.int64), np.empty(0, np.int64)  # of the row before, and where its tokens are computed
    tokens, positions, paths, counts, wanted, n = [], [], [], [], [], 0
    for row in rows:
        known = row.ids[:-1]
        shared = common_prefix(before, known)
        new = len(known) - shared
        path = np.concatenate((path[:shared], np.arange(n, n + new)))
        if new:  # else the row asks for what is computed already
            tokens.append(known[shared:])
            positions.append(np.arange(shared, len(known)))
            paths.append(path)
            counts.append(new)
        wanted.append(path[row.start - 1:])
        before, n = known, n + new
    tables = np.zeros((len(paths), max(map(len, paths))), np.int32)
    for table, own in zip(tables, paths, strict=True):
        table[: len(own)] = own

    def on_device(values, dtype=np.int64) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values).astype(dtype)).to(device)

    return PagedBatch(on_device(np.concatenate(tokens)), on_device(np.concatenate(positions)), on_device(np.arange(n)),
                      on_device(tables, np.int32), on_device(np.cumsum([0, *counts]), np.int32),
                      on_device([len(own) for own in paths], np.int32), on_device(np.concatenate(wanted)))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences have in common from their beginning."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def by_length(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Row numbers by length, grouped so that rows times longest stays within `batch_tokens` (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        if batches and (len(batches[-1]) + 1) * len(rows[i].ids) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# --- verdicts -------------------------------------------------------------------------------------


def _judge(rows: Sequence[Row], logits_of: Callable[[slice], torch.Tensor], vocab: int,
           device: torch.device) -> list[Score]:
    """Score rows from logits (n, V) fp32 at their scored positions, which `logits_of` gives for a slice of those."""
    targets = torch.from_numpy(np.concatenate([row.ids[row.start:] for row in rows]).astype(np.int64)).to(device)
    nats, greedy = [], []
    step = max(1, LOGITS // vocab)
    for first in range(0, len(targets), step):
        chunk = slice(first, first + step)
        logits, target = logits_of(chunk), targets[chunk]
        nats.append(logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0])
        greedy.append(logits.argmax(1) == target)
    nats, greedy = torch.cat(nats).double().cpu(), torch.cat(greedy).cpu()
    lengths = [len(row.ids) - row.start for row in rows]
    return [Score(n.mean().item(), bool(g.all())) for n, g in zip(nats.split(lengths), greedy.split(lengths),
                                                                   strict=True)]
