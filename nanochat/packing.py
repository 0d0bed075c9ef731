"""Packing numbered documents into rows of fixed length, with a state that is numbers only; and a background thread.

A stream numbers the documents of all epochs: number n is document n % N of epoch n // N. The packers hold a window of
them and hand out rows; their state is the next number, the numbers in the window and counters, so a resumed run
fetches and tokenizes only the window again and continues with exactly the same rows.
"""

import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Lengths drawn like FineWeb-EDU's (log-normal, mean 1,000 tokens, 22.9 % of the tokens beyond 2,048 in their document)
# lose 25.8, 23.0 and 23.1 % to rows of 2,048 with a window of 100, 1,000 and 4,000 documents, and 24.8 % with 1,000
# when nothing looks for what ends a row exactly. 1,000 is also what a resumed run tokenizes again, 0.3 s.
# Fetching 128 at once keeps all threads of the tokenizer busy.
BUFFER_DOCUMENTS = 1000
CHUNK_DOCUMENTS = 128


@dataclass(frozen=True)
class Row:
    """Tokens of one row, (n,) int64 with n <= capacity, and which of them are trained on, (n,) bool or None for all."""

    ids: np.ndarray
    trained: np.ndarray | None = None

    @property
    def n_targets(self) -> int:
        return len(self.ids) - 1 if self.trained is None else int(self.trained[1:].sum())


class Stream(Protocol):
    """Tokenized documents by stream number."""

    def __len__(self) -> int: ...  # documents per epoch

    def fetch(self, numbers: list[int]) -> list[Row]: ...  # whole, never empty


