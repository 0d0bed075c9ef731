"""The sandbox runs ordinary programs as an interpreter would, and holds hostile ones. See tests/hostile/watch.py."""

import ast
import json
import os
import signal
import struct
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyseccomp
import pytest
from hostile import watch

from nanochat import launcher, lockdown, sandbox
from nanochat.common import UserError
from nanochat.sandbox import Limits, Result, run

LIMITS = Limits(seconds=20, cpu_seconds=20)
ROOT = Path(__file__).resolve().parent.parent


def ordinary(code, **kwargs):
    return run(code, **{"limits": LIMITS, **kwargs})


# --- ordinary programs ------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "result"), [
    ("print('hé')", Result("hé\n", "", "exit", 0)),
    ("", Result("", "", "exit", 0)),
    ("import sys; print(input() + sys.stdin.read())", Result("onetwo\n", "", "exit", 0)),
    ("import sys; sys.exit(3)", Result("", "", "exit", 3)),
    ("import sys; sys.exit('bye')", Result("", "bye\n", "exit", 1)),
    ("1 / 0", Result("", 'Traceback (most recent call last):\n  File "<program>", line 1, in <module>\n'
                         "ZeroDivisionError: division by zero\n", "exit", 1)),
    ("bytes(10 ** 12)", Result("", 'Traceback (most recent call last):\n  File "<program>", line 1, in <module>\n'
                                   "MemoryError\n", "memory", 1)),
    ("import ctypes; ctypes.string_at(0)", Result("", "", "killed", -signal.SIGSEGV)),
    ("import atexit; atexit.register(print, 'last'); print('first')", Result("first\nlast\n", "", "exit", 0)),
    ("import os; os.write(1, b'a\\xffb')", Result("a\ufffdb", "", "exit", 0)),
    ("print(__name__); import __main__; print(__main__.__dict__ is globals())",
     Result("__main__\nTrue\n", "", "exit", 0)),
    ("import sys; print(sys.stdout.encoding, sys.stdin.errors, sys.stdout.isatty(), sys.stdin.fileno())",
     Result("utf-8 surrogateescape False 0\n", "", "exit", 0)),
    ("print('kept'); exit(4)", Result("kept\n", "", "exit", 4)),
])
def test_a_program_runs_as_an_interpreter_would(code, result):
    assert ordinary(code, stdin="one\ntwo") == result


def test_line_ends_arrive_and_leave_as_they_are():
    assert ordinary("import sys; print(repr(sys.stdin.read()), end='\\r\\n')", stdin="a\r\nb\rc\n").stdout == \
        "'a\\r\\nb\\rc\\n'\r\n"


def test_a_program_cannot_see_where_we_are_installed():
    code = "import sys; print(sys.modules, sys.path_importer_cache, sys.orig_argv, sys._getframe(1).f_code)"
    assert os.fspath(ROOT) not in ordinary(code).stdout


def test_modules_of_the_standard_library_import():
    names = ("asyncio bisect collections copy dataclasses datetime decimal fractions functools hashlib heapq itertools "
             "json math operator random re sqlite3 ssl statistics string tempfile typing unittest zlib zoneinfo")
    assert ordinary(f"import {', '.join(names.split())}\nprint('imported')").stdout == "imported\n"


def test_files_are_a_programs_own_and_gone_afterwards():
    code = ("import os, tempfile\nprint(os.listdir())\nopen('a', 'w').write('x')\nos.mkdir('b')\n"
            "os.rename('a', 'b/a')\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x')\n"
            "print(open('b/a').read(), os.listdir())")
    assert [ordinary(code).stdout for _ in range(2)] == ["[]\nx ['b']\n"] * 2


