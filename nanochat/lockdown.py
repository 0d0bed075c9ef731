"""Locks processes down and runs untrusted Python in them. The parent's side is nanochat/sandbox.py.

Runs as a program of a fresh interpreter (`python -I -S`), never inside ours. Three kinds of process: a launcher, which
forks a supervisor for every program that it is sent; the supervisor, which waits, kills what is left and reports how it
ended; and the supervisor's child, which gives up everything it can and executes the text. The status socket is a lease:
when our side lets go of it, whichever way, the supervisor ends its child. What the child gives up:

    namespaces    own root of read-only library folders and a tmpfs with bounded bytes and inodes; no /proc, no network
    rlimits       memory, CPU, file size, descriptors, no core, no further process
    identity      uid and gid 65534 when started by root, no groups, no capability, no_new_privs, not dumpable
    Landlock      files beneath the library folders (read) and the scratch folder (write), no TCP, no signal outside
    seccomp       allow-list of system calls, built by the parent

Whatever was asked for and cannot be had ends the child before the text is looked at. The launcher holds nothing of ours
but what it imports, so a fork of it is as good as a new interpreter, and cheaper. Programs of one launcher share
its memory layout and its seed of string hashes.
"""

import _signal
import _sitebuiltins
import _socket
import builtins
import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import sys
import typing  # noqa: F401 - like json it costs milliseconds, and most programs want it

NOBODY = 65534
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on x86_64 and aarch64, like these
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 424, 434  # os.pidfd_open is missing where Python was built on an old system

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38

# Landlock's rights in the order of their bits; later kernels know more of them.
(_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE, _MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK,
 _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM, _REFER, _TRUNCATE, _IOCTL_DEV) = (1 << bit for bit in range(16))
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
_OF_FILES = _READ_FILE | _WRITE_FILE | _TRUNCATE
_READ = _READ_FILE | _READ_DIR
_WRITE = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> int:
    """Call libc's `name`, integers as longs. Raises OSError on -1."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


# --- the launcher -----------------------------------------------------------------------------------

MAX_MESSAGE, DESCRIPTORS = 1 << 17, ("program", "stdin", "stdout", "stderr", "status", "channel")


def main() -> None:
    """Fork a supervisor for every message on standard input, a socket, until it closes with our parent's death.

    A message is a JSON object (see sandbox.Child) with the descriptors above, the last of them optional.
    """
    os.setsid()  # away from the terminal's Ctrl-C
    os.chdir("/")
    os.closerange(3, min(resource.getrlimit(resource.RLIMIT_NOFILE)[1] % (1 << 64), 1 << 20))
    builtins.exit, builtins.quit = (_sitebuiltins.Quitter(name, "Ctrl-D") for name in ("exit", "quit"))  # -S has none
    requests, launcher = _socket.socket(fileno=0), os.getpid()
    gc.freeze()  # a collection writes to every object: 2 ms of copied pages when a child ends
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the kernel reaps supervisors
    while True:
        message, ancillary, _, _ = requests.recvmsg(MAX_MESSAGE, _socket.CMSG_SPACE(4 * len(DESCRIPTORS)))
        if not message:
            os._exit(0)
        numbers = memoryview(b"".join(data for _, _, data in ancillary)).cast("i").tolist()
        try:
            forked = os.fork()
        except OSError as error:
            os.write(numbers[4], f"error fork: {error}".encode())
            forked = -1
        if forked == 0:
            requests.detach()
            _supervisor(json.loads(message), dict(zip(DESCRIPTORS, numbers)), launcher)
        for number in numbers:
            os.close(number)


# --- the supervisor ---------------------------------------------------------------------------------


def _supervisor(options: dict, descriptors: dict[str, int], launcher: int) -> None:
    """Lock a child down as `options` say and run the program in it. The first message on the status socket is a
    descriptor of this process."""
    status = descriptors["status"]
    _call("prctl", _PR_SET_PDEATHSIG, _signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the line above
        os._exit(1)
    os.setsid()
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)  # or it could not wait for the child
    try:
        supervisor = _call("syscall", _PIDFD_OPEN, os.getpid(), 0)
        _send(supervisor, status)
        if options["namespaces"]:
            _leave_namespaces(own_user=options["namespaces"] == "user")
        else:
            _call("prctl", _PR_SET_CHILD_SUBREAPER, 1)
        child = os.fork()
    except OSError as error:
        os.write(status, f"error {error}".encode())
        os._exit(1)
    if child:
        _supervise(child, status, options["namespaces"])
    _child(options, descriptors, supervisor)


def _send(fd: int, socket: int) -> None:
    sender = _socket.socket(fileno=socket)
    sender.sendmsg([b"descriptor"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))])
    sender.detach()


def _supervise(child: int, status: int, namespaces: str) -> None:
    os.closerange(0, status)  # the pipes must end with the child
    os.closerange(status + 1, 256)
    ended = _call("syscall", _PIDFD_OPEN, child, 0)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(status, 0)  # that is, until nobody holds its other end
    if ended not in dict(poll.poll()):
        os.kill(child, _signal.SIGKILL)
    _, how, usage = os.wait4(child, 0)
    if not namespaces:
        _kill_descendants()
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)  # where nobody listens any more
    os.write(status, f"ended {how} {usage.ru_utime + usage.ru_stime}".encode())
    os._exit(0)


def _kill_descendants() -> None:
    """Kill and reap until none is left; as subreaper this process inherits every orphan among them."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            children = file.read().split()
        if not children:
            return
        for pid in map(int, children):
            os.kill(pid, _signal.SIGKILL)
            os.waitpid(pid, 0)


