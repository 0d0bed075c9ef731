"""Clients that load an engine: a fixed number of them (closed loop), or requests at times of their own (open loop).

A closed-loop client asks again when it has its answer, so a slow engine is asked less; in the open loop requests come
no matter how the engine fares, and one that the engine was too busy to take in time has waited since it was due.
Tokens count as seen when the step that drew them is over, all times in seconds.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from nanochat.common import UserError
from nanochat.engine import Engine, Request, SamplingParams
from nanochat.engine.request import Row

Job = tuple[list[int], SamplingParams]  # a prompt and how to continue it, one sample


@dataclass
class Trace:
    """One request as its client saw it."""

    request: Request
    due: float  # time.monotonic() at which it should have been asked
    seen: list[float] = field(default_factory=list)  # when each token was

    @property
    def row(self) -> Row:
        return self.request.rows[0]

    @property
    def queue(self) -> float:
        return self.request.started - self.due

    @property
    def ttft(self) -> float:
        return self.seen[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.seen)]

    @property
    def tpot(self) -> float:
        """Return the mean gap, 0 for a single token."""
        return (self.seen[-1] - self.seen[0]) / max(1, len(self.seen) - 1)

    def look(self, now: float) -> None:
        self.seen += [now] * (len(self.row.mask) - len(self.seen))


def poisson_arrivals(n: int, rate: float, seed: int) -> list[float]:
    """Return n times in seconds from now, at `rate` a second on average, independent of each other."""
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(rate) for _ in range(n)))


def closed_loop(engine: Engine, jobs: Sequence[Job], clients: int) -> list[Trace]:
    """Run the jobs, `clients` of them at any time."""
    return _run(engine, jobs, lambda i, active, now: now if active < clients else None)


def open_loop(engine: Engine, jobs: Sequence[Job], arrivals: Sequence[float]) -> list[Trace]:
    """Run the jobs, the i-th asked arrivals[i] seconds from now."""
    start = time.monotonic()
    return _run(engine, jobs, lambda i, active, now: start + arrivals[i])


def _run(engine: Engine, jobs: Sequence[Job], when) -> list[Trace]:
    """Step until all jobs are done; when(i, active, now) says when job i is due, None: not before a step."""
    traces, active, waiting = [], [], deque(jobs)
    try:
        while waiting or active:
            now = time.monotonic()
            while waiting and (due := when(len(traces), len(active), now)) is not None and due <= now:
                traces.append(Trace(engine.submit(*waiting.popleft()), due))
                active.append(traces[-1])
            if not active:
                time.sleep(max(0.0, due - now))
                continue
            engine.step()
            now = time.monotonic()
            for trace in active:
                trace.look(now)
            active = [trace for trace in active if not trace.request.done]
    finally:
        for trace in active:
            engine.abort(trace.request)
    return traces


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99; of nothing, zeros."""
    values = np.percentile(seconds, (50, 90, 99)) if len(seconds) else np.zeros(3)
    return dict(zip(("p50", "p90", "p99"), map(float, values), strict=True))


def figures(traces: Sequence[Trace], slo_ttft: float, slo_tpot: float) -> dict:
    """Return rates and percentiles in seconds; goodput counts the requests within both limits.

    Raises UserError for a request that did not come to its end, since its times would mean nothing.
    """
    for trace in traces:
        if trace.row.finish_reason != "length":
            raise UserError(f"a request under load must get all of its tokens, one ended by {trace.row.finish_reason} "
                            f"({trace.row.error})")
    seconds = max(trace.seen[-1] for trace in traces) - min(trace.due for trace in traces)
    good = sum(trace.ttft <= slo_ttft and trace.tpot <= slo_tpot for trace in traces)
    return {
        "requests": len(traces), "seconds": seconds, "requests_per_s": len(traces) / seconds,
        "tokens_per_s": sum(len(trace.seen) for trace in traces) / seconds, "goodput_per_s": good / seconds,
        "slo_s": {"ttft": slo_ttft, "tpot": slo_tpot}, "queue_s": percentiles([trace.queue for trace in traces]),
        "ttft_s": percentiles([trace.ttft for trace in traces]),
        "tpot_s": percentiles([trace.tpot for trace in traces if len(trace.seen) > 1]),
        "itl_s": percentiles([gap for trace in traces for gap in trace.gaps]),
    }