def test_the_environment_is_empty_but_for_folders_and_language(monkeypatch):
    monkeypatch.setenv("HOSTILE_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    found = json.loads(ordinary("import json, os, sys; print(json.dumps([dict(os.environ), sys.path]))").stdout)
    assert set(found[0]) == {"HOME", "TMPDIR", "LANG"}
    assert not [path for path in found[1] if path.startswith(os.fspath(ROOT)) or path.endswith("-packages")]


IDENTITY = """
import ctypes, os
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[9] * 6)
assert ctypes.CDLL(None).capget(header, data) == 0
print([list(data), os.getresuid(), os.getresgid(), os.getgroups()])
"""


def identity(namespaces, drop_uid):
    """Capabilities, uids, gids and groups of a program that only this isolates, started by a member of group 4."""
    def work():
        if os.geteuid() == 0:
            os.setgroups([4])
        with sandbox.Child(IDENTITY, limits=LIMITS, means=sandbox.Means(namespaces, drop_uid)) as child:
            return ast.literal_eval(child.wait().stdout)

    return watch.in_fork(work, as_nobody=False)


def test_a_program_owns_nothing_and_may_nothing():
    means = sandbox.available()
    capabilities, uids, gids, groups = identity(means.namespaces, means.drop_uid)
    assert capabilities == [0] * 6
    if means.drop_uid:
        assert (uids, gids, groups) == ([65534] * 3, [65534] * 3, [])
    if "userns" not in sandbox.probe()["missing"]:
        assert identity("user", False)[:3] == [[0] * 6, [65534] * 3, [65534] * 3]
    assert identity("", False)[0] == [0] * 6


def test_large_programs_and_inputs_arrive_whole():
    assert ordinary("import sys; print(len(sys.stdin.read()))", stdin="é" * 2_000_000).stdout == "2000000\n"
    assert ordinary(f"x = '{'y' * 2_000_000}'\nprint(len(x))").stdout == "2000000\n"


def test_output_is_cut_at_the_limit_of_each_stream():
    limits = Limits(seconds=20, output_bytes=1000)
    assert run("print('x' * 998)", limits=limits) == Result("x" * 998 + "\n", "", "exit", 0)
    flood = run("import sys\nprint('kept', flush=True)\nprint('x' * 10**6, file=sys.stderr)", limits=limits)
    assert flood == Result("kept\n", "x" * 1000, "output", -signal.SIGKILL)
    assert run("print('x' * 1001)", limits=limits).ended == "output"


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1e9)",
                                  "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"])
def test_wall_time_ends_a_program_and_keeps_what_it_said(code):
    assert run(f"print('before', flush=True)\n{code}", limits=Limits(seconds=0.5)) == \
        Result("before\n", "", "timeout", -signal.SIGKILL)


def test_cpu_time_ends_a_program():
    assert run("while True: pass", limits=Limits(seconds=60, cpu_seconds=1)).ended == "timeout"


def test_limits_are_the_callers():
    code = "b = bytearray(100 * 2**20)\nopen('a', 'wb').write(bytes(2**20))\nprint(1)"
    assert run(code, limits=LIMITS).stdout == "1\n"
    assert run(code, limits=Limits(memory_bytes=80 * 2**20)).ended == "memory"
    assert "OSError" in run(code, limits=Limits(file_bytes=2**19)).stderr


def test_threads_run_programs_side_by_side():
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda n: ordinary(f"print({n} ** 2)").stdout, range(16)))
    assert outputs == [f"{n * n}\n" for n in range(16)]


# --- levels -----------------------------------------------------------------------------------------

KEY_PROGRAMS = [("files", name) for name in ("read_secret", "overwrite", "unlink", "chmod", "stat")]
KEY_PROGRAMS += [("system", name) for name in ("tcp_connect", "udp_send", "abstract_socket", "signal_parent", "execv",
                                               "process_scan")] + [("memory", "memfd")]
DISABLED = [",".join(name for bit, name in enumerate(("landlock", "seccomp", "userns")) if number >> bit & 1)
            for number in range(8)]


def expected_level(disabled):
    missing = set(disabled.split(",")) | set(sandbox.probe()["missing"])
    if "seccomp" in missing:
        return 1
    return 3 if "landlock" not in missing else 1 if "userns" in missing else 2


