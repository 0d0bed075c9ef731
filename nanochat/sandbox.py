"""Runs untrusted Python in a child process that can reach nothing: `run(code)`, for HumanEval and the python tool.

Every program gets an interpreter of its own with the standard library only, an environment of HOME, TMPDIR and LANG, a
scratch folder that goes when it ends, and no network, no second process or thread, and no file outside. What the child
does to itself is in nanochat/lockdown.py; this file starts it, reads its output with a cap, and ends it. What this
machine lets us have decides the level, which `python -m nanochat.sandbox --probe` prints:

    3   seccomp and Landlock (ABI 3 or later, Linux 6.2), with namespaces too where they are allowed
    2   seccomp and namespaces
    1   resource limits and another uid at best: holds accidents, not intent. Never for other people's text
    0   not even that

Not promised at any level: bugs of the kernel or CPU, side channels. Without namespaces, names and sizes of files
outside can be seen (not their content), and inodes are counted only every 50 ms.
"""

import argparse
import ctypes
import dataclasses
import errno
import fcntl
import functools
import json
import os
import platform
import selectors
import signal
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass

from nanochat import lockdown
from nanochat.common import UserError
from nanochat.launcher import interpreter, launch

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Limits:
    """What one program may use: wall and CPU seconds, bytes of address space, bytes kept of stdout and of stderr each,
    bytes and number of files (folders count) in its scratch folder."""

    seconds: float = 5.0
    cpu_seconds: int = 5
    memory_bytes: int = 256 * MIB
    output_bytes: int = 64 * KIB
    file_bytes: int = 16 * MIB
    files: int = 256


@dataclass(frozen=True)
class Result:
    """How a program ended.

    ended: "exit" (by itself, or by an exception), "timeout" (wall or CPU seconds), "memory" (MemoryError), "output"
    (more than output_bytes on a stream), "files" (too many, without namespaces) or "killed" (by a signal).
    code: exit code, or minus the signal's number. Text is decoded with replacement characters.
    """

    stdout: str
    stderr: str
    ended: str
    code: int


def run(code: str, *, stdin: str = "", limits: Limits = Limits()) -> Result:
    """Run untrusted Python. Whatever the code does is in the result; UserError when this machine cannot isolate."""
    with Child(code, stdin=stdin, limits=limits) as child:
        return child.wait()


# --- one child --------------------------------------------------------------------------------------

_SCRATCH = "/scratch"  # inside an own root; elsewhere a temporary folder
_POLL_SECONDS = 0.05  # between counts of the files in a temporary folder