class RowPacker:
    """Fills rows of `capacity` tokens with documents: the one waiting longest first, then one that ends the row
    exactly, alone or with one other, else the largest that fits.

    When none fits into the rest of a row, the shortest is cropped to fill it (`crop`) or the row ends there. A
    document longer than a row is cropped to it. Every document is in exactly one row per epoch, within `buffer_size`
    rows of being read; the window runs empty at the end of an epoch before the next begins.
    """

    def __init__(self, stream: Stream, capacity: int, *, crop: bool, state: dict | None = None,
                 buffer_size: int = BUFFER_DOCUMENTS, chunk: int = CHUNK_DOCUMENTS):
        self._stream, self._capacity, self._crop = stream, capacity, crop
        self._buffer_size, self._chunk = buffer_size, min(chunk, buffer_size)
        state = state or {"next": 0, "buffer": [], "counters": _zero_counters()}
        self._next: int = state["next"]
        self._counters = dict(state["counters"])
        self._window: dict[int, tuple[np.ndarray, int]] = {}  # number -> tokens to use, tokens there were
        self._by_length: list[tuple[int, int]] = []  # (tokens to use, -number): among equals the oldest is last
        self._of_length = np.zeros(capacity + 1, np.int64)  # documents in the window by tokens to use
        self._of_length[0] = 1  # what fills the room alone needs nothing with it
        self._add(state["buffer"])

    def state_dict(self) -> dict:
        return {"next": self._next, "buffer": list(self._window), "counters": dict(self._counters)}

    def next_row(self) -> Row:
        pieces: list[np.ndarray] = []
        room = self._capacity
        while room:
            self._refill()
            number = self._choose(room) if pieces else next(iter(self._window))
            if number is None:
                break
            pieces.append(self._take(number)[:room])
            room -= len(pieces[-1])
        row = Row(np.concatenate(pieces))
        self._counters["rows"] += 1
        self._counters["tokens"] += row.n_targets
        return row

    def _choose(self, room: int) -> int | None:
        fitting = bisect_right(self._by_length, (self._closing(room) or room, 0))
        if fitting:
            return -self._by_length[fitting - 1][1]
        if not self._crop:
            return None
        length, negative = self._by_length[0]
        self._count_crop(length - room, whole=self._window[-negative][1] == length)
        return -negative

    def _closing(self, room: int) -> int | None:
        """Return the length of the longest document that fills the room, alone or with one other; None for none."""
        half = (room + 1) // 2
        longer, rest = self._of_length[half:room + 1], self._of_length[room - half::-1]
        found = np.flatnonzero((longer > 0) & (rest > 0))
        if not len(found) or (2 * (length := half + found[-1]) == room and self._of_length[length] < 2):
            return None
        return int(length)

    def _take(self, number: int) -> np.ndarray:
        tokens, length = self._window.pop(number)
        self._of_length[len(tokens)] -= 1
        del self._by_length[bisect_left(self._by_length, (len(tokens), -number))]
        self._counters["documents"] += 1
        if length > len(tokens):
            self._count_crop(length - len(tokens))
        return tokens

    def _count_crop(self, tokens: int, *, whole: bool = True) -> None:
        self._counters["cropped_tokens"] += tokens
        self._counters["cropped_documents"] += whole  # one cropped to a row's length before is counted when taken

    def _refill(self) -> None:
        placed = self._counters["documents"]
        epoch_end = (placed // len(self._stream) + 1) * len(self._stream)
        while len(self._window) <= self._buffer_size - self._chunk and self._next < epoch_end:
            stop = min(self._next + self._chunk, epoch_end)
            self._add(list(range(self._next, stop)))
            self._next = stop

    def _add(self, numbers: list[int]) -> None:
        for number, row in zip(numbers, self._stream.fetch(numbers) if numbers else [], strict=True):
            tokens = row.ids[: self._capacity]
            self._window[number] = (tokens, len(row.ids))
            insort(self._by_length, (len(tokens), -number))
            self._of_length[len(tokens)] += 1


class OnePerRow:
    """Hands out one document per row in stream order, cropped to `capacity` tokens."""

    def __init__(self, stream: Stream, capacity: int, *, state: dict | None = None):
        self._stream, self._capacity = stream, capacity
        self._counters = dict(state["counters"]) if state else _zero_counters()

    def state_dict(self) -> dict:
        return {"counters": dict(self._counters)}

    def next_row(self) -> Row:
        (whole,) = self._stream.fetch([self._counters["documents"]])
        trained = None if whole.trained is None else whole.trained[: self._capacity]
        row = Row(whole.ids[: self._capacity], trained)
        cropped = len(whole.ids) - len(row.ids)
        self._counters["rows"] += 1
        self._counters["documents"] += 1
        self._counters["tokens"] += row.n_targets
        self._counters["cropped_documents"] += cropped > 0
        self._counters["cropped_tokens"] += cropped
        return row


def _zero_counters() -> dict[str, int]:
    return dict.fromkeys(("rows", "documents", "tokens", "cropped_documents", "cropped_tokens"), 0)


class Prefetcher:
    """Runs an iterator in a background thread, at most `depth` items ahead; its error surfaces in next()."""

    def __init__(self, items: Iterator, depth: int = 4):
        self._channel = _Channel(depth)
        # The thread knows the channel and not this object, so a forgotten loader is collected and its thread ends.
        thread = threading.Thread(target=_produce, args=(items, self._channel), name="prefetch", daemon=True)
        self.close = weakref.finalize(self, _stop, thread, self._channel)
        self._error: BaseException | None = None
        thread.start()

    def __next__(self):
        if self._error is None and self.close.alive:
            item, self._error = self._channel.get()
            if self._error is None:
                return item
        raise self._error or RuntimeError("next() on a closed loader")


class _Channel:
    """A bounded queue between two threads that can be stopped; queue.Queue wakes no blocked put() before 3.13."""

    def __init__(self, depth: int):
        self._depth, self._items, self._stopped = depth, deque(), False
        self._changed = threading.Condition()

    def put(self, item) -> bool:
        """Wait for room and put the item; False when the channel was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < self._depth)
            self._items.append(item)
            self._changed.notify_all()
            return not self._stopped

    def get(self):
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            self._changed.notify_all()
            return self._items.popleft()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def _produce(items: Iterator, channel: _Channel) -> None:
    error = None
    while error is None:
        item = None
        try:
            item = next(items)
        except BaseException as raised:  # whatever it is, it belongs to the thread that waits for the item
            error = raised
        if not channel.put((item, error)):
            return


def _stop(thread: threading.Thread, channel: _Channel) -> None:
    channel.stop()
    if thread is not threading.current_thread():  # the collector may run this in the thread itself
        thread.join()