def _leave_namespaces(own_user: bool) -> None:
    """Leave the host's namespaces; the next child is process 1 of a new one, with which all its descendants die."""
    uid, gid = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    _call("unshare", flags | (_CLONE_NEWUSER if own_user else 0))
    if own_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)


# --- the child --------------------------------------------------------------------------------------


def _child(options: dict, descriptors: dict[str, int], supervisor: int) -> None:
    # out of the channel's way
    status, supervisor = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 32) for fd in (descriptors["status"], supervisor))
    try:
        with open(descriptors["program"], "rb") as file:
            source = file.read().decode("utf-8", "surrogatepass")
        _open_streams(descriptors)
        _lock(options, descriptors.get("channel"), status, supervisor)
    except BaseException as error:
        os.write(status, f"error {error!r}".encode())
        os._exit(1)
    os.close(status)
    _execute(source)
    sys.exit()  # never back into the launcher's loop


def _open_streams(descriptors: dict[str, int]) -> None:
    """Make new standard streams as an interpreter in UTF-8 mode does; the launcher's are of its own descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(descriptors[name], number)
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", newline="\n", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", errors="surrogateescape", newline="\n", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", newline="\n", closefd=False)


def _lock(options: dict, channel: int | None, status: int, supervisor: int) -> None:
    """Give up everything that `options` names, in the one order in which each step is still allowed. What stays open
    is standard input and output, `channel` as 3, and `status`, which the caller closes."""
    view, scratch, limits = options["view"], options["scratch"], options["limits"]
    if options["namespaces"]:
        _new_root(view, scratch, limits["file_bytes"], limits["files"])
    os.chdir(scratch)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    _set_rlimits(limits["memory_bytes"], limits["cpu_seconds"], limits["file_bytes"])
    if options["drop_uid"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _drop_capabilities()
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 0)
    _call("prctl", _PR_SET_PDEATHSIG, _signal.SIGKILL)  # setresuid cleared it
    if has_ended(supervisor, 0):  # before the line above
        os._exit(1)
    if options["landlock"]:
        _restrict_files(options["landlock"], view, scratch)
    if channel is not None:
        os.dup2(channel, 3)
    os.closerange(3 if channel is None else 4, status)
    os.closerange(status + 1, 1 << 16)
    if options["seccomp"]:
        _filter_syscalls(bytes.fromhex(options["seccomp"]))


def _new_root(view: list[str], scratch: str, file_bytes: int, files: int) -> None:
    """Make a small tmpfs the root, with `view` bound read-only, a bounded tmpfs at `scratch` and nothing else."""
    sources = {path: os.path.realpath(path) for path in view}
    umask = os.umask(0o666)  # the folders on the way can be passed, not listed: their names tell where we are installed
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _mount_tmpfs("/tmp", "mode=111,size=1m,nr_inodes=1k")
    os.mkdir("/tmp/host")
    _call("pivot_root", b"/tmp", b"/tmp/host")
    os.chdir("/")
    for path, source in sources.items():
        _expose(path, "/host" + source)
    os.makedirs(scratch)
    _mount_tmpfs(scratch, f"mode=700,uid={NOBODY},gid={NOBODY},size={file_bytes},nr_inodes={files + 1}")
    _call("umount2", b"/host", _MNT_DETACH)
    os.rmdir("/host")
    os.umask(umask)
    _call("mount", b"none", b"/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, None)


def _mount_tmpfs(path: str, settings: str) -> None:
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", _MS_NOSUID | _MS_NODEV, settings.encode())


def _expose(path: str, source: str) -> None:
    """Bind the folder or file `source` read-only to `path`."""
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    _call("mount", os.fsencode(source), os.fsencode(path), None, _MS_BIND | _MS_REC, None)
    # flags of the host's mount are locked in a user namespace: a remount must repeat them
    kept = os.statvfs(path).f_flag & (_MS_NODEV | _MS_NOEXEC)
    _call("mount", b"none", os.fsencode(path), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | kept, None)


def _set_rlimits(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    limits = {"AS": memory_bytes, "CPU": cpu_seconds, "FSIZE": file_bytes, "NOFILE": 64, "CORE": 0, "NPROC": 0,
              "MEMLOCK": 0, "MSGQUEUE": 0, "STACK": 8 << 20}
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))  # soft = hard: SIGXCPU could be caught, SIGKILL cannot


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    _call("capset", header, (ctypes.c_uint32 * 6)())


def _restrict_files(abi: int, view: list[str], scratch: str) -> None:
    """Landlock: read beneath `view`, write beneath `scratch`, nothing else; no TCP (ABI 4), no signal (ABI 6)."""
    handled = (1 << _RIGHTS_OF_ABI.get(abi, 16)) - 1
    fields = [handled] + ([3] if abi >= 4 else []) + ([3] if abi >= 6 else [])  # bind, connect; sockets, signals
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    ruleset = _call("syscall", LANDLOCK_CREATE, attributes, ctypes.sizeof(attributes), 0)
    for path, rights in [*((path, _READ) for path in view), ("/dev/null", _OF_FILES), (scratch, _WRITE)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights &= handled & (-1 if os.path.isdir(path) else _OF_FILES)
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        _call("syscall", LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(fd)
    _call("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _filter_syscalls(bpf: bytes) -> None:
    program = _FilterProgram(len(bpf) // 8, bpf)
    _call("prctl", _PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


def has_ended(pidfd: int, seconds: float | None = None) -> bool:
    """Wait for the end of the process of a pidfd, at most so long, and return whether it came."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1e3 * seconds))


def kill(pidfd: int) -> None:
    """Kill the process of a pidfd, unless it has ended."""
    try:
        _call("syscall", _PIDFD_SEND_SIGNAL, pidfd, _signal.SIGKILL, None, 0)
    except ProcessLookupError:
        pass


def _execute(source: str) -> None:
    """Run `source` as __main__ and leave as an interpreter would: traceback and code 1, or the program's own code."""
    module = type(sys)("__main__")
    sys.modules["__main__"], sys.argv, sys.orig_argv = module, ["program"], ["program"]
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next  # without this file's frame
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
