"""/metrics: what the server did, for Prometheus; names as in vLLM, with our prefix."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanochat.server.job import Job
from nanochat.server.worker import Pool

SECONDS = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1)


class Metrics(Collector):
    """Counts finished jobs and refusals; engine figures are read when somebody asks."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, files, CPU time

        def make(kind, name, text, labels=(), **options):
            return kind(f"nanochat_{name}", text, labels, registry=self.registry, **options)

        self.finished = make(Counter, "request_success", "choices that ended", ["finished_reason"])
        self.failed = make(Counter, "request_failures", "requests that failed in the queue or the engine", ["code"])
        self.responses = make(Counter, "http_responses", "answers by status", ["status"])
        self.prompt_tokens = make(Counter, "prompt_tokens", "tokens of prompts")
        self.generation_tokens = make(Counter, "generation_tokens", "tokens of completions")
        self.tool_calls = make(Counter, "tool_calls", "calls of the tool", ["result"])
        self.queue_time = make(Histogram, "request_queue_time_seconds", "from arrival to the engine", buckets=SECONDS)
        self.first_token = make(Histogram, "time_to_first_token_seconds", "from arrival", buckets=SECONDS)
        self.token_time = make(Histogram, "inter_token_latency_seconds", "mean of a choice, after its first token",
                               buckets=TOKEN_SECONDS)
        self.latency = make(Histogram, "e2e_request_latency_seconds", "from arrival to the end", buckets=SECONDS)

    def answered(self, status: int) -> None:
        self.responses.labels(status).inc()

    def observe(self, job: Job) -> None:
        """Count a job that has ended, with an error or with completions."""
        if job.error:
            self.failed.labels(job.error.code).inc()
        for completion in job.completions:
            times = completion.times
            self.finished.labels(completion.finish_reason).inc()
            self.generation_tokens.inc(completion.completion_tokens)
            for _, result in completion.tool_calls:
                self.tool_calls.labels("refused" if result is None else "answered").inc()
            self.latency.observe(times.done - job.queued)
            if times.first_token:
                self.first_token.observe(times.first_token - job.queued)
            if completion.completion_tokens > 1:
                self.token_time.observe((times.done - times.first_token) / (completion.completion_tokens - 1))
        for completion in job.completions[::job.params.n]:
            self.prompt_tokens.inc(completion.prompt_tokens)
            if completion.times.started:
                self.queue_time.observe(completion.times.started - job.queued)

    def collect(self) -> Iterator[Metric]:
        """Yield what the pool and its engines know themselves."""
        engines = self.pool.engines
        stats = [engine.stats() for engine in engines]
        pages = sum(engine.pool.total for engine in engines)
        live = sum(engine.pool.live for engine in engines)
        gauges = {"num_requests_running": (len(self.pool.jobs) - self.pool.waiting, "requests in the engine"),
                  "num_requests_waiting": (self.pool.waiting, "requests in the queue"),
                  "kv_cache_usage_perc": (live / pages if pages else 0.0, "share of pages that rows hold, 0 to 1")}
        counters = {"num_preemptions": ("preemptions", "rows that gave up their pages for older ones"),
                    "engine_steps": ("steps", "steps of the engine"),
                    "prefix_cache_hit_tokens": ("cached_tokens", "tokens that rows started from without computing")}
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"nanochat_{name}", text, value)
        for name, (key, text) in counters.items():
            yield CounterMetricFamily(f"nanochat_{name}", text, sum(one[key] for one in stats))

    def render(self) -> bytes:
        return generate_latest(self.registry)
