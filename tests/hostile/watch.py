"""Runs the hostile programs of this folder and looks from outside at what they did.

A program is a section of a .txt file: `--- name: expectation`, then its text, to which prelude.txt is prepended.
Expectations, several joined by |: held (the attempt failed and the program ended normally), ok (exit code 0), error
(another exit code), or what Result.ended says. Whatever the expectation, an escape is: a secret in the output, a change
to a canary file, a connection, a signal to us, a process or folder left over, much memory or a late return.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import string
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat import lockdown, sandbox

HERE = Path(__file__).parent
ENDLESS = sandbox.Limits(seconds=0.4, cpu_seconds=1, memory_bytes=2**27)
OTHERS = sandbox.Limits(seconds=10.0, cpu_seconds=10, memory_bytes=2**27)
LATE_SECONDS = 10.0  # a machine may be busy, but no program may hold us
MAX_GROWTH_KIB = 200 * 1024
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGIO, signal.SIGALRM, signal.SIGHUP)


def programs(category: str) -> dict[str, tuple[str, str]]:
    """Return name -> (expectation, text) of one file."""
    sections = re.split(r"^--- (\w+): ([\w|]+)\n", (HERE / f"{category}.txt").read_text(encoding="utf-8"), flags=re.M)
    assert sections[0] == ""
    names, expectations, texts = sections[1::3], sections[2::3], sections[3::3]
    assert len(set(names)) == len(names)
    return dict(zip(names, zip(expectations, texts, strict=True), strict=True))


CATEGORIES = ("cpu", "memory", "files", "system", "crashes")


class Outside:
    """What hostile programs would like to reach: files, sockets, this process. Counts what reaches us."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="hostile-canary-"))
        self.folder.chmod(0o777)
        self.secret = secrets.token_hex(16)
        os.environ["HOSTILE_SECRET"] = self.secret
        self.inheritable = os.memfd_create("secret", 0)  # what a library of ours may leave open
        os.write(self.inheritable, self.secret.encode("ascii"))
        self.signals = []
        for number in SIGNALS:
            signal.signal(number, lambda got, _: self.signals.append(got))
        self.tcp, self.udp, self.unix, self.abstract = self._listen()
        self.memory = peak_kib()

    def _listen(self) -> list[socket.socket]:
        name = f"hostile-{secrets.token_hex(4)}"
        places = [(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
                  (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
                  (socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
                  (socket.AF_UNIX, socket.SOCK_STREAM, "\0" + name)]
        listeners = []
        for family, kind, address in places:
            listener = socket.socket(family, kind)
            listener.bind(address)
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            listeners.append(listener)
        return listeners

    def canary(self) -> "Canary":
        return Canary(self)

    def faults(self) -> list[str]:
        """What any of the programs did to us, after all of them have ended."""
        time.sleep(0.05)
        found = [f"signal {number}" for number in self.signals]
        os.close(self.inheritable)
        for listener in (self.tcp, self.unix, self.abstract):
            try:
                listener.accept()
                found.append("connection")
            except BlockingIOError:
                pass
        try:
            found.append(f"packet {self.udp.recv(100)}")
        except BlockingIOError:
            pass
        found += [f"process {pid} left" for pid in processes_of(os.getpid())]
        found += [f"{path} left" for path in scratch_folders(os.getpid())]
        if (growth := peak_kib() - self.memory) > MAX_GROWTH_KIB:
            found.append(f"{growth} KiB of memory")
        return found


class Canary:
    """A folder with a secret and a victim for one program."""

    def __init__(self, outside: Outside):
        self.outside = outside
        self.folder = Path(tempfile.mkdtemp(dir=outside.folder))
        self.folder.chmod(0o777)
        self.secret, self.victim = self.folder / "secret", self.folder / "victim"
        self.secret.write_text(outside.secret, encoding="ascii")
        self.victim.write_text("untouched", encoding="ascii")
        self.victim.chmod(0o666)
        self.before = self._snapshot()

    def fill(self, text: str) -> str:
        outside = self.outside
        return string.Template(text).safe_substitute(
            SECRET=self.secret, VICTIM=self.victim, FOLDER=self.folder, PARENT=os.getpid(),
            TCP=outside.tcp.getsockname()[1], UDP=outside.udp.getsockname()[1],
            ABSTRACT=outside.abstract.getsockname().decode().lstrip("\0"),
            NUL="\0", SURROGATE="\ud800", LARGE="x" * 5_000_000)

    def changed(self) -> bool:
        return self._snapshot() != self.before

    def _snapshot(self) -> list:
        def facts(path):
            found = path.stat()
            content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
            return path.name, found.st_mode, found.st_uid, found.st_nlink, found.st_mtime, content

        return sorted(facts(path) for path in self.folder.iterdir())


def processes_of(pid: int) -> list[int]:
    """Supervisors and children of process `pid`'s sandbox; its launcher too, once it is nobody's child any more."""
    return [process for process, parent in _sandboxed(pid).items() if parent != pid]


def launchers_of(pid: int) -> list[int]:
    return [process for process, parent in _sandboxed(pid).items() if parent == pid]


def _sandboxed(pid: int) -> dict[int, int]:
    """Process -> its parent, of all whose command line says that `pid` owns them."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
            except OSError:  # it has just ended
                continue
            if f"owner={pid}".encode() in words:
                found[int(entry.name)] = parent
    return found


def scratch_folders(pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"nanochat-sandbox-{pid}-*"))


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def attempt(outside: Outside, expectation: str, text: str) -> str:
    """Run one program; return "" if it was held, else what went wrong."""
    canary = outside.canary()
    prelude = (HERE / "prelude.txt").read_text(encoding="utf-8")
    limits = ENDLESS if "timeout" in expectation else OTHERS
    started = time.monotonic()
    try:
        result = sandbox.run(prelude + canary.fill(text), limits=limits)
    except BaseException:
        return f"raised {traceback.format_exc(limit=-3)}"
    seconds = time.monotonic() - started
    said = result.stdout + result.stderr
    faults = {
        "told a secret": outside.secret in said,
        "escaped": "ESCAPED" in said,
        "changed a file": canary.changed(),
        f"took {seconds:.1f} s": seconds > limits.seconds + LATE_SECONDS,
        f"kept {len(said)} characters": max(len(result.stdout), len(result.stderr)) > limits.output_bytes,
        f"ended by {result.ended}, code {result.code}": not as_expected(expectation, result),
    }
    wrong = [fault for fault, is_so in faults.items() if is_so]
    return f"{'; '.join(wrong)}: {result.stdout[-200:]!r} {result.stderr[-200:]!r}" if wrong else ""


def as_expected(expectation: str, result: sandbox.Result) -> bool:
    names = {result.ended}
    if result.ended == "exit":
        names = {"ok" if result.code == 0 else "error"}
        if result.code == 0 and "held" in result.stdout:
            names.add("held")
    return bool(names & set(expectation.split("|")))


def run_all(chosen: dict[str, tuple[str, str]], threads: int = 8) -> dict[str, str]:
    """Return name -> fault ("" when held) of every program, and under "outside" what reached this process."""
    outside = Outside()
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda item: attempt(outside, *item), chosen.values())
        faults = dict(zip(chosen, results, strict=True))
    faults["outside"] = "; ".join(outside.faults())
    shutil.rmtree(outside.folder)
    return faults


# --- as another user --------------------------------------------------------------------------------


def in_fork(work, *, as_nobody: bool, environment: dict[str, str] | None = None):
    """Return work()'s result, JSON, from a forked process, which hostile programs may shoot at; as uid 65534 if asked
    for. The fork leaves its parent's signal handlers, environment and caches alone."""
    readable, writable = os.pipe()
    child = fork()
    if child == 0:
        try:
            os.environ.update(environment or {})
            os.environ.pop("NANOCHAT_BASE_DIR", None)
            sandbox._tried.cache_clear()
            warnings.simplefilter("ignore", UserWarning)
            if as_nobody:
                become_nobody()
            answer = {"value": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with open(writable, "w", encoding="utf-8") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writable)
    with open(readable, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(child, 0)
    assert text, "the forked process was killed"
    answer = json.loads(text)
    assert "error" not in answer, answer["error"]
    return answer["value"]


def fork() -> int:
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; ours use none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def become_nobody() -> None:
    """Give up root for uid 65534. An interpreter or a checkout in a folder of root's alone is first made reachable."""
    needed = [os.path.realpath(path) for path in (sys.base_prefix, HERE.parent.parent)]
    closed = {path: hidden_by(path)[-1] for path in needed if hidden_by(path)}
    if closed:
        lockdown._call("unshare", lockdown._CLONE_NEWNS)
        lockdown._call("mount", b"none", b"/", None, lockdown._MS_REC | lockdown._MS_PRIVATE, None)
        reveal(closed)
    os.setgroups([])
    os.setresgid(lockdown.NOBODY, lockdown.NOBODY, lockdown.NOBODY)
    os.setresuid(lockdown.NOBODY, lockdown.NOBODY, lockdown.NOBODY)


def hidden_by(path: str) -> list[Path]:
    """The folders above `path` that only their owner may pass, the topmost last."""
    return [parent for parent in Path(path, "x").parents if not parent.stat().st_mode & 0o001]


def reveal(closed: dict[str, Path]) -> None:
    """In this process's own mount namespace, put a readable folder in the place of each that hides a path, with the
    path bound into it."""
    asides = {path: tempfile.mkdtemp(prefix="hostile-reveal-") for path in closed}
    for path, aside in asides.items():
        lockdown._call("mount", os.fsencode(path), os.fsencode(aside), None, lockdown._MS_BIND, None)
    for hiding in set(closed.values()):
        lockdown._mount_tmpfs(os.fspath(hiding), "mode=755")
    for path, aside in asides.items():
        os.makedirs(path)
        lockdown._call("mount", os.fsencode(aside), os.fsencode(path), None, lockdown._MS_BIND, None)
        lockdown._call("umount2", os.fsencode(aside), lockdown._MNT_DETACH)
        os.rmdir(aside)