def key_faults(disabled, as_nobody):
    chosen = {name: watch.programs(category)[name] for category, name in KEY_PROGRAMS}

    def work():
        return sandbox.level(), sandbox.probe()["missing"], watch.run_all(chosen)

    return watch.in_fork(work, as_nobody=as_nobody, environment={"NANOCHAT_SANDBOX_DISABLE": disabled})


def users():
    return [False, True] if os.geteuid() == 0 else [False]


@pytest.mark.slow
@pytest.mark.parametrize("as_nobody", users())
@pytest.mark.parametrize("disabled", DISABLED[1:-1])
def test_each_level_is_named_and_holds_what_it_says(disabled, as_nobody):
    level, missing, faults = key_faults(disabled, as_nobody)
    assert level == expected_level(disabled)
    assert {name for name in disabled.split(",") if name} <= set(missing)
    escaped = {name for name, fault in faults.items() if fault}
    if level >= 2:
        assert escaped <= ({"stat"} if "userns" in disabled else set()), faults
    elif "seccomp" not in disabled:
        assert not escaped & {"tcp_connect", "signal_parent", "execv", "memfd"}, faults
    else:
        assert not escaped & {"read_secret", "overwrite", "unlink"}, faults  # an own root or Landlock is left


@pytest.mark.parametrize("as_nobody", users()[-1:])
def test_without_any_means_every_key_program_escapes_and_is_seen(as_nobody):
    level, _, faults = key_faults(DISABLED[-1], as_nobody)
    assert level == 1
    assert [name for name, fault in faults.items() if not fault] == []
    assert "told a secret" in faults["read_secret"] and "changed a file" in faults["unlink"]
    assert "signal" in faults["outside"] and "connection" in faults["outside"] and "packet" in faults["outside"]


def test_the_weakest_level_warns(monkeypatch):
    monkeypatch.setenv("NANOCHAT_SANDBOX_DISABLE", "seccomp")
    with pytest.warns(UserWarning, match="level 1"):
        assert ordinary("print(1)").stdout == "1\n"


def test_without_libseccomp_the_level_says_so(monkeypatch):
    def absent(architecture=None):
        raise RuntimeError("Unable to find libseccomp")

    monkeypatch.setattr(sandbox, "syscall_filter", absent)
    monkeypatch.setenv("NANOCHAT_SANDBOX_DISABLE", "nothing")  # a key of the cache that no other test has
    assert sandbox.level() == 1
    assert sandbox.probe()["missing"]["seccomp"] == "Unable to find libseccomp"


def test_a_lock_that_fails_ends_the_child_before_the_program():
    unusable = sandbox.Means(landlock=7, seccomp=b"\xff" * 8)
    with sandbox.Child("print('ran')", limits=LIMITS, means=unusable) as child:
        with pytest.raises(UserError, match="could not lock its child down: .*Invalid argument"):
            child.wait()


def test_an_interpreter_that_cannot_start_is_named(monkeypatch):
    available = sandbox.available()
    monkeypatch.setattr(launcher, "interpreter", lambda: "/no/such/python")
    monkeypatch.setattr(launcher, "_launcher", None)
    with pytest.raises(UserError, match="/no/such/python"):
        sandbox.Child("pass", means=available)


