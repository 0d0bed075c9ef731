"""Naming the ranks that a job lost.

Every rank tells the job's store once a second that it is alive and where it is, and why it ends if it does; whom a
collective left waiting looks up who failed, who is silent and who is busy elsewhere. With torchrun the store is the
first node's agent, which outlives the ranks, and with --max-restarts an attempt of the job: so that none reads what an
earlier one left there, each has a name of its own. Over gloo a lost rank is an error in all the others; NCCL's
watchdog aborts a process that waited too long, so that there only the rank that fails by itself is named.
"""

import itertools
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import CodeType

import torch.distributed as dist


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name for this attempt of the job, the same on every rank and never used before; RuntimeError in vain.

    TORCHELASTIC_RESTART_COUNT is none: every agent counts for itself. Every rank asks with a new word, and rank 0,
    which cannot tell an old question from a new one, answers until all have heard the name.
    """
    word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"question {rank}", word)
        store.wait([f"answer {word}"], timeout)
        name = store.get(f"answer {word}").decode()
        store.set(f"{name} heard by {rank}", "yes")
        return name
    missing, deadline = list(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, missing))} did not come")
        for other in missing:
            if store.check([f"question {other}"]):
                store.set(f"answer {store.get(f'question {other}').decode()}", word)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{word} heard by {other}"])]
    return word


class RollCall(threading.Thread):
    """Ticks in the background from the moment it is made; `left` ends it."""

    TICK_S, PATIENCE_S = 1.0, 5.0

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        super().__init__(daemon=True)
        self.store, self.rank, self.world_size = store, rank, world_size
        self.left = threading.Event()
        self.start()

    def run(self) -> None:
        for tick in itertools.count():
            with suppress(RuntimeError):  # the store has gone with rank 0
                self.store.set(f"alive {self.rank}", f"{tick}|{socket.gethostname()}|{_busy_at()}")
            if self.left.wait(self.TICK_S):
                return

    def explain(self, error: Exception, known: str | None) -> str | None:
        """Return the sentence to end with, None for a mistake in the program; `known` is that of a user's mistake."""
        lost = known is None and _is_of_a_collective(error)
        reason = "" if lost else known or f"{type(error).__name__}: {first_sentence(error)}"
        try:
            self.store.set(f"reason {self.rank}", reason)
            causes = self._causes() if lost else []
        except RuntimeError:
            causes = ["rank 0, which kept the job's store, is gone"]
        self.left.set()
        if lost:
            return f"rank {self.rank} ends: {'; '.join(causes) or 'the network failed'} ({first_sentence(error)})"
        return known and f"rank {self.rank}: {known}"

    def _causes(self) -> list[str]:
        before = self._heard()
        time.sleep(self.PATIENCE_S)
        causes = []
        for rank, (tick, host, busy_at) in self._heard().items():
            name = f"rank {rank} on {host}"
            if self.store.check([f"reason {rank}"]):
                reason = self.store.get(f"reason {rank}").decode()
                causes += [f"{name} failed: {reason}"] if reason else []
            elif before[rank][0] == tick:
                causes.append(f"{name} is dead or stopped")
            elif busy_at:
                causes.append(f"{name} keeps the others waiting at {busy_at}")
        return causes

    def _heard(self) -> dict[int, list[str]]:
        return {rank: self.store.get(f"alive {rank}").decode().split("|") for rank in range(self.world_size)}


def _busy_at() -> str:
    """Return the file and line that the main thread is at, "" while it waits for other ranks."""
    frame = sys._current_frames()[threading.main_thread().ident]
    return "" if _waits(frame.f_code) else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _waits(code: CodeType) -> bool:
    return "torch/distributed/" in code.co_filename or code.co_name == "_wait"


def _is_of_a_collective(error: Exception) -> bool:
    """Gloo has no exception of its own, and not all of its messages name it ("Application timeout caused pair
    closure"): where it was raised tells as well."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return True
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return type(error) is RuntimeError and bool(codes) and _waits(codes[-1])


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message of torch.distributed, without the place in its source."""
    return re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
