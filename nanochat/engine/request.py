"""What a caller asks of the engine, what it gets back, and the state of each sample on the way."""

import hashlib
import math
from dataclasses import dataclass, field

from nanochat.common import UserError
from nanochat.engine.tools import Transcript

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    max_tokens counts every token of the completion, forced ones included. temperature 0 is greedy. Of the rest top_k
    keeps the k likeliest (None all), top_p the fewest that reach that probability, min_p those with that share of the
    likeliest one's. Sample i of n draws from (seed, i, position) alone. Raises UserError for a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    n: int = 1
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.max_tokens < 0:
            raise UserError(f"max_tokens must be at least 0, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, or None for all, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p must be at least 0 and below 1, got {self.min_p}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.n < 1:
            raise UserError(f"n must be at least 1, got {self.n}")


@dataclass(frozen=True)
class Completion:
    """One sample. ids, mask and logprobs run in parallel over the tokens after the prompt.

    The terminal token is not among ids. mask is 1 for sampled and 0 for forced tokens; logprobs are those of the
    distribution drawn from, 0.0 for forced tokens. text is what the reader sees: no special tokens, no tool spans.
    finish_reason: "stop" (by the terminal token `stopped_by`), "length" (max_tokens), "context", "abort", "timeout", or
    "error" with the sentence in `error`.
    """

    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    tool_calls: list[tuple[str, str | None]]
    error: str | None = None
    stopped_by: int | None = None


@dataclass(eq=False)
class Row:
    """One sample in the making. Keys and values of the first `computed` of its tokens are in `pages`."""

    request: "Request"
    tokens: list[int]  # prompt and completion
    seed: int
    transcript: Transcript
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)  # of its full pages, as prefixes
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    stopped_by: int | None = None

    @property
    def is_prefill(self) -> bool:
        return self.computed < len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Return how many tokens are not computed yet; the next is drawn when none is left."""
        return len(self.tokens) - self.computed

    def accept(self, token: int, logprob: float, terminals: frozenset[int]) -> None:
        """Append a sampled token and what the tool forces after it, or end the row."""
        if not math.isfinite(logprob):
            self.error = (f"logits must be finite, those at position {len(self.tokens) - 1} are not "
                          "(NaN or infinity in the weights or in a kernel)")
            return self.finish("error")
        if token in terminals:
            self.stopped_by = token
            return self.finish("stop")
        self._append(token, logprob, 1)
        forced = self.transcript.push(token)
        for token in forced[: self.request.limit - len(self.tokens)]:
            self._append(token, 0.0, 0)
            self.transcript.push(token)
        self.finish_if_full()

    def finish_if_full(self) -> None:
        if len(self.tokens) >= self.request.limit:
            self.finish("length" if len(self.mask) >= self.request.params.max_tokens else "context")

    def finish(self, reason: str) -> None:
        self.transcript.finish()
        self.finish_reason = reason

    def completion(self) -> Completion:
        return Completion(self.tokens[len(self.request.prompt):], self.mask, self.logprobs, self.finish_reason,
                          self.transcript.text, self.transcript.calls, self.error, self.stopped_by)

    def _append(self, token: int, logprob: float, mask: int) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.mask.append(mask)


@dataclass(eq=False)
class Request:
    """A prompt and its n samples. Sample 0 computes the prompt, the others start from its pages."""

    prompt: list[int]
    params: SamplingParams
    limit: int  # most tokens a row may have, prompt included
    deadline: float = math.inf  # time.monotonic() at which it is given up
    rows: list[Row] = field(default_factory=list)
    spawned: bool = False  # the other samples have started from the first one's pages

    @property
    def done(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    def completions(self) -> list[Completion]:
        return [row.completion() for row in self.rows]


def row_seed(seed: int, sample: int) -> int:
    """Return sample i's own seed, 63 bits; neighbouring seeds and samples give unrelated ones."""
    digest = hashlib.blake2b(f"{seed} {sample}".encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
