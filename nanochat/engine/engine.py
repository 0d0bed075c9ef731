"""The engine: many requests of different lengths advance together, one ragged forward per step.

A step computes tokens that are known but not yet computed - one for a row that decodes, a few for a row that just got
tool output, a chunk of a prompt for a row that joins - and draws one more for every row with none left. Which rows, and
how many tokens of each, the scheduler decides; pages are shared between samples of a prompt and between prompts that
begin alike.

Random numbers depend on (seed, sample, position) alone. On CPU in fp32 a row's text is the same alone and in any
batch, chunked, preempted or started from cached pages, up to ties within rounding: matrix products of other heights
round differently in the last bit.
"""

import concurrent.futures
import math
import time
from collections.abc import Iterator, Mapping

import torch
from tqdm import tqdm

from nanochat.common import UserError
from nanochat.engine.pages import PagePool
from nanochat.engine.request import Completion, Request, Row, SamplingParams, are_whole, row_seed
from nanochat.engine.runner import Flight, Runner
from nanochat.engine.scheduler import Plan, Scheduler
from nanochat.engine.tools import Toolbox, Transcript
from nanochat.gpt import GPT, PagedCache
from nanochat.load import fill_model

STEP_TOKENS = 2048  # most tokens of a step: a long prompt is computed in chunks, beside rows that decode
TOOL_POLL_SECONDS = 0.02  # how long a step waits when all its rows wait for their tools


