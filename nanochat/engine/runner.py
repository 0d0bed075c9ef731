"""The device's side of the engine: from n tokens of each row to a drawn token and its log-probability.

Steps in which every row computes one token and draws the next - decoding - run in buckets: 1, 2, 4, 8, 16, 24, ...
sequences, filled up with padding (slot -1, context 0). A bucket's tensors have fixed addresses, so on a GPU its whole
step is one CUDA graph: embedding to logits, softcap and sampling. Other steps run eagerly through the same function.
Nothing waits for the device but `Flight.collect`, once per step, and `n_best`, twice, where logprobs above 0 are asked.

batch_invariant computes every token as a sequence of its own, in forwards of 64 tokens always: each matrix product has
the same shape, attention sees one query at a time and cuts its keys by that query's position alone. A row's logits
then do not depend on what else runs, how it was chunked or whether it was preempted, to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels import Kernels
from kernels.device import sm
from kernels.sample import kept_logits
from nanochat.common import UserError
from nanochat.engine.request import Row
from nanochat.engine.staging import Span, Step, placed, upload
from nanochat.gpt import GPT, PagedBatch, PagedCache

# N new tokens of S sequences, R draws, V vocab

KV_DTYPES = ("auto", "fp8")
INVARIANT_TOKENS = 64  # of every forward with batch_invariant
CAPTURABLE = ("paged_append", "paged_attention", "sample")  # ops whose eager references read lengths on the host
Best = tuple[tuple[int, float], ...]  # (id, log-probability), likeliest first


def buckets(max_batch: int) -> list[int]:
    """Return the numbers of sequences that decoding is padded to: 1, 2, 4, 8, 16, 24, ..., max_batch."""
    return sorted({n for n in (1, 2, 4, 8, *range(16, max_batch, 8)) if n < max_batch} | {max_batch})


def why_no_graphs(device: torch.device, kernels: Kernels) -> str | None:
    """Return why a decoding step cannot be captured as a CUDA graph here, None when it can."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA GPU, this is {device.type}"
    return _reads_lengths(kernels)


def _reads_lengths(kernels: Kernels) -> str | None:
    eager = [op for op in CAPTURABLE if kernels.names[op] == "eager"]
    return f"{eager[0]}=eager reads lengths on the host" if eager else None


@dataclass
class Flight:
    """A step on its way: the rows that draw, at which positions, and where ids and log-probabilities will be."""

    drawing: list[Row]
    positions: list[int]
    drawn: torch.Tensor  # (2, R) fp64 on the device: ids, exact up to 2^53, and log-probabilities
    best: torch.Tensor | None  # (2, R, n) fp64, the n likeliest tokens and theirs

    def __post_init__(self):
        self._host = [x if x is None or x.device.type == "cpu" else
                      torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
                      for x in (self.drawn, self.best)]
        self._done = torch.cuda.Event() if self.drawn.device.type == "cuda" else None
        if self._done:
            self._done.record()

    def collect(self) -> list[tuple[Row, int, int, float, Best]]:
        """Wait for the step; return (row, position, id, log-probability, best) of every draw.

        best are the likeliest of the distribution drawn from, as many as the row's request asks for; fewer where top-k,
        top-p or min-p keep fewer.
        """
        if self._done:
            self._done.synchronize()
        drawn, best = self._host
        ids, logprobs = drawn.tolist()
        likeliest = [()] * len(ids) if best is None else [
            tuple((int(i), p) for i, p in pairs[:row.request.params.logprobs or 0] if p > -np.inf)
            for row, pairs in zip(self.drawing, best.permute(1, 2, 0).tolist(), strict=True)]
        return list(zip(self.drawing, self.positions, map(int, ids), logprobs, likeliest, strict=True))