class Child:
    """A locked-down interpreter at work; leaving the `with` block ends it, as does the end of this process.

    channel: a descriptor that the program finds as its number 3. quiet: what it prints is dropped.
    """

    _process = _folder = None
    _streams = ()

    def __init__(self, code: str, *, stdin: str = "", limits: Limits = Limits(), channel: int | None = None,
                 quiet: bool = False, means: "Means | None" = None):
        means = means or available()
        self.limits, self.deadline = limits, time.monotonic() + limits.seconds
        self._folder = None if means.namespaces else _scratch_folder(means.drop_uid)
        options = {"namespaces": means.namespaces, "drop_uid": means.drop_uid, "landlock": means.landlock,
                   "seccomp": means.seccomp.hex(), "view": _view(), "scratch": self._folder or _SCRATCH,
                   "limits": dataclasses.asdict(limits)}
        self._streams, handed = [], []
        try:
            handed += [_sealed_memfd(code), _sealed_memfd(stdin)]
            for _ in ("stdout", "stderr"):
                if quiet:
                    handed.append(os.open(os.devnull, os.O_WRONLY))
                else:
                    stream, sink = os.pipe()
                    self._streams.append(stream)
                    handed.append(sink)
            self._status, self._process = launch(options, handed if channel is None else [*handed, channel])
        finally:
            for fd in handed:
                os.close(fd)
            if self._process is None:
                self.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def __del__(self):
        self.end()

    def wait(self) -> Result:
        """Read what the program prints until it ends or passes a limit, then end it."""
        texts = {stream: bytearray() for stream in self._streams}
        ended, report = self._read(texts)
        self.end()
        stdout, stderr = (bytes(text[:self.limits.output_bytes]).decode("utf-8", "replace")
                          for text in (texts.values() or (b"", b"")))
        return _result(stdout, stderr, ended, report, self.limits)

    def _read(self, texts: dict) -> tuple[str, str]:
        """Fill `texts`; return the limit that was passed, or "" and the supervisor's report."""
        with selectors.DefaultSelector() as selector:
            for source in (self._status, *texts):
                selector.register(source, selectors.EVENT_READ)
            while (left := self.deadline - time.monotonic()) > 0:
                for key, _ in selector.select(min(left, _POLL_SECONDS) if self._folder else left):
                    if key.fileobj == self._status:
                        report = self._status.recv(4096).decode("utf-8", "replace")
                        whole = all([self._drain(stream, text) for stream, text in texts.items()])
                        return ("" if whole else "output"), report
                    chunk = os.read(key.fd, 1 << 16)
                    texts[key.fd] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                    if len(texts[key.fd]) > self.limits.output_bytes:
                        return "output", ""
                if self._folder and _exceeds(self._folder, self.limits):
                    return "files", ""
        return "timeout", ""

    def _drain(self, stream: int, text: bytearray) -> bool:
        """Read what is left in a pipe without ever waiting; return whether it fits the limit."""
        os.set_blocking(stream, False)
        try:
            while len(text) <= self.limits.output_bytes and (chunk := os.read(stream, 1 << 16)):
                text += chunk
        except BlockingIOError:
            pass  # at level 1 a survivor may hold the pipe
        return len(text) <= self.limits.output_bytes

    def end(self) -> None:
        """Kill whatever is left of the program and remove its folder. May be called again."""
        if self._process is not None:
            self._status.shutdown(socket.SHUT_RDWR)  # the supervisor kills its child and reaps it
            if not lockdown.has_ended(self._process, seconds=2):
                lockdown.kill(self._process)
                lockdown.has_ended(self._process)
            self._status.close()
            self._streams.append(self._process)
        while self._streams:
            os.close(self._streams.pop())
        if self._folder:
            _remove(self._folder)
        self._process = self._folder = None


def _result(stdout: str, stderr: str, ended: str, report: str, limits: Limits) -> Result:
    if report.startswith("error"):
        raise UserError(f"the sandbox could not lock its child down: {report.removeprefix('error ')}")
    if ended or not report:  # no report: the supervisor itself was killed
        return Result(stdout, stderr, ended or "killed", -signal.SIGKILL)
    _, status, cpu_seconds = report.split()
    code = os.waitstatus_to_exitcode(int(status))
    if code < 0:
        # at RLIMIT_CPU the kernel kills; what it has booked by then falls short by up to a seventh on a busy machine
        out_of_time = code == -signal.SIGKILL and float(cpu_seconds) > 0.75 * limits.cpu_seconds
        ended = "timeout" if out_of_time else "killed"
    elif code == 1 and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        ended = "memory"
    return Result(stdout, stderr, ended or "exit", code)


