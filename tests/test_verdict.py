"""A completion passes when its answers are right, and by nothing else that it can do."""

import ast
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hostile import watch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import verdict_child
from nanochat.sandbox import Limits
from nanochat.verdict import Verdict, passes
from nanochat.verdict_child import decode, encode

LIMITS = Limits(seconds=5, cpu_seconds=5)
BRIEF = Limits(seconds=1, cpu_seconds=1)
PROMPT = "def add(x, y):\n    '''Return the sum.'''\n"
TEST = """def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(2, 3) == 5
    assert add(0, 7) == 7
"""

# (what, prompt, right body, wrong body, test), in the style of HumanEval
PROBLEMS = [
    ("typing and floats", "from typing import List\n\ndef mean(numbers: List[float]) -> float:\n    '''Mean.'''\n",
     "    return sum(numbers) / len(numbers)\n", "    return sum(numbers)\n",
     "def check(candidate):\n    assert abs(candidate([1.0, 2.0]) - 1.5) < 1e-6\n    assert candidate([4.0]) == 4.0\n"),
    ("a name of the prompt", "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo double.'''\n",
     "    return x // 2\n", "    return x\n",
     "def check(candidate):\n    for n in range(20):\n        assert candidate(double(n)) == n\n"),
    ("the candidate by its own name", "def third(l):\n    '''Every third.'''\n", "    return l[::3]\n",
     "    return l\n",
     "def check(candidate):\n    assert candidate([1, 2, 3, 4]) == [1, 4] == third([1, 2, 3, 4])\n"),
    ("identity", "def sign(x):\n    '''True, False or None.'''\n", "    return None if x == 0 else x > 0\n",
     "    return 1\n",
     "def check(candidate):\n    assert candidate(1) is True and candidate(-1) is False and candidate(0) is None\n"),
    ("containers", "def group(words):\n    '''By length.'''\n",
     "    out = {}\n    for w in words:\n        out.setdefault(len(w), set()).add(w)\n    return out\n",
     "    return {}\n",
     "def check(candidate):\n    assert candidate(('a', 'b', 'cc')) == {1: {'a', 'b'}, 2: {'cc'}}\n"),
    ("an expected exception", "def root(x):\n    '''Square root.'''\n", "    import math\n    return math.sqrt(x)\n",
     "    return 2.0\n",
     "def check(candidate):\n    assert candidate(4) == 2.0\n    try:\n        candidate(-1)\n    except ValueError:\n"
     "        return\n    assert False, 'negative'\n"),
    ("printing", "def shout(x):\n    '''Print and return.'''\n", "    print(x * 100_000)\n    return x\n",
     "    print(x)\n",
     "def check(candidate):\n    assert candidate('passed') == 'passed'\n"),
    ("long integers", "def power(n):\n    '''2 ** n.'''\n", "    return 2 ** n\n", "    return 2.0 ** 9\n",
     "def check(candidate):\n    assert candidate(50_000) == 1 << 50_000\n"),
    ("keywords", "def cut(text, *, at=1):\n    '''Cut.'''\n", "    return text[:at], text[at:]\n",
     "    return text, at\n",
     "def check(candidate):\n    assert candidate('abc', at=2) == ('ab', 'c')\n"),
    ("iterators", "def squares(n):\n    '''Yield.'''\n", "    yield from (i * i for i in range(n))\n",
     "    return iter('')\n",
     "def check(candidate):\n    assert list(candidate(4)) == [0, 1, 4, 9]\n"),
]


def judge(program, *, limits=LIMITS):
    return passes(PROMPT, program, TEST, "add", limits=limits)


def in_threads(work, items):
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, items))


def plainly(program, test, entry_point):
    """What a judge that believes exit codes says."""
    text = f"{program}\n{test}\ncheck({entry_point})\n"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", text], capture_output=True, timeout=20)
    return done.returncode == 0


@pytest.mark.parametrize(("what", "prompt", "right", "wrong", "test"), PROBLEMS, ids=[p[0] for p in PROBLEMS])
def test_right_bodies_pass_and_wrong_ones_fail_as_with_plain_exec(what, prompt, right, wrong, test):
    name = next(node.name for node in reversed(ast.parse(prompt).body) if isinstance(node, ast.FunctionDef))
    bodies = (right, wrong, "    pass\n")
    ours = in_threads(lambda body: passes(prompt, prompt + body, test, name, limits=LIMITS), bodies)
    theirs = in_threads(lambda body: plainly(prompt + body, test, name), bodies)
    assert [verdict.passed for verdict in ours] == theirs == [True, False, False]
    assert ours[0] == Verdict(True, "passed", False)