def test_the_probe_prints_json(monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_SANDBOX_DISABLE", "landlock,seccomp")
    monkeypatch.setattr(sys, "argv", ["sandbox", "--probe"])
    sandbox.main()
    found = json.loads(capsys.readouterr().out)
    assert found["level"] == 1 and found["missing"]["landlock"] == found["missing"]["seccomp"] == "disabled"


# --- hostile programs -------------------------------------------------------------------------------


def hold_all(figure, as_nobody, disabled="", known=frozenset()):
    if sandbox.level() < 2:
        pytest.skip(f"nothing holds at level {sandbox.level()}: {sandbox.probe()['missing']}")
    chosen = {f"{category}/{name}": program for category in watch.CATEGORIES
              for name, program in watch.programs(category).items()}
    assert len(chosen) >= 190
    faults = watch.in_fork(lambda: watch.run_all(chosen), as_nobody=as_nobody,
                           environment={"NANOCHAT_SANDBOX_DISABLE": disabled})
    who = "uid 65534" if as_nobody else f"uid {os.geteuid()}"
    held = {category: [not faults[name] for name in chosen if name.startswith(f"{category}/")]
            for category in watch.CATEGORIES}
    parts = ", ".join(f"{category} {sum(each)}/{len(each)}" for category, each in held.items())
    figure(f"hostile programs held, as {who}, {f'without {disabled}' if disabled else 'with all means'}: "
           f"{len(chosen) - sum(map(bool, faults.values()))}/{len(chosen)} ({parts})")
    assert {name: fault for name, fault in faults.items() if fault and name not in known} == {}


def test_every_hostile_program_is_held(figure):
    hold_all(figure, as_nobody=False, known=frozenset() if sandbox.probe()["namespaces"] else frozenset({"files/stat"}))


@pytest.mark.slow
@pytest.mark.parametrize(("disabled", "as_nobody"), [
    (disabled, as_nobody) for disabled in ("", "landlock", "userns") for as_nobody in users() if disabled or as_nobody])
def test_every_hostile_program_is_held_with_less(figure, disabled, as_nobody):
    hold_all(figure, as_nobody, disabled, known={"files/stat"} if disabled == "userns" else set())


# --- the parts --------------------------------------------------------------------------------------

X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003
ALLOW, KILL, EPERM = 0x7FFF0000, 0x80000000, 0x00050001
NEVER = """socket socketpair connect bind sendto sendmsg clone clone3 fork vfork execve execveat kill tkill tgkill
    pidfd_send_signal pidfd_open ptrace process_vm_readv process_vm_writev prctl seccomp setuid setresuid setrlimit
    mount umount2 unshare setns chroot pivot_root chmod fchmod fchmodat chown fchown utimensat utime setxattr link
    symlink mknod truncate memfd_create shmget mq_open io_uring_setup keyctl add_key bpf perf_event_open userfaultfd
    inotify_init1 fanotify_init epoll_create1 timer_create clock_settime settimeofday setpriority sched_setaffinity
    setsid setpgid personality reboot init_module kexec_load open_by_handle_at name_to_handle_at syslog flock""".split()


def bpf(program, machine, number, *arguments):
    """Interpret a seccomp filter, as the kernel would for one call. machine: an AUDIT_ARCH word."""
    data = struct.pack("<IIQ6Q", number, machine, 0, *(*arguments, *[0] * (6 - len(arguments))))
    jumps = {0x15: lambda a, k: a == k, 0x25: lambda a, k: a > k, 0x35: lambda a, k: a >= k, 0x45: lambda a, k: a & k}
    at = accumulator = 0
    while True:
        code, yes, no, k = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            at += k
        elif code == 0x06:
            return k
        else:
            at += yes if jumps[code](accumulator, k) else no


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
def test_the_filter_allows_its_list_and_kills_other_machines(machine):
    program = sandbox.syscall_filter(machine)
    allowed = {pyseccomp.resolve_syscall(machine, name) for name in sandbox._ALLOWED}
    never = {pyseccomp.resolve_syscall(machine, name) for name in NEVER}
    never = {number for number in never if number >= 0}
    assert len(never) > 50 and not allowed & never
    for number in range(512):
        assert bpf(program, machine, number) == (ALLOW if number in allowed else conditional(machine, number)), number
    for other in {X86_64, AARCH64, I386} - {machine}:
        assert {bpf(program, other, number) for number in range(512)} == {KILL}
    if machine == X86_64:
        assert {bpf(program, machine, 0x40000000 | number) for number in range(512)} == {KILL}


def conditional(machine, number):
    """What a call with six zeros gives that is allowed for some arguments only."""
    harmless = {pyseccomp.resolve_syscall(machine, name) for name in ("fcntl", "prlimit64")}
    return ALLOW if number in harmless else EPERM


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
@pytest.mark.parametrize(("name", "arguments", "answer"), [
    ("fcntl", (1, 1), ALLOW), ("fcntl", (1, 4), ALLOW), ("fcntl", (1, 1030), ALLOW), ("fcntl", (1, 5), EPERM),
    ("fcntl", (1, 8), EPERM), ("fcntl", (1, 1031), EPERM), ("fcntl", (1, 2**32 + 8), EPERM),
    ("ioctl", (0, 0x5401), ALLOW), ("ioctl", (0, 0x5412), EPERM), ("ioctl", (0, 0), EPERM),
    ("ioctl", (0, 2**32 + 0x5412), EPERM),
    ("prlimit64", (0, 7, 0, 99), ALLOW), ("prlimit64", (0, 7, 99, 0), EPERM), ("prlimit64", (1, 7, 0, 99), EPERM),
    ("prlimit64", (0, 7, 2**32, 0), EPERM),
])
def test_arguments_decide_where_a_call_can_do_both(machine, name, arguments, answer):
    program = sandbox.syscall_filter(machine)
    assert bpf(program, machine, pyseccomp.resolve_syscall(machine, name), *arguments) == answer


def test_the_machines_own_filter_is_one_of_these():
    assert sandbox.syscall_filter() == sandbox.syscall_filter(pyseccomp.system_arch())


@pytest.mark.parametrize(("abi", "handled"), [(1, 0x1FFF), (2, 0x3FFF), (3, 0x7FFF), (4, 0x7FFF), (5, 0xFFFF),
                                              (9, 0xFFFF)])
def test_landlock_is_asked_for_what_the_kernel_knows(abi, handled, monkeypatch, tmp_path):
    calls = []

    def record(name, *arguments):
        calls.append(arguments)
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(lockdown, "_call", record)
    lockdown._restrict_files(abi, ["/usr", "/dev/null"], os.fspath(tmp_path))
    number, attributes, size, _ = calls[0]
    assert number == lockdown.LANDLOCK_CREATE and attributes[0] == handled
    assert size == 8 * len(attributes) == 8 * (1 + (abi >= 4) + (abi >= 6))
    granted = [int.from_bytes(rule[3][:8], sys.byteorder) for rule in calls[1:-1]]
    assert len(granted) == 4 and not any(rights & ~handled for rights in granted)
    assert granted[0] == 0b1100  # read files, read folders
    assert calls[-1][0] == lockdown.LANDLOCK_RESTRICT


def test_a_scratch_folder_of_any_shape_is_removed(tmp_path):
    # in memory where there is such a folder: thousands of rmdir take seconds on some disks
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path))
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1500):  # deeper than the recursion limit and than the longest path
        os.mkdir("deeper", dir_fd=here)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    (folder / "closed").mkdir()
    (folder / "closed" / "file").write_text("x")
    (folder / "closed").chmod(0)
    (folder / "link").symlink_to("/usr")
    for name in "abc":
        (folder / "wide" / name).mkdir(parents=True)
        (folder / "wide" / name / "file").write_text("x")
    sandbox._remove(os.fspath(folder))
    assert not folder.exists() and Path("/usr").exists()


def test_files_are_counted_without_following_links(tmp_path):
    (tmp_path / "usr").symlink_to("/usr")
    (tmp_path / "a").write_bytes(bytes(8192))
    assert not sandbox._exceeds(os.fspath(tmp_path), Limits(files=2, file_bytes=8192))
    assert sandbox._exceeds(os.fspath(tmp_path), Limits(files=1, file_bytes=8192))
    assert sandbox._exceeds(os.fspath(tmp_path), Limits(files=2, file_bytes=8191))