def _sealed_memfd(text: str) -> int:
    """Return a descriptor of a file in memory that holds `text` and that nobody can change."""
    fd = os.memfd_create("nanochat-sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


@functools.cache
def _view() -> tuple[str, ...]:
    """What an interpreter reads after its start: standard library and shared libraries."""
    paths = [f"{prefix}/lib" for prefix in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, "/usr", ""))]
    paths += ["/lib64", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null"]
    return tuple(path for path in dict.fromkeys(paths) if os.path.exists(path))


# --- a temporary folder, where namespaces are not to be had -------------------------------------------


def _scratch_folder(for_nobody: bool) -> str:
    folder = tempfile.mkdtemp(prefix=f"nanochat-sandbox-{os.getpid()}-")
    if for_nobody:
        os.chown(folder, lockdown.NOBODY, lockdown.NOBODY)
    return folder


def _exceeds(folder: str, limits: Limits) -> bool:
    """Whether more files or bytes lie beneath `folder` than a program may have; stops counting there."""
    files = size = 0
    for parent, folders, names in os.walk(folder):
        files += len(folders) + len(names)
        for name in names:
            try:
                size += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:  # gone, or in a folder that nobody may read
                continue
        if files > limits.files or size > limits.file_bytes:
            return True
    return False


def _remove(folder: str) -> None:
    """Remove a tree of any shape. shutil.rmtree needs a stack frame and a descriptor per level, and rights to read."""
    here, names = os.open(folder, os.O_RDONLY), []  # the open folder, and the names that lead to it
    while True:
        inner = None
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    inner = entry.name
                    break
                os.unlink(entry.name, dir_fd=here)
        if inner is None and not names:
            break
        if inner is not None:
            os.chmod(inner, 0o700, dir_fd=here)
        below = os.open("..", os.O_RDONLY, dir_fd=here) if inner is None else os.open(inner, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        if inner is None:
            os.rmdir(names.pop(), dir_fd=here)
        else:
            names.append(inner)
    os.close(here)
    os.rmdir(folder)


# --- what this machine allows -----------------------------------------------------------------------

# System calls of a single-threaded interpreter that computes, and reads and writes files. What is missing fails with
# EPERM: sockets, processes, threads, signals to others, modes and times of files, anything of the kernel's.
_ALLOWED = """
    read readv pread64 write writev pwrite64 close close_range lseek sendfile fsync fdatasync ftruncate dup dup2 dup3
    open openat creat access faccessat faccessat2 stat lstat fstat newfstatat statx readlink readlinkat getdents64
    getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 pipe pipe2
    brk mmap munmap mprotect mremap madvise
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigpending sigaltstack pause restart_syscall
    alarm setitimer getitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
    poll ppoll select pselect6 futex sched_yield sched_getaffinity getrandom uname sysinfo getrusage getrlimit
    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups wait4 exit exit_group
""".split()
_TERMINAL_QUESTION, _CLOSE_ON_EXEC, _KEEP_ON_EXEC = 0x5401, 0x5451, 0x5450
_F_DUPFD_CLOEXEC = 1030


def syscall_filter(architecture: int | None = None) -> bytes:
    """Return the allow-list as a seccomp BPF program, for this machine or a pyseccomp.Arch. Another architecture or
    x32 kills the process. Raises ImportError, RuntimeError or OSError where libseccomp cannot be had."""
    import pyseccomp as seccomp

    built = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    built.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    if architecture is not None:
        built.remove_arch(seccomp.Arch.NATIVE)
        built.add_arch(architecture)
    equal = functools.partial(seccomp.Arg, 1, seccomp.EQ)
    rules = [(name,) for name in _ALLOWED]
    rules += [("ioctl", equal(request)) for request in (_TERMINAL_QUESTION, _CLOSE_ON_EXEC, _KEEP_ON_EXEC)]
    # below F_GETLK: no locks, no owner that would be sent SIGIO
    rules += [("fcntl", seccomp.Arg(1, seccomp.LT, fcntl.F_GETLK)), ("fcntl", equal(_F_DUPFD_CLOEXEC))]
    rules += [("prlimit64", seccomp.Arg(0, seccomp.EQ, 0), seccomp.Arg(2, seccomp.EQ, 0))]  # its own, only reading
    for name, *conditions in rules:
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) != -1:  # -1: newer than this libseccomp
            built.add_rule(seccomp.ALLOW, name, *conditions)
    with tempfile.TemporaryFile() as file:
        built.export_bpf(file)
        file.seek(0)
        return file.read()


@dataclass(frozen=True)
class Means:
    """What a child is locked down with. namespaces: "root", "user" (with a user namespace) or ""."""

    namespaces: str = ""
    drop_uid: bool = False
    landlock: int = 0  # ABI
    seccomp: bytes = b""

    @property
    def level(self) -> int:
        if self.seccomp and self.landlock >= 3:  # before ABI 3 a file could be truncated
            return 3
        return 2 if self.seccomp and self.namespaces else 1


def available() -> Means:
    """Return what works here, tried once. $NANOCHAT_SANDBOX_DISABLE (landlock, seccomp, userns) forgoes some of it."""
    means, _ = _tried(os.environ.get("NANOCHAT_SANDBOX_DISABLE", ""))
    if means is None:
        raise UserError(f"the sandbox needs Linux and a child process that can be limited, got {probe()['missing']}")
    if means.level < 2:
        warnings.warn("the sandbox holds accidents only (level 1): python -m nanochat.sandbox --probe", stacklevel=3)
    return means


def level() -> int:
    """Return how strongly `run` isolates here, 0 to 3 as the module's text says."""
    means, _ = _tried(os.environ.get("NANOCHAT_SANDBOX_DISABLE", ""))
    return means.level if means else 0


def probe() -> dict:
    """Return the level, what it rests on, and a reason for each thing that is missing."""
    means, missing = _tried(os.environ.get("NANOCHAT_SANDBOX_DISABLE", ""))
    found = means or Means()
    return {"level": level(), "namespaces": found.namespaces, "landlock_abi": found.landlock,
            "seccomp_instructions": len(found.seccomp) // 8, "drops_uid": found.drop_uid, "uid": os.geteuid(),
            "kernel": platform.release(), "machine": platform.machine(), "python": interpreter(), "missing": missing}


@functools.cache
def _tried(disabled: str) -> tuple[Means | None, dict[str, str]]:
    """The strongest means that work together, and why others do not."""
    missing = {name.strip(): "disabled" for name in disabled.split(",") if name.strip()}
    if sys.platform != "linux":
        return None, {"linux": sys.platform}
    identities = [("root", True), ("root", False)] if os.geteuid() == 0 else []
    identities += [("user", False)]
    bare = [("", True), ("", False)] if os.geteuid() == 0 else [("", False)]
    for namespaces, drop_uid in ([] if "userns" in missing else identities) + bare:
        means = Means(namespaces, drop_uid)
        if not (fault := _fault(means)):
            break
        missing.setdefault("userns" if namespaces else "child", fault)
    else:
        return None, missing
    if "landlock" not in missing:
        means = _with(means, missing, landlock=_landlock_abi)
    if "seccomp" not in missing:
        means = _with(means, missing, seccomp=syscall_filter)
    return means, missing


def _with(means: Means, missing: dict[str, str], **addition) -> Means:
    """`means` and one more, if it can be made and a child starts with it."""
    (name, make), = addition.items()
    try:
        stronger = dataclasses.replace(means, **{name: make()})
        fault = _fault(stronger)
    except (ImportError, RuntimeError, OSError) as error:
        fault = str(error)
    if fault:
        missing[name] = fault
    return means if fault else stronger


def _landlock_abi() -> int:
    abi = ctypes.CDLL(None, use_errno=True).syscall(lockdown.LANDLOCK_CREATE, None, ctypes.c_long(0), 1)
    if abi < 1:
        raise OSError(f"the kernel has no Landlock ({os.strerror(ctypes.get_errno())})")
    return abi


def _fault(means: Means) -> str:
    """Why a child with these means cannot run a program that imports and writes a file, or ""."""
    # colorsys, because the launcher has not loaded it
    trial = "import colorsys\nwith open('a', 'w') as file: file.write('x')\nprint('works')"
    try:
        with Child(trial, limits=Limits(seconds=20), means=means) as child:
            result = child.wait()
    except UserError as error:
        return str(error)
    return "" if result.stdout == "works\n" else f"{result.ended} {result.code} {result.stderr[-200:]}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probe", action="store_true", required=True, help="print as JSON what isolates here")
    parser.parse_args()
    print(json.dumps(probe(), indent=2))


if __name__ == "__main__":
    main()