class Engine:
    """Generates with `model`, or with a copy of it cast once when its weights are not in its compute dtype.

    Call `sync_weights` after a change of the weights. One thread at a time may call the engine.
    tools: calculator, off, or python (what the calculator refuses runs in the sandbox). n_pages: pages of `page_size`
    tokens, by default enough for max_batch rows of the whole context. step_tokens: most tokens computed in a step, at
    least max_batch. prefix_cache: keep pages for prompts that begin alike. kv_dtype, graphs, compiled, batch_invariant:
    see Runner. overlap: launch a step before the draws of the one before are read, so that the host's work on them
    hides behind the device's; a row that ends is computed once too often.
    Raises UserError for a value outside its range.
    """

    def __init__(self, model: GPT, tokenizer, *, tools: str = "calculator", allow_weak_sandbox: bool = False,
                 page_size: int = 16, n_pages: int | None = None, max_batch: int = 64, step_tokens: int = STEP_TOKENS,
                 prefix_cache: bool = True, kv_dtype: str = "auto", graphs: bool | None = None,
                 compiled: bool = False, overlap: bool = False, batch_invariant: bool = False):
        for name, value in (("page_size", page_size), ("max_batch", max_batch), ("n_pages", n_pages),
                            ("step_tokens", step_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.source, self.model = model, inference_model(model)
        self.tokenizer, self.tools, self.max_batch = tokenizer, tools, max_batch
        self.toolbox = Toolbox(tools, allow_weak_sandbox)
        self.context = model.config.sequence_len
        self.weights_version = 0
        self.pool = PagePool(n_pages or max_batch * -(-self.context // page_size), page_size)
        self.runner = Runner(self.model, self.pool.total, page_size, max_batch, kv_dtype=kv_dtype, graphs=graphs,
                             compiled=compiled, batch_invariant=batch_invariant)
        self.overlap = overlap
        self._flight: Flight | None = None  # with overlap, the step whose draws nobody has yet
        self.terminals = frozenset((tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id))
        self.scheduler = Scheduler(self.pool, max_batch, max(step_tokens, max_batch), prefix_cache)
        self._counts = {"requests": 0, "tokens": 0, "steps": 0}
        self._seconds = 0.0

    @property
    def cache(self) -> PagedCache | None:
        return self.runner.cache

    @property
    def running(self) -> list[Row]:
        return self.scheduler.running

    @property
    def waiting(self) -> list[Row]:
        return list(self.scheduler.waiting)

    # --- for callers ---

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams],
                 progress: bool = False) -> list[list[Completion]]:
        """Continue every prompt; return n completions per prompt, in order. progress shows a bar on stderr.

        A prompt that cannot be served gives n completions that say so (finish_reason "error") and the others go on;
        UserError is raised when not one prompt can be served.
        """
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(params) != len(prompts):
            raise UserError(f"params must be one for all prompts or one for each, got {len(params)} "
                            f"for {len(prompts)} prompts")
        jobs, errors = [], []
        for prompt, wanted in zip(prompts, params, strict=True):
            try:
                jobs.append(self.submit(prompt, wanted))
            except UserError as error:
                jobs.append([Completion([], [], [], "error", "", [], str(error))] * wanted.n)
                errors.append(error)
        if errors and len(errors) == len(prompts):
            raise errors[0]
        requests = [job for job in jobs if isinstance(job, Request)]
        self._finish_all(requests, progress)
        return [job.completions() if isinstance(job, Request) else job for job in jobs]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[tuple]:
        """Continue one prompt; yield the events of its first sample. Raises UserError when that ends in an error."""
        request = self.submit(prompt, params)
        for i, event in self.events(request):
            if i == 0 and event == ("finish", "error"):
                raise UserError(request.rows[0].error)
            if i == 0:
                yield event

    def events(self, request: Request) -> Iterator[tuple[int, tuple]]:
        """Step until `request` is done, yielding (sample, event) as they come; the request is aborted on leaving.

        Events are ("text", str), ("tool", expression, result or None), ("finish", reason) at last, and where
        params.logprobs asks for them ("token", id, logprob, ((id, logprob) of the likeliest, ...)) before its text.
        """
        try:
            while True:
                yield from request.take_events()
                if request.done:
                    break
                self.step()
        finally:
            self.abort(request)

    def submit(self, prompt: list[int], params: SamplingParams, timeout: float = math.inf,
               strict: bool = False) -> Request:
        """Queue a request, to be given up `timeout` seconds from now.

        A completion ends at the context at the latest; strict refuses a request whose max_tokens may lead there.
        Raises UserError when its prompt or the pool can never let it run.
        """
        self._check(prompt, params, timeout, strict)
        now = time.monotonic()
        request = Request(list(prompt), params, min(len(prompt) + params.max_tokens, self.context), now, now + timeout)
        need = self._worst_case(request)
        if need > self.pool.total:
            raise UserError(f"a request of {request.limit} tokens needs {need} pages of {self.pool.page_size} tokens, "
                            f"the pool has {self.pool.total}")
        for sample in range(params.n):
            request.rows.append(Row(request, list(prompt), row_seed(params.seed, sample),
                                    Transcript(self.tokenizer, params.stop)))
        for row in request.rows:
            row.finish_if_full()  # no room for even one token
        if request.done:
            self._retire(request.rows)
        else:
            self.scheduler.waiting.append(request.rows[0])
        return request

    def abort(self, request: Request, reason: str = "abort") -> None:
        """End a request wherever it stands; its pages return at once. Does nothing to rows that are done."""
        rows = [row for row in request.rows if row.pages or not row.finish_reason]  # pages: a step was cut short
        if not rows:
            return
        for row in rows:
            if not row.finish_reason:
                row.finish(reason)
        self._retire(rows)

    def reset(self) -> None:
        """Abort everything and drop what was computed with the weights so far."""
        for row in (*self.running, *self.waiting):
            self.abort(row.request)
        self.pool.drop_prefixes()

    def sync_weights(self, weights: GPT | Mapping[str, torch.Tensor] | None = None) -> None:
        """Take over new weights, by default those of the model the engine was made with, and forget known prefixes.

        They are copied in place and in the compute dtype. Raises UserError while requests run, and for a tensor that is
        missing, unknown or of another shape; then nothing has changed.
        """
        self._must_be_idle("weights")
        weights = self.source if weights is None else weights
        if weights is not self.model:
            fill_model(self.model, weights.state_dict() if isinstance(weights, GPT) else weights, "given to the engine")
        self.pool.drop_prefixes()
        self.weights_version += 1

    def release_kv(self) -> None:
        """Give back the memory of all pages until `restore_kv`. Raises UserError while requests run."""
        self._must_be_idle("the KV memory")
        self.pool.drop_prefixes()
        self.runner.release_kv()

    def restore_kv(self) -> None:
        """Take memory for all pages, unless they have it. Raises UserError when there is too little."""
        self.runner.restore_kv()

    def step(self) -> None:
        """Compute up to step_tokens known tokens and draw the next one of every row that has none left."""
        start = time.perf_counter()
        now = time.monotonic()
        for request in {row.request for row in (*self.running, *self.waiting) if now >= row.request.deadline}:
            self.abort(request, "timeout")
        calls = self._answer_calls()
        with torch.inference_mode():
            plan = self.scheduler.plan()
            flight = self._launch(plan) if plan.counts else None
            landing, self._flight = (self._flight, flight) if self.overlap else (flight, None)
            if landing:
                self._land(landing)
            elif flight:
                pass
            elif calls:
                concurrent.futures.wait(calls, TOOL_POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            elif self.waiting:
                raise RuntimeError("a request does not fit an idle pool")  # submit refuses those, so pages leaked
        self._seconds += time.perf_counter() - start

    def stats(self) -> dict:
        """Return totals since the engine was made. seconds is time spent in steps, tokens those of completions."""
        per_s = {f"{name}_per_s": self._counts[name] / self._seconds if self._seconds else 0.0
                 for name in ("requests", "tokens")}
        return {**self._counts, "seconds": self._seconds, **per_s, "page_size": self.pool.page_size,
                "pages_total": self.pool.total, "pages_peak": self.pool.peak,
                "cached_tokens": self.scheduler.cached_tokens, "preemptions": self.scheduler.preemptions}

    def check(self) -> None:
        """Raise RuntimeError when a page is lost: free + cached + live == total, and every live page has a row."""
        self.pool.check()
        held = {page for row in (*self.running, *self.waiting) for page in row.pages}
        if len(held) != self.pool.live:
            raise RuntimeError(f"rows hold {len(held)} pages, the pool counts {self.pool.live} live")

    # --- inside a step ---

    def _launch(self, plan: Plan) -> Flight:
        """Start computing a step in which every row with no token left draws its next one."""
        drawing, source = [], []
        for i, (row, n) in enumerate(plan.counts.items()):
            samples = self._samples_of(row) if n == row.pending else []
            drawing += samples
            source += [i] * len(samples)
        flight = self.runner.launch(plan.counts, list(plan.copies.values()), drawing, source)
        self._counts["steps"] += 1
        for row, n in plan.counts.items():
            self.scheduler.computed(row, n)
        born = [row for row in drawing if row not in plan.counts]
        for row in born:
            self.scheduler.spawn(row.request.rows[0], row)
        self.scheduler.waiting.extendleft(reversed(born))
        for row, position in zip(drawing, flight.positions, strict=True):
            row.request.spawned, row.drawn_at = True, position
        return flight

    def _land(self, flight: Flight) -> None:
        """Give every row of a step what it drew, and let go of those that end.

        A row that ended meanwhile, or was answered by its tool, drew in vain.
        """
        landed = []
        for row, position, *token in flight.collect():
            if row.finish_reason or position != len(row.tokens) or row.drawn_at < position:
                continue
            landed.append(row)
            expression = row.accept(*token, self.terminals)
            if expression is not None and self.tools != "off":
                self._call(row, expression)
        self._retire([row for row in landed if row.finish_reason])

    def _call(self, row: Row, expression: str) -> None:
        """Ask the tool; a row whose answer takes time waits for it while the others go on."""
        result = self.toolbox.call(expression)
        if isinstance(result, concurrent.futures.Future):
            row.call = (expression, result)
            row.drawn_at, row.computed = -1, min(row.computed, len(row.tokens) - 1)  # it draws when it has the answer
        else:
            row.answer(expression, result)

    def _answer_calls(self) -> list[concurrent.futures.Future]:
        """Give their results to the rows whose tools are done; return the calls that are still out."""
        out = []
        for row in [row for row in (*self.running, *self.waiting) if row.call]:
            expression, future = row.call
            if not future.done():
                out.append(future)
            elif failure := future.exception():
                row.error = f"a program of the model could not be run: {failure}"
                row.finish("error")
            else:
                row.answer(expression, future.result())
        self._retire([row for row in self.running + self.waiting if row.finish_reason])
        return out

    def _samples_of(self, row: Row) -> list[Row]:
        """Return the row, and after its prompt the request's other samples, which go on from its pages."""
        request = row.request
        return [row] if request.spawned or row is not request.rows[0] else request.rows

    def _worst_case(self, request: Request) -> int:
        """Return the pages of one sample at its longest; its last token is never computed."""
        return self.pool.pages_for(request.limit - 1)

    def _retire(self, rows: list[Row]) -> None:
        if not rows:
            return
        self.scheduler.drop(set(rows))
        self._counts["tokens"] += sum(len(row.mask) for row in rows)
        self._counts["requests"] += len({row.request for row in rows if row.request.done})

    def _must_be_idle(self, what: str) -> None:
        if n := len(self.running) + len(self.waiting):
            raise UserError(f"{what} can change only while no request runs, {n} rows do")

    def _check(self, prompt: list[int], params: SamplingParams, timeout: float, strict: bool) -> None:
        vocab = self.model.config.vocab_size
        if self.cache is None:
            raise UserError("the KV memory is given back; call restore_kv first")
        if not timeout > 0:
            raise UserError(f"a timeout must be above 0 seconds, got {timeout}")
        if not prompt:
            raise UserError("a prompt must have at least 1 token, got 0")
        if len(prompt) > self.context:
            raise UserError(f"a prompt must fit the context of {self.context} tokens, got {len(prompt)}")
        if not are_whole(prompt):
            raise UserError(f"prompt tokens must be whole numbers, got {prompt!r:.80}")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(f"prompt tokens must be ids from 0 to {vocab - 1}, got {min(prompt)} to {max(prompt)}")
        if any(not 0 <= token < vocab for token in params.stop_ids):
            raise UserError(f"stop_ids must be ids from 0 to {vocab - 1}, got {params.stop_ids}")
        if strict and len(prompt) + params.max_tokens > self.context:
            raise UserError(f"prompt and max_tokens must fit the context of {self.context} tokens, got "
                            f"{len(prompt)} and {params.max_tokens}")

    def _finish_all(self, requests: list[Request], progress: bool) -> None:
        rows = [row for request in requests for row in request.rows]
        try:
            with tqdm(total=len(rows), desc="generate", unit="row", disable=None if progress else True) as bar:
                while unfinished := sum(not row.finish_reason for row in rows):
                    bar.update(len(rows) - unfinished - bar.n)
                    self.step()
                bar.update(len(rows) - bar.n)
        finally:
            for request in requests:
                self.abort(request)


def inference_model(model: GPT) -> GPT:
    """Return the model if its weights are in the compute dtype, else a copy cast to it that never runs in fp8."""
    if not isinstance(model, GPT) or all(p.dtype == model.dtype for p in model.parameters()):
        return model
    copy = type(model).build(model.config, model.kernels, model.dtype, model.device).cast_weights().eval()
    copy.load_state_dict(model.state_dict())
    for layer in copy.fp8_layers:
        layer.fp8 = False
    return copy
