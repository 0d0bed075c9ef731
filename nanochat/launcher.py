"""Keeps the process that forks the sandbox's children: nanochat/lockdown.py in an interpreter of its own.

An interpreter started for each program cost more than all its isolation (bench/bench_sandbox.py); a fork of one that
waits costs little. One launcher per process of ours starts with the first program and ends when its socket closes,
which the kernel does whichever way we end.
"""

import errno
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress

from nanochat import lockdown
from nanochat.common import UserError

# not imported: a program would see the path
_BOOT = """
import sys
space = {"__name__": "lockdown"}
exec(compile(open(sys.argv.pop(1), encoding="utf-8").read(), "<sandbox>", "exec"), space)
space["main"]()
"""
_ANSWER_SECONDS = 30.0  # the first time Python has to start
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)
_launcher: "Launcher | None" = None
_launching = threading.Lock()


class Launcher:
    """The interpreter of which every child is a fork (lockdown.main). It ends when this process does."""

    def __init__(self):
        # `ps` shows the last argument, to tell whose it is
        command = [interpreter(), "-I", "-S", "-X", "utf8", "-c", _BOOT, lockdown.__file__,
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

    def __del__(self):
        self.requests.close()  # by its last user: another thread may be polling its number

    def start(self, message: bytes, descriptors: list[int]) -> tuple[socket.socket, int] | None:
        """Return the status socket and a pidfd of a new supervisor; None when the launcher has died or hangs.

        `descriptors` are those of lockdown.DESCRIPTORS without the status. Closing the socket ends the program.
        """
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd, answer = None, ""
        try:
            with theirs:
                socket.send_fds(self.requests, [message], [*descriptors[:4], theirs.fileno(), *descriptors[4:]])
            answer, pidfd = self._answer(status)
        except OSError as error:
            if error.errno not in _GONE:
                raise
        finally:
            if pidfd is None:
                status.close()
        if answer and pidfd is None:
            raise UserError(f"the sandbox's launcher could not start a child: {answer}")
        return pidfd and (status, pidfd)

    def _answer(self, status: socket.socket) -> tuple[str, int | None]:
        """Return what a new supervisor says first, and its pidfd; "" and None when nothing comes."""
        poll = select.poll()
        for source in (self.requests, status):
            poll.register(source, select.POLLIN)
        if status.fileno() not in dict(poll.poll(1e3 * _ANSWER_SECONDS)):  # on `requests` nothing is said, only its end
            return "", None
        answer, ancillary, _, _ = status.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if answer == b"descriptor" and not ancillary:
            return "too many open files here", None
        return answer.decode(), int.from_bytes(ancillary[0][2], sys.byteorder) if ancillary else None

    def end(self) -> None:
        """End the process."""
        with suppress(OSError):
            self.requests.shutdown(socket.SHUT_RDWR)
        with suppress(ChildProcessError):  # where somebody reaps every child
            if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


def launch(options: dict, descriptors: list[int]) -> tuple[socket.socket, int]:
    """Start a supervisor and its child; return the status socket and a pidfd of the supervisor. A launcher that was
    killed is replaced once. Closing the socket ends the program."""
    message = json.dumps(options).encode()
    for _ in range(2):
        launcher = _current()
        if started := launcher.start(message, descriptors):
            return started
        _forget(launcher)
    raise UserError("the sandbox's launcher must stay alive, it died twice")


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
            launcher.end()


def _after_fork() -> None:
    """A forked process starts a launcher of its own: this one's children would outlive it."""
    global _launcher
    _launching.release()
    if _launcher is not None:
        _launcher.requests.close()
        _launcher = None


os.register_at_fork(before=_launching.acquire, after_in_parent=_launching.release, after_in_child=_after_fork)


def interpreter() -> str:
    """Return the path of a Python that has no packages."""
    return getattr(sys, "_base_executable", sys.executable)  # a venv's own would look for its settings first
