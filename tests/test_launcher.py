"""Whatever happens to a program, its launcher or us, nothing is left running, open or waiting."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hostile import watch

from nanochat import launcher, sandbox
from nanochat.common import UserError
from nanochat.sandbox import Limits, run

LIMITS = Limits(seconds=20, cpu_seconds=20)


def ordinary(code, **kwargs):
    return run(code, **{"limits": LIMITS, **kwargs})


def test_nothing_is_left_open_or_running():
    def mine():
        return (sorted(os.listdir("/proc/self/fd")), threading.active_count(), watch.processes_of(os.getpid()),
                watch.launchers_of(os.getpid()))

    ordinary("pass")
    before = mine()
    for code in ("pass", "while True: pass", "print('x' * 10**6)", "import os; os.close(1)"):
        run(code, limits=Limits(seconds=0.3))
    assert mine() == before and not before[2] and len(before[3]) == 1


def test_the_launcher_keeps_nothing_of_ours_nor_of_the_programs_it_started():
    ordinary("pass")
    os.kill(*watch.launchers_of(os.getpid()), signal.SIGKILL)  # the next one starts beside an inheritable descriptor
    inheritable = os.memfd_create("ours", 0)
    with sandbox.Child("pass", limits=LIMITS) as child:
        assert not os.get_inheritable(child._process)
    os.close(inheritable)
    started, = watch.launchers_of(os.getpid())
    for _ in range(5):
        ordinary("import os; os.environ['A'] = 'b'; open('x', 'w').write('y')")
    assert eventually(lambda: sorted(os.listdir(f"/proc/{started}/fd"), key=int) == ["0", "1", "2"])
    assert ordinary("import os, sys; print('A' in os.environ, os.listdir(), sys.argv)").stdout == \
        "False [] ['program']\n"


def test_a_launcher_that_was_killed_is_replaced():
    ordinary("pass")
    killed, = watch.launchers_of(os.getpid())
    os.kill(killed, signal.SIGKILL)
    with ThreadPoolExecutor(4) as pool:
        assert [r.stdout for r in pool.map(ordinary, ["print(1)"] * 8)] == ["1\n"] * 8
    others = watch.launchers_of(os.getpid())
    assert len(others) == 1 and others != [killed]


def test_a_launcher_that_dies_at_work_ends_its_program():
    with sandbox.Child("while True: pass", limits=LIMITS) as child:
        assert eventually(lambda: len(watch.processes_of(os.getpid())) == 2)
        os.kill(*watch.launchers_of(os.getpid()), signal.SIGKILL)
        assert child.wait().ended == "killed"
    assert eventually(lambda: not watch.processes_of(os.getpid()))


def test_launchers_that_keep_dying_stop_nobody():
    stop = threading.Event()

    def kill():
        while not stop.wait(0.15):
            for process in watch.launchers_of(os.getpid()):
                os.kill(process, signal.SIGKILL)

    def endings(_):
        found = set()
        for _ in range(25):
            try:
                found.add(run("import time; time.sleep(1000)", limits=Limits(seconds=0.05)).ended)
            except UserError as error:
                found.add(str(error))
        return found

    with ThreadPoolExecutor(7) as pool:
        killer = pool.submit(kill)
        found = set.union(*pool.map(endings, range(6), timeout=120))
        stop.set()
        killer.result()
    assert found <= {"timeout", "killed", "the sandbox's launcher must stay alive, it died twice"}
    assert ordinary("print(1)").stdout == "1\n"
    assert eventually(lambda: not watch.processes_of(os.getpid()))


def test_a_launcher_that_hangs_is_replaced(monkeypatch):
    ordinary("pass")
    stopped, = watch.launchers_of(os.getpid())
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(launcher, "_ANSWER_SECONDS", 1.0)
    assert ordinary("print(1)").stdout == "1\n"
    assert stopped not in watch.launchers_of(os.getpid())


def test_a_launcher_may_be_reaped_by_somebody_else():
    def work():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        ordinary("pass")
        os.kill(*watch.launchers_of(os.getpid()), signal.SIGKILL)
        return ordinary("print(1)").stdout

    assert watch.in_fork(work, as_nobody=False) == "1\n"


def test_a_callers_mistake_ends_nobody_elses_program():
    with sandbox.Child("import time; time.sleep(0.5); print(1)", limits=LIMITS) as child:
        with pytest.raises(OSError, match="Bad file descriptor"):
            sandbox.Child("pass", limits=LIMITS, channel=9999)
        assert child.wait().stdout == "1\n"


def test_ctrl_c_does_not_reach_programs():
    def work():
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, lambda *_: None)  # an ignored one would be inherited
        with sandbox.Child("import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); print(1, flush=True)\n"
                           "time.sleep(1); print(2)", limits=LIMITS) as child:
            time.sleep(0.5)
            os.killpg(0, signal.SIGINT)
            return child.wait().stdout

    assert watch.in_fork(work, as_nobody=False) == "1\n2\n"


@pytest.mark.parametrize("disabled", ["", "userns"])
def test_a_program_that_is_ended_at_any_moment_is_gone(disabled, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SANDBOX_DISABLE", disabled)
    means = sandbox.available()
    for i in range(150):
        with sandbox.Child("import time; time.sleep(1000)", limits=LIMITS, means=means):
            time.sleep(i % 30 / 5000)  # 0 to 6 ms: a program starts in about 5
    assert eventually(lambda: not watch.processes_of(os.getpid()))


def test_an_interrupt_at_any_moment_leaves_nothing():
    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    def work():
        signal.signal(signal.SIGALRM, interrupt)
        ordinary("pass")
        before, interrupted = len(os.listdir("/proc/self/fd")), 0
        for i in range(60):
            signal.setitimer(signal.ITIMER_REAL, 0.0002 + i % 30 / 6000)
            try:
                sandbox.Child("import time; time.sleep(1000)", limits=LIMITS).end()
            except Interrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
        gone = eventually(lambda: not watch.processes_of(os.getpid()))
        return gone, interrupted, before, len(os.listdir("/proc/self/fd"))

    gone, interrupted, before, after = watch.in_fork(work, as_nobody=False)
    assert gone and interrupted >= 10
    assert after - before <= interrupted / 4  # an exception between two lines may cost one


def test_a_child_that_nobody_holds_is_ended():
    sandbox.Child("while True: pass", limits=LIMITS)
    assert eventually(lambda: not watch.processes_of(os.getpid()))


def test_a_forked_process_has_a_launcher_of_its_own():
    ordinary("pass")

    def work():
        return ordinary("print(1)").stdout, len(watch.launchers_of(os.getpid()))

    assert watch.in_fork(work, as_nobody=False) == ["1\n", 1]
    assert ordinary("print(2)").stdout == "2\n" and len(watch.launchers_of(os.getpid())) == 1


@pytest.mark.parametrize("disabled", ["", "userns"])
def test_a_child_dies_with_its_parent(disabled, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SANDBOX_DISABLE", disabled)
    means = sandbox.available()
    parent = watch.fork()
    if parent == 0:
        child = sandbox.Child("while True: pass", limits=Limits(seconds=100), means=means)
        time.sleep(100)
        child.end()
        os._exit(1)
    assert eventually(lambda: len(watch.processes_of(parent)) == 2)  # supervisor and child, beside the launcher
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert eventually(lambda: not watch.processes_of(parent))
    for folder in watch.scratch_folders(parent):  # killed, it could not do this itself
        folder.rmdir()


def eventually(condition):
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.025)
    return False
