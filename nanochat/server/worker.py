"""The engine's thread, and the queue in front of it.

The event loop never waits for the engine: it leaves jobs in the pool's queue and reads their events as they are
delivered. The thread takes jobs as the batch has room, steps the engine, and hands each step's news to the event loop
in one call. It runs at most two steps ahead of the loop, so that a loop with many streams to write slows the engine
down instead of filling its buffers.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from nanochat.common import UserError
from nanochat.engine import Completion, Engine, Request, SamplingParams
from nanochat.server.errors import ApiError
from nanochat.server.job import Event, Job
from nanochat.server.settings import Settings

STEPS_AHEAD = 2
SLICE = 8  # jobs; 200 streams, busy cores: /health takes 12 ms, the first word 0.77 s; with 32: 28 ms and 0.51 s
STOP_SECONDS = 5.0
ENGINE_FAILED = ApiError(503, "the engine failed at this request or one beside it; see the log", "engine_error")

News = list[tuple[Job, list[Event], list[Completion]]]  # of a step

log = logging.getLogger("nanochat.server")


class Pool:
    """One queue of jobs in front of one engine per factory, each in a thread of its own.

    state: "loading" until every engine is there, "ready", "draining", or "failed" with the sentence in `failure`.
    """

    def __init__(self, factories: list[Callable[[], Engine]], settings: Settings):
        self.settings = settings
        self.state, self.failure = "loading", ""
        self.on_failure: Callable[[], None] = lambda: None
        self.jobs: set[Job] = set()  # unfinished ones
        self.workers = [Worker(self, factory) for factory in factories]
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()

    @property
    def engines(self) -> list[Engine]:
        return [worker.engine for worker in self.workers if worker.engine]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    # --- for the event loop ---

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for worker in self.workers:
            worker.start()

    def check_ready(self) -> None:
        """Raise ApiError when no job can be taken now."""
        if self.state != "ready":
            raise self._refusal()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError 429 when the queue is full, 503 when the server is not ready."""
        self.check_ready()
        with self._changed:
            if len(self._waiting) >= self.settings.queue:
                raise ApiError(429, f"at most {self.settings.queue} requests may wait, and as many do: try again later",
                               "queue_full")
            self._waiting.append(job)
            self.jobs.add(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Let a job go, wherever it stands: its rows leave the engine before the next step."""
        self.jobs.discard(job)
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    async def drain(self) -> None:
        """Take no more work, let what runs finish for a while, and cut the rest off with an error."""
        self.state = "failed" if self.failure else "draining"
        with self._changed:
            waiting = list(self._waiting)
        self._end(waiting)
        deadline = monotonic() + self.settings.drain
        while self.jobs and monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._end(list(self.jobs))

    def stop(self) -> None:
        """End the threads; returns when they have ended, or soon when one is still loading."""
        for worker in self.workers:
            worker.stopping = True
            worker.ahead.release()
        with self._changed:
            self._changed.notify_all()
        for worker in self.workers:
            worker.join(STOP_SECONDS)

    def _end(self, jobs: list[Job]) -> None:
        """Fail jobs for the reason that the pool takes no more."""
        for job in jobs:
            job.fail(self._refusal())
            self.cancel(job)

    def _refusal(self) -> ApiError:
        sentences = {"loading": "the model is being loaded", "draining": "the server is shutting down"}
        return ApiError(503, self.failure or sentences[self.state], self.state)

    def _failed(self) -> None:
        self._end(list(self.jobs))
        self.on_failure()

    # --- for the workers' threads ---

    def loaded(self) -> None:
        if len(self.engines) == len(self.workers) and self.state == "loading":
            self.state = "ready"
            log.info("the model is loaded")

    def fail(self, sentence: str) -> None:
        self.state, self.failure = "failed", sentence
        self.call(self._failed)

    def take(self, worker: "Worker") -> list[Job]:
        """Return jobs for the room that the worker has, waiting for one when it has nothing to do."""
        taken = []
        with self._changed:
            while not self._waiting and not worker.running and not worker.stopping:
                self._changed.wait()
            while self._waiting and worker.has_room and worker.load == min(other.load for other in self.workers):
                taken.append(self._waiting.popleft())
                worker.load += taken[-1].choices
        return taken

    def call(self, function: Callable, *args) -> bool:
        """Run function(*args) in the event loop soon; False when there is no loop any more."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True


@dataclass(eq=False)
class Running:
    """A job in the engine, and its requests there."""

    job: Job
    requests: list[Request]

    @property
    def done(self) -> bool:
        return all(request.done for request in self.requests)

    def news(self) -> list[Event]:
        """Return what is new since the last call."""
        n = self.job.params.n
        return [(n * i + sample, event) for i, request in enumerate(self.requests)
                for sample, event in request.take_events()]

    def completions(self) -> list[Completion]:
        """Return those of all choices, when it is done."""
        return [one for request in self.requests for one in request.completions()] if self.done else []


class Worker(threading.Thread):
    """Steps one engine for the jobs it takes from the pool."""

    def __init__(self, pool: Pool, factory: Callable[[], Engine]):
        super().__init__(name="engine", daemon=True)
        self.pool, self.factory = pool, factory
        self.engine: Engine | None = None
        self.running: list[Running] = []
        self.load = 0  # choices in the engine
        self.stopping = False
        self.ahead = threading.Semaphore(STEPS_AHEAD)
        self.arrived: deque[News] = deque()  # of steps, in the event loop

    @property
    def has_room(self) -> bool:
        return self.load < self.engine.max_batch

    def run(self) -> None:
        try:
            self.engine = self.factory()
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the model could not be loaded")
            return self.pool.fail(f"the model could not be loaded: {error}")
        self.pool.loaded()
        while not self.stopping:
            try:
                self._turn()
            except Exception:
                log.exception("a step of the engine failed")
                if not self._recover():
                    return self.pool.fail("the engine failed, and failed again when started over; see the log")

    def _turn(self) -> None:
        """Take jobs, step once, and deliver what is new."""
        for job in self.pool.take(self):
            self._admit(job)
        for running in self.running:
            if running.job.cancelled:
                self._abort(running.requests)
        if self.engine.running or self.engine.waiting:
            self.engine.step()
        news = [(running.job, running.news(), running.completions()) for running in self.running]
        self._keep([running for running in self.running if not running.done])
        self._deliver([item for item in news if item[1]])

    def _admit(self, job: Job) -> None:
        requests = []
        try:
            for prompt in job.prompts:
                requests.append(self.engine.submit(prompt, job.params, self.pool.settings.request_timeout))
        except UserError as error:
            self._abort(requests)
            self.pool.call(self._fail, job, ApiError(400, str(error), "invalid_value"))
        except Exception:
            self.pool.call(self._fail, job, ENGINE_FAILED)
            raise
        else:
            self.running.append(Running(job, requests))
            self.pool.call(job.receive, [], [])

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self.engine.abort(request)

    def _keep(self, running: list[Running]) -> None:
        self.running = running
        self.load = sum(one.job.choices for one in running)

    def _recover(self) -> bool:
        """After a failed step nothing in the engine can be trusted: fail its jobs, start over, and say if it works."""
        for running in self.running:
            self.pool.call(self._fail, running.job, ENGINE_FAILED)
        self._keep([])
        try:
            self.engine.reset()
            probe = self.engine.submit([self.engine.tokenizer.bos_id], SamplingParams(max_tokens=1))
            while not probe.done:
                self.engine.step()
        except Exception:
            log.exception("the engine does not work any more")
            return False
        return True

    def _deliver(self, news: News) -> None:
        if news:
            self.ahead.acquire()
            if not self.pool.call(self._delivered, news):
                self.stopping = True  # never back to False: another thread may have said so in between

    # --- in the event loop ---

    def _delivered(self, news: News) -> None:
        self.arrived.append(news)
        if len(self.arrived) == 1:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the oldest step's news to a few jobs: between two slices the loop answers everybody else.

        No step overtakes another: jobs change their place in the list when one before them ends.
        """
        news = self.arrived[0]
        for job, events, completions in news[:SLICE]:
            job.receive(events, completions)
            if job.done:
                self.pool.jobs.discard(job)
        del news[:SLICE]
        if not news:
            self.arrived.popleft()
            self.ahead.release()
        if self.arrived:
            self.pool.call(self._pass_on)

    def _fail(self, job: Job, error: ApiError) -> None:
        job.fail(error)
        self.pool.cancel(job)
