"""Keeps the process that forks the sandbox's children: nanochat/lockdown.py in an interpreter of its own.

Starting an interpreter takes 12 ms, a fork of one that waits takes 2. One launcher per process of ours starts with the
first program and ends when its socket closes, which the kernel does whichever way we end.
"""

import atexit
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path

from nanochat import lockdown
from nanochat.common import UserError

_BOOT = "import sys; sys.path.append(sys.argv.pop(1)); import lockdown; sys.path.pop(); lockdown.main()"
_launcher: "Launcher | None" = None
_launching = threading.Lock()


class Launcher:
    """The interpreter of which every child is a fork (lockdown.main). It ends when this process does."""

    def __init__(self):
        # `ps` shows the last argument, to tell whose it is
        command = [interpreter(), "-I", "-S", "-X", "utf8", "-c", _BOOT, str(Path(lockdown.__file__).parent),
                   f"owner={os.getpid()}"]
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        try:
            self.pid = os.posix_spawn(command[0], command, {"LANG": "C.UTF-8"}, setsigmask=(),
                                      file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), *silent])
        except OSError as error:
            self.requests.close()
            raise UserError(f"the sandbox needs an interpreter it can start, got {command[0]} "
                            f"({error.strerror})") from error
        finally:
            theirs.close()
        atexit.register(self.requests.close)

    def answer(self, status: socket.socket) -> tuple[bytes, list[int]]:
        """Wait for what a new supervisor says first; return it and its descriptors. Empty if the launcher has died."""
        poll = select.poll()
        for source in (self.requests, status):
            poll.register(source, select.POLLIN)
        if status.fileno() not in dict(poll.poll()):  # nothing is ever said on `requests`: it has closed
            return b"", []
        answer, descriptors, _, _ = socket.recv_fds(status, 4096, 1)
        return answer, descriptors

    def close(self) -> None:
        self.requests.close()
        os.waitpid(self.pid, 0)


def launch(options: dict, descriptors: list[int], status: socket.socket) -> int:
    """Start a supervisor and its child; return a pidfd of the supervisor, which reports on the other end of `status`.
    A launcher that was killed is replaced once."""
    message = json.dumps(options).encode()
    for _ in range(2):
        launcher = _current()
        try:
            socket.send_fds(launcher.requests, [message], descriptors)
            answer, pidfds = launcher.answer(status)
        except (OSError, ValueError):  # gone, or closed by another thread that found it gone
            answer, pidfds = b"", []
        if answer:
            break
        _forget(launcher)
    if not answer or not pidfds:
        raise UserError(f"the sandbox's launcher could not start a child: {answer.decode() or 'it ended'}")
    return pidfds[0]


def _current() -> Launcher:
    global _launcher
    with _launching:
        if _launcher is None:
            _launcher = Launcher()
        return _launcher


def _forget(launcher: Launcher) -> None:
    global _launcher
    with _launching:
        if _launcher is launcher:
            _launcher = None
            launcher.close()


def _after_fork() -> None:
    """A forked process starts a launcher of its own: this one's children would outlive it."""
    global _launcher, _launching
    _launching = threading.Lock()
    if _launcher is not None:
        _launcher.requests.close()
        _launcher = None


os.register_at_fork(after_in_child=_after_fork)


def interpreter() -> str:
    """Return the path of a Python that has no packages."""
    return getattr(sys, "_base_executable", sys.executable)  # a venv's own would look for its settings first