class Runner:
    """Runs the steps of one engine over the cache of its pages.

    graphs: CUDA graphs for decoding, by default where they can be. compiled: torch.compile for decoding. kv_dtype:
    "auto" keeps keys and values in the model's dtype, "fp8" in e4m3. Raises UserError for what cannot be here.
    """

    def __init__(self, model: GPT, n_pages: int, page_size: int, max_batch: int, *, kv_dtype: str = "auto",
                 graphs: bool | None = None, compiled: bool = False, batch_invariant: bool = False):
        if kv_dtype not in KV_DTYPES:
            raise UserError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
        if kv_dtype == "fp8" and (have := sm(model.device)) is not None and have < 89:
            raise UserError(f"kv_dtype fp8 needs a GPU of sm89 or later, this is sm{have}")
        no_graphs = None if graphs is False else why_no_graphs(model.device, model.kernels)
        if graphs and no_graphs:
            raise UserError(f"graphs cannot be had: {no_graphs}")
        if compiled and (reason := _reads_lengths(model.kernels)):
            raise UserError(f"a compiled step cannot be had: {reason}; take --kernels triton")
        self.model, self.n_pages, self.page_size, self.kv_dtype = model, n_pages, page_size, kv_dtype
        self.max_batch, self.batch_invariant = max_batch, batch_invariant
        self.graphs = graphs is not False and not no_graphs
        self.padded = self.graphs or compiled
        self.buckets = [INVARIANT_TOKENS] if batch_invariant else buckets(max_batch)
        width = -(-model.config.sequence_len // page_size)
        rows = max(max_batch, self.buckets[-1])
        self._tables = torch.zeros(rows, width, dtype=torch.int32, device=model.device)
        self._host_tables = np.zeros((rows, width), dtype=np.int32)
        self._held: list[list[int]] = [[] for _ in range(rows)]  # pages that a row of the tables has
        self._steps: dict[int, Step] = {}  # of decoding, by sequences
        self._captured: dict[int, tuple[Callable, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._decode = self._compute_alone if batch_invariant else self._compute
        if compiled:
            self._decode = _compile(self._decode, len(self.buckets))
        self._previous: Flight | None = None
        self.cache: PagedCache | None = None
        self.restore_kv()

    # --- a step ---

    def launch(self, counts: dict[Row, int], copies: list[tuple[int, int]], drawing: list[Row],
               source: list[int]) -> Flight:
        """Start computing the next n tokens of each row of `counts`, after copying pages (source, destination).

        drawing[i] draws from the logits after the last token of the source[i]-th row. A row's last token may be one
        that the step before drew and nobody has collected yet. Draws are those of `Flight.collect`.
        """
        self._copy_pages(copies)
        spans = [(row, row.computed, n) for row, n in counts.items()]
        if self.batch_invariant:
            drawn, logits, draw = self._in_tiles(spans, drawing, source)
        else:
            drawn, logits, draw = self._at_once(spans, drawing, source)
        wanted = max((row.request.params.logprobs or 0 for row in drawing), default=0)
        best = n_best(logits, *draw[:4], wanted) if wanted else None
        self._previous = Flight(drawing, [row.length for row in drawing], drawn, best)
        return self._previous

    def _at_once(self, spans: list[Span], drawing: list[Row],
                 source: list[int]) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Compute all spans in one forward -> what `_compute` returns, and how it drew."""
        counts = np.array([n for _, _, n in spans])
        decodes = int(counts.max()) == 1 and source == list(range(len(spans)))
        if decodes:
            size = next(b for b in self.buckets if b >= len(spans)) if self.padded else len(spans)
            step = self._decode_step(size)
        else:
            step = Step(self._tables, int(counts.sum()), len(spans), len(drawing))
        self._fill(step, spans)
        step.fill_draws(drawing, counts.cumsum()[source] - 1)
        self._send(step)
        drawn, logits = self._run(step) if decodes else self._compute(step.batch, step.draw)
        R = len(drawing)
        return drawn[:, :R], logits[:R], tuple(x[:R] for x in step.draw)

    def _compute(self, batch: PagedBatch, draw: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and log-probabilities as (2, R) fp64, and the logits (R, V) fp32."""
        logits = self.model.forward_paged(batch, self.cache)
        return self._draw(logits, draw), logits

    def _compute_alone(self, batch: PagedBatch, _: tuple[torch.Tensor, ...]) -> tuple[None, torch.Tensor]:
        """Compute sequences that do not depend on each other; their logits are drawn from later."""
        return None, self.model.forward_paged(replace(batch, alone=True), self.cache)

    def _draw(self, logits: torch.Tensor, draw: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if not len(logits):  # a step in the middle of prompts
            return logits.new_empty((2, 0), dtype=torch.float64)
        return torch.stack([x.double() for x in self.model.kernels.sample(logits, *draw)])

    def _fill(self, step: Step, spans: list[Span]) -> None:
        """Write the spans' tokens, and the rows of the tables that have changed."""
        changed = []
        for i, (row, _, _) in enumerate(spans):
            if self._held[i] != row.pages:
                self._held[i] = []  # until the device knows: an interrupt on the way must not leave old pages there
                self._host_tables[i, :len(row.pages)] = row.pages
                changed.append(i)
        if changed:
            rows = slice(changed[0], changed[-1] + 1)
            upload(torch.from_numpy(self._host_tables[rows]), self._tables[rows])
        for i in changed:
            self._held[i] = list(spans[i][0].pages)
        unknown = {} if self._previous is None else {row: i for i, row in enumerate(self._previous.drawing)}
        step.fill(spans, self._host_tables, self.page_size, unknown)

    def _send(self, step: Step) -> None:
        step.send()
        if step.host["tokens"].min() < 0:  # drawn but not known: they are still on the device only
            tokens, drawn = step.batch.tokens, self._previous.drawn[0].long()
            tokens.copy_(torch.where(tokens < 0, drawn[(-1 - tokens).clamp(min=0)], tokens))

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, destination = placed(torch.tensor(copies), self.model.device).unbind(dim=1)
            for layer in self.cache.layers:
                for pages in layer:
                    if pages is not None:
                        pages[destination] = pages[source]

    # --- decoding, captured or not ---

    def _decode_step(self, size: int) -> Step:
        if size not in self._steps:
            self._steps[size] = Step(self._tables, size, size, size)
        return self._steps[size]

    def _in_tiles(self, spans: list[Span], drawing: list[Row],
                  source: list[int]) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Compute every token as a sequence of its own, 64 at a time; draw at the end."""
        tokens = [(row, first + i, 1) for row, first, n in spans for i in range(n)]
        last = np.cumsum([n for _, _, n in spans])[source] - 1  # of the tokens, for each draw
        step, logits = self._decode_step(INVARIANT_TOKENS), []
        for start in range(0, len(tokens), INVARIANT_TOKENS):
            self._fill(step, tokens[start:start + INVARIANT_TOKENS])
            step.host["out_rows"][:] = np.arange(INVARIANT_TOKENS)
            self._send(step)
            wanted = last[(last >= start) & (last < start + INVARIANT_TOKENS)] - start
            logits.append(self._run(step)[1][placed(torch.from_numpy(wanted), self.model.device)])
        draws = Step(self._tables, 0, 0, len(drawing))
        draws.fill_draws(drawing, last)
        draws.send()
        logits = torch.cat(logits)
        return self._draw(logits, draws.draw), logits, draws.draw

    def _run(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_compute` does for a bucket's step, from its graph if there is one."""
        if step.S not in self._captured:
            return self._decode(step.batch, step.draw)
        replay, results = self._captured[step.S]
        replay()
        return results

    @torch.inference_mode()
    def _capture_all(self) -> None:
        """Capture a graph per bucket in one pool of memory, the largest first: the others fit into what it took."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.buckets):
            step = self._decode_step(size)
            self._decode(step.batch, step.draw)  # kernels are compiled, libraries set themselves up
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # another engine's thread may take memory meanwhile; in the default mode that ends the capture
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                results = self._decode(step.batch, step.draw)
            self._captured[size] = (graph.replay, results)

    # --- memory and weights ---

    def release_kv(self) -> None:
        """Give back the pages' memory, and the graphs that hold its addresses."""
        self.cache = self._previous = None
        self._captured.clear()

    def restore_kv(self) -> None:
        """Take memory for all pages and capture the graphs, unless they are there. Raises UserError without room."""
        if self.cache is not None:
            return  # new pages would be empty, while the pool knows what is in the old ones
        model = self.model
        try:
            self.cache = PagedCache.allocate(model.config, self.n_pages, self.page_size, model.dtype, model.device,
                                             self.kv_dtype == "fp8")
            if self.graphs:
                self._capture_all()
        except torch.OutOfMemoryError as error:
            self.release_kv()
            raise UserError(f"{self.n_pages} pages of {self.page_size} tokens for a batch of {self.max_batch} must fit "
                            f"the memory of {model.device}, they do not: take a smaller batch") from error


def n_best(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
           min_p: torch.Tensor, n: int) -> torch.Tensor:
    """Return the n likeliest tokens of the distribution drawn from and their log-probabilities, (2, R, n) fp64."""
    logprobs = kept_logits(logits, temperature, top_k, top_p, min_p).log_softmax(dim=-1)
    values, ids = logprobs.topk(min(n, logprobs.size(1)), dim=-1)
    return torch.stack((ids.double(), values.double()))


def _compile(function: Callable, n_shapes: int) -> Callable:
    """Compile for fixed shapes, `n_shapes` of them.

    torch refuses more than 8 of one function, and counts those of all engines of the process: each makes its own room.
    """
    torch._dynamo.config.recompile_limit += n_shapes
    torch._dynamo.config.accumulated_recompile_limit += n_shapes
    return torch.compile(function, dynamic=False, fullgraph=True)
