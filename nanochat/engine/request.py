"""What a caller asks of the engine, what it gets back, and the state of each sample on the way."""

import hashlib
import math
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Integral, Real

from nanochat.common import UserError
from nanochat.engine.tools import Transcript

MAX_SEED = 2**63 - 1
MIN_TEMPERATURE = 1e-4  # nearer to 0 the scaled logits leave fp32's range; draws are as good as greedy before
MAX_TEMPERATURE = 1e30  # fp32 ends soon after; draws are as good as uniform before
MAX_TOP_K = 2**31 - 1
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    max_tokens counts every token of the completion, forced ones included. temperature 0 is greedy. Of the rest top_k
    keeps the k likeliest (None all), top_p the fewest that reach that probability, min_p those with that share of the
    likeliest one's. Sample i of n draws from (seed, i, position) alone. A completion ends where its visible text has
    one of up to 4 `stop` strings of up to 256 characters, by a token of `stop_ids`, or by <|assistant_end|> or <|bos|>
    unless ignore_eos. logprobs, 0 to 20, asks for that many likeliest tokens at every place and for "token" events.
    Raises UserError for a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    n: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        for name in ("max_tokens", "top_k", "seed", "n", "logprobs"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name not in ("top_k", "logprobs")):
                raise UserError(f"{name} must be a whole number, got {value!r}")
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name} must be a number, got {getattr(self, name)!r:.80}")
        if self.max_tokens < 0:
            raise UserError(f"max_tokens must be at least 0, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UserError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if self.temperature > MAX_TEMPERATURE:
            raise UserError(f"temperature must be at most {MAX_TEMPERATURE}, got {self.temperature!r:.80}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, or None for all, got {self.top_k}")
        if self.top_k is not None and self.top_k > MAX_TOP_K:
            raise UserError(f"top_k must be at most 2^31 - 1, or None for all, got {self.top_k!r:.80}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p must be at least 0 and below 1, got {self.min_p}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.n < 1:
            raise UserError(f"n must be at least 1, got {self.n}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be from 0 to {MAX_LOGPROBS}, or None, got {self.logprobs}")
        if not isinstance(self.stop_ids, tuple | list) or not are_whole(self.stop_ids):
            raise UserError(f"stop_ids must be a tuple of whole numbers, got {self.stop_ids!r:.80}")
        if not isinstance(self.stop, tuple | list) or len(self.stop) > MAX_STOPS:
            raise UserError(f"stop must be a tuple of at most {MAX_STOPS} strings, got {self.stop!r:.80}")
        for stop in self.stop:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise UserError(f"a stop string must have 1 to {MAX_STOP_CHARS} characters, got {stop!r:.80}")


@dataclass(frozen=True)
class Times:
    """When things happened to a sample, in seconds of time.monotonic(); None for what never did."""

    queued: float | None = None
    started: float | None = None  # its request got its first pages
    first_token: float | None = None
    done: float | None = None


@dataclass(frozen=True)
class Completion:
    """One sample. ids, mask, logprobs and best run in parallel over the tokens after the prompt.

    The terminal token is not among ids; the tokens of a stop string are, its text is cut off. mask is 1 for sampled and
    0 for forced tokens; logprobs are those of the distribution drawn from, 0.0 for forced tokens; best holds for each
    sampled token the likeliest of that distribution as (id, logprob), as many as params.logprobs. text is what the
    reader sees: no special tokens, no tool spans.
    finish_reason: "stop" (by the token or string `stopped_by`), "length" (max_tokens), "context", "abort", "timeout",
    or "error" with the sentence in `error`. cached_tokens: of the prompt, not computed again.
    """

    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    tool_calls: list[tuple[str, str | None]]
    error: str | None = None
    stopped_by: int | str | None = None
    best: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    times: Times = Times()

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)


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
    drawn_at: int = -1  # where the newest draw stands or, while nobody has collected it, is going to stand
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    best: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    call: tuple[str, Future] | None = None  # the expression whose result it waits for
    finish_reason: str | None = None
    error: str | None = None
    stopped_by: int | str | None = None
    first_token: float | None = None
    done: float | None = None
    taken: int = 0  # events that a caller has had

    @property
    def is_prefill(self) -> bool:
        return self.computed < len(self.request.prompt)

    @property
    def length(self) -> int:
        """Return how many tokens it has, a drawn one that is not known yet included."""
        return len(self.tokens) + (self.drawn_at == len(self.tokens))

    @property
    def pending(self) -> int:
        """Return how many tokens are not computed yet; the next is drawn when none is left."""
        if len(self.tokens) < self.length == self.request.limit:
            return 0  # it ends with the token on its way
        return self.length - self.computed

    def accept(self, token: int, logprob: float, best: tuple[tuple[int, float], ...],
               terminals: frozenset[int]) -> str | None:
        """Append a sampled token, or end the row; return the expression when the token closes a call."""
        params = self.request.params
        if not math.isfinite(logprob):
            self.error = (f"logits must be finite, those at position {len(self.tokens) - 1} are not "
                          "(NaN or infinity in the weights or in a kernel)")
            return self.finish("error")
        self.first_token = self.first_token or time.monotonic()
        if token in params.stop_ids or (token in terminals and not params.ignore_eos):
            self.stopped_by = token
            return self.finish("stop")
        expression = self._append(token, logprob, best, 1)
        if self.transcript.stopped_by is not None:
            self.stopped_by = self.transcript.stopped_by
            return self.finish("stop")
        self.finish_if_full()
        return None if self.finish_reason else expression

    def answer(self, expression: str, result: str | None) -> None:
        """Note a call's result and append the tokens that are forced by it."""
        self.call = None
        for token in self.transcript.answer(expression, result)[:self.request.limit - len(self.tokens)]:
            self._append(token, 0.0, (), 0)
        self.finish_if_full()

    def finish_if_full(self) -> None:
        if len(self.tokens) >= self.request.limit:
            self.finish("length" if len(self.mask) >= self.request.params.max_tokens else "context")

    def finish(self, reason: str) -> None:
        if self.call:
            self.call[1].cancel()
        self.call, self.finish_reason, self.done = None, reason, time.monotonic()
        self.transcript.finish(reason)

    def completion(self) -> Completion:
        request = self.request
        times = Times(request.queued, request.started, self.first_token, self.done)
        return Completion(self.tokens[len(request.prompt):], self.mask, self.logprobs, self.finish_reason,
                          self.transcript.text, self.transcript.calls, self.error, self.stopped_by, self.best,
                          len(request.prompt), request.cached_tokens, times)

    def _append(self, token: int, logprob: float, best: tuple, mask: int) -> str | None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.best.append(best)
        self.mask.append(mask)
        details = () if self.request.params.logprobs is None else (token, logprob, best)
        return self.transcript.push(token, details)


@dataclass(eq=False)
class Request:
    """A prompt and its n samples. Sample 0 computes the prompt, the others start from its pages."""

    prompt: list[int]
    params: SamplingParams
    limit: int  # most tokens a row may have, prompt included
    queued: float  # time.monotonic()
    deadline: float = math.inf  # at which it is given up
    started: float | None = None  # when it got its first pages
    cached_tokens: int = 0  # of the prompt, found in known pages
    rows: list[Row] = field(default_factory=list)
    spawned: bool = False  # the other samples have started from the first one's pages

    @property
    def done(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    def completions(self) -> list[Completion]:
        return [row.completion() for row in self.rows]

    def take_events(self) -> list[tuple[int, tuple]]:
        """Return (sample, event) for all that happened since the last call; see Transcript for the events."""
        new = [(i, event) for i, row in enumerate(self.rows) for event in row.transcript.events[row.taken:]]
        for row in self.rows:
            row.taken = len(row.transcript.events)
        return new


def are_whole(ids: Iterable) -> bool:
    """Return whether all ids are integers, of Python or of numpy."""
    return all(issubclass(kind, Integral) for kind in set(map(type, ids)))


def row_seed(seed: int, sample: int) -> int:
    """Return sample i's own seed, 63 bits; neighbouring seeds and samples give unrelated ones."""
    digest = hashlib.blake2b(f"{seed} {sample}".encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
