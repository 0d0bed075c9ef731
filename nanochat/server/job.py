"""One HTTP request as the event loop sees it: what the engine says about it arrives here, from the worker's thread."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

from nanochat.engine import Completion, SamplingParams
from nanochat.server.errors import ApiError

EVENT_BYTES = 256  # about what the JSON around a piece of text takes

Event = tuple[int, tuple]  # a choice, and what the engine says of it (see nanochat/engine/tools.py)


class Job:
    """Prompts to continue, n samples each, as choices 0, 1, ... Iterate for its events, after `wait_admitted`.

    completions: of all choices, once it is done. All methods belong to the event loop; the worker's thread reads
    `prompts`, `params` and `cancelled` alone.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, buffer_bytes: int):
        self.prompts, self.params, self.buffer_bytes = prompts, params, buffer_bytes
        self.queued = time.monotonic()
        self.completions: list[Completion] = []
        self.cancelled = False
        self.error: ApiError | None = None
        self._events: deque[Event] = deque()
        self._buffered = 0
        self._news = asyncio.Event()

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def done(self) -> bool:
        return bool(self.completions) or self.cancelled

    def receive(self, events: list[Event], completions: list[Completion]) -> None:
        """Take what the engine has produced, at last the completions; a client that does not read loses its request."""
        if self.done:
            return
        self.completions = completions
        self._events += events
        self._buffered += sum(map(_cost, events))
        if self._buffered > self.buffer_bytes:
            self._events.clear()
            self.fail(ApiError(503, f"a client must read its answer: {self._buffered} bytes are unread, "
                                    f"{self.buffer_bytes} are kept", "slow_reader"))
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End the job with an error, after the events that are already here."""
        if not self.cancelled:
            self.error, self.cancelled = error, True
        self._news.set()

    async def wait_admitted(self) -> None:
        """Wait until the engine has taken the job. Raises ApiError when it refuses."""
        await self._news.wait()
        if self.error and not self._events:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events in order; raises ApiError when the job failed."""
        while True:
            while self._events:
                event = self._events.popleft()
                self._buffered -= _cost(event)
                yield event
            if self.error:
                raise self.error
            if self.done:
                return
            self._news.clear()
            await self._news.wait()


def _cost(event: Event) -> int:
    """Return about how many bytes the event takes on the wire."""
    return EVENT_BYTES + sum(len(part) for part in event[1] if isinstance(part, str))
