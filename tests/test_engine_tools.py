"""Calls that take time: a row waits for its program while the others go on, and whatever happens to it meanwhile."""

import dataclasses
import threading
import time

import pytest
from tiny_engine import GREEDY, assert_idle, assert_recomputed, prompt_of, tool_script
from tiny_engine import make as make
from tiny_engine import model as model
from tiny_engine import one_thread as one_thread
from tiny_engine import tokenizer as tokenizer

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.engine import SamplingParams
from nanochat.engine.engine import TOOL_POLL_SECONDS
from nanochat.engine.tools import MAX_CALLS, run_program

PARAMS = SamplingParams(max_tokens=30, temperature=0.0)
CALL = "len('abc')"


class Programs:
    """Stands for the sandbox: a program waits for `go`, then its answer is its length, or none if it says fail."""

    def __init__(self):
        self.go, self.asked, self.error = threading.Event(), [], None

    def __call__(self, source):
        self.asked.append(source)
        assert self.go.wait(60)
        if self.error:
            raise self.error
        return self.answer(source)

    @staticmethod
    def answer(source):
        return calculate(source) or (None if "fail" in source else str(len(source)))


@pytest.fixture
def programs(monkeypatch):
    stand_in = Programs()
    monkeypatch.setattr("nanochat.engine.tools.run_program", stand_in)
    monkeypatch.setattr("nanochat.sandbox.level", lambda: 3)
    yield stand_in
    stand_in.go.set()


@pytest.fixture
def calling(make, programs):
    """An engine whose rows call at position 12, if that is behind their prompt; (engine, request that will)."""
    def started(expression=CALL, **options):
        engine = make(tools="python", **options)
        engine.model.script = tool_script(engine.tokenizer, 12, expression)
        return engine, engine.submit(prompt_of(10), PARAMS)
    return started


def step_until(engine, condition):
    for _ in range(500):
        if condition():
            return
        engine.step()
    raise AssertionError("it never came to that")


def finish(engine, *requests):
    while not all(request.done for request in requests):
        engine.step()
    for request in requests:
        assert_recomputed(engine, [request.completions()], [request.prompt], request.params, Programs.answer)


# --- answers --------------------------------------------------------------------------------------


def test_what_the_calculator_refuses_is_run_and_the_rest_is_not(calling, programs):
    programs.go.set()
    for expression, result, asked in ((CALL, "10", [CALL]), ("37+85", "122", []), ("fail", None, ["fail"])):
        programs.asked.clear()
        engine, request = calling(expression)
        finish(engine, request)
        (completion,) = request.completions()
        assert completion.tool_calls == [(expression, result)] and programs.asked == asked
        assert completion.mask.count(0) == (len(result) + 2 if result else 0)
        assert ("tool", expression, result) in [event for _, event in request.take_events()]
        assert_idle(engine)


@pytest.mark.parametrize("source, result", [
    ("len('strawberry')", "10"), ("x = 6\nprint(x * 7)", "42"), ("'a' * 1000", "a" * 256), ("1 / 0", None),
    ("None", None), ("'{0}' + \"{}\"", "{0}{}"), ("print('half', end='')\nraise SystemExit(3)", None),
    ("def f(n):\n    return n and n + f(n - 1)\nprint(f(3))", "6"), ("(", None),
])
def test_a_program_is_run_in_the_sandbox_like_a_line_at_the_prompt(source, result):
    assert run_program(source) == result


def test_a_model_calls_the_sandbox(make):
    engine = make(tools="python", allow_weak_sandbox=True)
    engine.model.script = tool_script(engine.tokenizer, 12, "max(3, 9)")
    (completion,), = engine.generate([prompt_of(10)], PARAMS)
    assert completion.tool_calls == [("max(3, 9)", "9")]
    assert engine.tokenizer.decode(completion.ids[13:16]) == "<|output_start|>9<|output_end|>"


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_weak_sandbox_is_refused_unless_allowed(make, monkeypatch, level):
    monkeypatch.setattr("nanochat.sandbox.level", lambda: level)
    with pytest.raises(UserError) as error:
        make(tools="python")
    assert str(error.value) == (f"tools python needs a sandbox of level 3, this machine has level {level} (see "
                                "python -m nanochat.sandbox --probe): allow the weak one or take tools calculator")
    assert make(tools="python", allow_weak_sandbox=True).tools == "python"
    assert make(tools="calculator").tools == "calculator"