def test_no_forgery_passes(figure):
    forgeries = watch.programs("forgeries")
    assert len(forgeries) >= 40
    verdicts = dict(zip(forgeries, in_threads(lambda f: judge(f[1], limits=BRIEF), forgeries.values()), strict=True))
    forged = [name for name, verdict in verdicts.items() if verdict.passed]
    figure(f"forged verdicts that pass: {len(forged)} of {len(forgeries)}")
    assert not forged
    assert all(verdict.reason and not verdict.forgeable for verdict in verdicts.values())


def test_forgeries_do_forge_where_exit_codes_are_believed():
    forgeries = watch.programs("forgeries")
    believed = in_threads(lambda f: plainly(PROMPT + f[1], TEST, "add"),
                          [f for f in forgeries.values() if f[0] == "forged"])
    assert len(believed) >= 20 and all(believed)


@pytest.mark.parametrize(("program", "reason"), [
    ("def add(x, y): return 3", "AssertionError"),
    ("def add(x, y): return 1 / 0", "the program raised ZeroDivisionError: division by zero"),
    ("def add(x, y: return", "the program raised SyntaxError"),
    ("def plus(x, y): return x + y", "the program raised AttributeError"),
    ("import os\nos._exit(3)", "the program ended before its test (exit, code 3)"),
    ("import ctypes\ndef add(x, y): ctypes.string_at(0)", "the program ended before its test (killed, code -11)"),
    ("def add(x, y): return object()", "the program raised TypeError: a value of type object cannot be sent"),
    ("def add(x, y): return bytes(10 ** 10)", "the program raised MemoryError"),
])
def test_a_failure_says_why(program, reason):
    verdict = judge(program)
    assert not verdict.passed and verdict.reason.startswith(reason), verdict


def test_an_endless_program_is_given_up():
    assert judge("def add(x, y):\n    while True: pass", limits=BRIEF) == Verdict(False, "no verdict within 1 s")


def test_a_fault_of_the_problem_itself_is_named():
    verdict = passes(PROMPT, PROMPT, "def check(", "add", limits=LIMITS)
    assert not verdict.passed and verdict.reason.startswith("the problem's own text raised SyntaxError")


def test_a_test_that_sends_functions_is_judged_in_one_process_and_marked():
    prompt, test = "def apply(f, x):\n    '''f(x)'''\n", "def check(c):\n    assert c(lambda x: x + 1, 2) == 3\n"
    right, wrong = (passes(prompt, prompt + body, test, "apply", limits=LIMITS)
                    for body in ("    return f(x)\n", "    return x\n"))
    assert right == Verdict(True, "passed", forgeable=True)
    assert not wrong.passed and wrong.reason == "AssertionError"


def test_the_untrusted_side_holds_neither_test_nor_answers():
    program = """
import gc, sys
def add(x, y):
    frame, found = sys._getframe(), [repr(o) for o in gc.get_objects() if type(o) is dict]
    while frame:
        found.append(repr(frame.f_locals))
        frame = frame.f_back
    return "".join(("MARK", "ER")) in str(found) + str(sys.orig_argv)
"""
    test = "def check(candidate):\n    answer = 'MARKER'\n    assert candidate(1, 2) is False\n"
    assert passes(PROMPT, program, test, "add", limits=LIMITS).passed


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9)),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers() | st.binary(), inner, max_size=4)
    | st.frozensets(st.integers() | st.text(), max_size=4) | st.sets(st.integers(), max_size=4), max_leaves=12)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else a == b


@given(values)
def test_values_travel_exactly(value):
    assert same(decode(json.loads(json.dumps(encode(value)))), value)


def test_subclasses_travel_as_what_they_extend():
    class Odd(dict):
        def __eq__(self, other):
            return True

    assert type(decode(encode(Odd(a=1)))) is dict
    assert decode(encode(Odd(a=1))) == {"a": 1}
    assert math.copysign(1, decode(encode(-0.0))) == -1
    assert type(decode(encode(bytearray(b"x")))) is bytearray


@pytest.mark.parametrize("message", [[], ["object"], ["int", "os"], ["list", 3], ["__class__", []], ["eval", "1"],
                                     "none", None, 5, ["range", "a"], ["dict", [[["list", []], ["none"]]]]])
def test_what_is_no_encoding_is_refused(message):
    with pytest.raises((ValueError, TypeError)):
        decode(message)


def test_no_exit_code_of_an_interpreter_is_a_pass():
    assert verdict_child.PASSED > 2 and len(set(verdict_child.CODES)) == 5
