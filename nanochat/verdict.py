"""Whether a completion solves a HumanEval problem, so that no completion can talk itself into a pass.

An exit code proves nothing: a program that calls sys.exit(0), or patches what the test uses, or returns an object equal
to everything, would pass its own test. So two sandboxed children share a judgement. A runs the completion and answers
calls; B runs the problem's test against a stand-in that sends the arguments to A and gets plain values back. All that A
can do is answer, and only right answers pass. Arguments travel by value: a change made to them in A is not seen in B.

A test that calls the candidate with something that cannot travel (a function, say) is run in one process with the
completion, a pass of which is marked forgeable. What the completion returns never leads there: a value that cannot
travel fails.
"""

import json
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat import verdict_child as child
from nanochat.sandbox import Child, Limits, run

_TEXT = Path(child.__file__).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Verdict:
    """passed; reason, "passed" or a sentence; forgeable: whether a hostile completion could have caused the pass."""

    passed: bool
    reason: str
    forgeable: bool = False


def passes(prompt: str, completion: str, test: str, entry_point: str, *, limits: Limits = Limits()) -> Verdict:
    """Judge `completion`, a whole program, by `test`, which defines check(candidate).

    `prompt` and `test` are trusted; names that the prompt defines are the test's to use. `limits` holds for each of
    the two processes, its wall time for both together. UserError when this machine cannot isolate.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, Child(f"{_TEXT}\nserve({completion!r}, {entry_point!r})", limits=limits, quiet=True,
                             channel=theirs.fileno()) as untrusted:
        with Child(f"{_TEXT}\ncheck({prompt!r}, {test!r}, {entry_point!r})", limits=limits,
                   channel=ours.fileno()) as trusted:
            ours.close()  # each child must see the other's end of the channel close
            theirs.close()
            trusted.deadline = untrusted.deadline
            judged = trusted.wait()
        if judged.code == child.GONE:
            return Verdict(False, _how_it_ended(untrusted))
    if judged.ended == "timeout":
        return Verdict(False, f"no verdict within {limits.seconds:g} s")
    if judged.ended != "exit" or judged.code not in child.CODES:
        return Verdict(False, f"the test ended early ({judged.ended}, code {judged.code})")
    if judged.code == child.UNSENDABLE:
        return _in_one_process(completion, test, entry_point, limits)
    return Verdict(judged.code == child.PASSED, json.loads(judged.stdout.splitlines()[-1]))


def _how_it_ended(untrusted: Child) -> str:
    untrusted.deadline = time.monotonic() + 0.2  # it may have closed the channel only
    ended = untrusted.wait()
    return f"the program ended before its test ({ended.ended}, code {ended.code})"


def _in_one_process(completion: str, test: str, entry_point: str, limits: Limits) -> Verdict:
    token = secrets.token_hex(16)
    ended = run(f"{_TEXT}\nrun_together({completion!r}, {test!r}, {entry_point!r}, {token!r})", limits=limits)
    if ended.stdout.endswith(f"\n{token}\n"):
        return Verdict(True, "passed", forgeable=True)
    return Verdict(False, (ended.stderr.strip().splitlines() or [f"{ended.ended}, code {ended.code}"])[-1])