def test_a_call_that_leaves_no_room_for_an_answer_is_not_made(calling, programs):
    engine, request = calling()
    engine.abort(request)
    said = 2 + len(CALL) + 2  # two tokens, the call and its two marks
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(PARAMS, max_tokens=said))
    assert completion.finish_reason == "length" and completion.tool_calls == [] == programs.asked
    assert_idle(engine)


def test_the_calculator_answers_in_any_thread(make):
    engine, answers = make(), []
    engine.model.script = tool_script(engine.tokenizer, 12, "37+85")
    thread = threading.Thread(target=lambda: answers.extend(engine.generate([prompt_of(10)], GREEDY)))
    thread.start()
    thread.join()
    assert answers[0][0].tool_calls == [("37+85", "122")]


# --- waiting --------------------------------------------------------------------------------------


def test_the_others_go_on_while_a_row_waits(calling, programs):
    engine, request = calling()
    other = engine.submit(prompt_of(60), PARAMS)
    step_until(engine, lambda: request.rows[0].call)
    engine.model.computed.clear()
    step_until(engine, lambda: other.done)
    assert set(engine.model.computed) == {1} and not request.done and request.rows[0].call
    late = engine.submit(prompt_of(50), GREEDY)  # and new ones join
    step_until(engine, lambda: late.done)
    programs.go.set()
    finish(engine, request, other, late)
    assert_idle(engine)


def test_many_rows_wait_at_once_and_get_their_own_answers(make, programs):
    engine = make(tools="python")
    engine.model.script = tool_script(engine.tokenizer, 12, CALL)
    requests = [engine.submit(prompt_of(10, seed), PARAMS) for seed in range(2 * MAX_CALLS)]
    step_until(engine, lambda: all(request.rows[0].call for request in requests))
    programs.go.set()
    finish(engine, *requests)
    assert programs.asked == [CALL] * 2 * MAX_CALLS


def test_a_step_sleeps_while_all_rows_wait(calling, programs):
    engine, request = calling()
    step_until(engine, lambda: request.rows[0].call)
    threading.Timer(0.2, programs.go.set).start()
    start, naps = time.monotonic(), 0
    while request.rows[0].call:
        engine.step()
        naps += 1
    assert 1 <= naps <= (time.monotonic() - start) / TOOL_POLL_SECONDS + 3
    finish(engine, request)


@pytest.mark.parametrize("reason", ["abort", "timeout"])
def test_a_waiting_row_can_be_given_up_and_its_answer_comes_to_nothing(calling, programs, reason):
    engine, request = calling()
    kept = engine.submit(prompt_of(60), PARAMS)
    step_until(engine, lambda: request.rows[0].call)
    if reason == "abort":
        engine.abort(request)
    else:
        request.deadline = 0.0
        engine.step()
    assert request.done and not any(row.request is request for row in engine.running + engine.waiting)
    engine.check()
    programs.go.set()
    finish(engine, kept)
    (completion,) = request.completions()
    assert completion.finish_reason == reason and completion.tool_calls == [] and 0 not in completion.mask
    assert_idle(engine)


def test_a_sandbox_that_fails_ends_its_own_row(calling, programs):
    engine, request = calling()
    kept = engine.submit(prompt_of(60), PARAMS)
    programs.error = OSError("no more processes")
    programs.go.set()
    step_until(engine, lambda: request.done)
    finish(engine, kept)
    (completion,) = request.completions()
    assert completion.finish_reason == "error"
    assert completion.error == "a program of the model could not be run: no more processes"
    assert_idle(engine)


def test_a_row_preempted_while_it_waits_goes_on_with_its_answer(calling, programs):
    engine, request = calling(n_pages=7)
    older = [engine.submit(prompt_of(length), dataclasses.replace(PARAMS, max_tokens=60)) for length in (30, 31)]
    engine.scheduler.waiting.rotate(-1)  # the caller is the newest
    row = request.rows[0]
    step_until(engine, lambda: row.call and row in engine.waiting)
    assert not row.pages
    step_until(engine, lambda: older[0].done)  # it does not keep them from running, nor is it let in
    assert row in engine.waiting
    programs.go.set()
    finish(engine, request, *older)
    assert_idle(engine)
