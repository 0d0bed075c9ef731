"""Chat tasks are judged by their likeliest letter or by sampled answers, graded beside the engine."""

import json
import threading

import pytest
import torch

from nanochat.common import Runtime, UserError
from nanochat.engine import SamplingParams
from nanochat.evals import chat
from nanochat.evals.chat import ChatResult, answer_letters, chat_core, run_chat_eval
from nanochat.evals.results import ResponseLog
from nanochat.evals.scoring import Score
from nanochat.tasks import Answer, make_task
from nanochat.tasks.common import reference_text


class CharTokenizer:
    """One token per character; BOS in front, a closing mark where the answer begins."""

    bos_id, ask = 0, 1

    def encode(self, text):
        return [ord(c) for c in text]

    def render_for_completion(self, conversation):
        return [self.bos_id, *self.encode(conversation["messages"][0]["content"]), self.ask]


class LetterScorer:
    """Finds a given letter the likeliest answer to each question; remembers how many rows it was given at once."""

    max_len = 512

    def __init__(self, answers=()):
        self.answers, self.calls = dict(answers), []  # question -> letter

    def score(self, rows):
        self.calls.append(len(rows))
        return [self._score(row.ids, row.start) for row in rows]

    def _score(self, ids, start):
        assert ids[start - 1] == CharTokenizer.ask and start == len(ids) - 1 and len(ids) <= self.max_len + 1
        text = "".join(map(chr, ids[1 : start - 1]))
        return Score(0.5 if chr(ids[start]) == self.answers.get(text, "A") else 2.0, greedy=False)


class ScriptedRequest:
    def __init__(self, completions, steps):
        self.answers, self.steps = completions, steps

    @property
    def done(self):
        return self.steps <= 0

    def completions(self):
        return self.answers


class ScriptedEngine:
    """Gives prepared completions, n per prompt, in one to five steps, and remembers what it was asked."""

    max_batch = 3

    def __init__(self, answers):
        self.tokenizer, self.answers, self.asked, self.running = CharTokenizer(), answers, [], []
        self.most = 0  # requests at a time

    def submit(self, prompt, params):
        self.asked.append((prompt, params))
        answers = self.answers["".join(map(chr, prompt[1:-1]))]
        if isinstance(answers, str):
            raise UserError(answers)
        self.running.append(ScriptedRequest(answers, 1 + len(self.asked) % 5))
        self.most = max(self.most, len(self.running))
        return self.running[-1]

    def step(self):
        for request in self.running:
            request.steps -= 1
        self.running = [request for request in self.running if not request.done]

    def abort(self, request):
        self.running = [other for other in self.running if other is not request]


def question(conversation):
    return conversation["messages"][0]["content"]


def right_answers(task):
    return {question(task[i]): reference_text(task[i]) for i in range(len(task))}


def test_the_likeliest_letter_is_the_answer(monkeypatch):
    task = make_task("choice", "test", 30)
    conversations = [task[i] for i in range(30)]
    expected = [reference_text(c) for c in conversations]
    assert set(expected) == set("ABCD")
    for chunk, calls in ((1, [4] * 30), (7, [28, 28, 28, 28, 8]), (64, [120])):
        monkeypatch.setattr(chat, "CHUNK_PROBLEMS", chunk)
        scorer = LetterScorer(right_answers(task))
        assert answer_letters(scorer, CharTokenizer(), conversations) == expected
        assert scorer.calls == calls


def test_only_the_conversations_own_letters_count():
    conversation = make_task("choice", "test", 1)[0] | {"letters": ["C", "D"]}
    scorer = LetterScorer({question(conversation): "B"})
    assert answer_letters(scorer, CharTokenizer(), [conversation]) == ["C"]  # B is not offered; C and D tie


def test_a_prompt_longer_than_the_context_loses_its_beginning():
    task, scorer = make_task("choice", "test", 3), LetterScorer()
    scorer.max_len = 40
    rows = [row for i in range(3) for row in chat._letter_rows(scorer, CharTokenizer(), task[i])]
    assert {(len(row.ids), row.start, row.ids[39]) for row in rows} == {(41, 40, CharTokenizer.ask)}


def test_a_letter_must_be_one_token():
    conversation = make_task("choice", "test", 1)[0] | {"letters": ["A", "10"]}
    with pytest.raises(UserError, match="^the letter of a choice must be one token, '10' is 2$"):
        answer_letters(LetterScorer(), CharTokenizer(), [conversation])


def test_categorical_accuracy_counts_right_letters():
    task = make_task("choice", "test", 40)
    answers = right_answers(task)
    for text in [question(task[i]) for i in range(10)]:
        answers[text] = {"A": "B", "B": "C", "C": "D", "D": "A"}[answers[text]]
    engine = ScriptedEngine({})
    result = run_chat_eval(task, engine, LetterScorer(answers), params=SamplingParams())
    assert (result.task, result.problems, result.correct, result.expressions) == ("choice", 40, 30, None)
    assert result.accuracy == 0.75 and not result.near_chance
    assert result.centered == pytest.approx(0.5 / 0.75)
    assert engine.asked == []
    assert result.example["question"] == question(task[0])
    assert run_chat_eval(task, engine, LetterScorer(), params=SamplingParams()).near_chance


def arithmetic_engine(task, change=lambda i, answer: [answer]):
    answers = {}
    for i in range(len(task)):
        parts = task[i]["messages"][-1]["content"]
        answers[question(task[i])] = change(i, Answer(parts[2]["text"], [(parts[0]["text"], parts[1]["text"])]))
    return ScriptedEngine(answers)


def test_generative_accuracy_and_expressions_are_counted():
    task = make_task("arithmetic", "test", 20)

    def change(i, answer):
        if i < 5:
            return [Answer("I do not know.", answer.tool_calls)]
        if i < 8:
            return [Answer(answer.text, [("1+1", "2")])]
        return [Answer(answer.text, []) if i == 8 else answer]

    params = SamplingParams(max_tokens=30, temperature=0.0)
    engine = arithmetic_engine(task, change)
    result = run_chat_eval(task, engine, None, params=params)
    assert (result.correct, result.expressions, result.problems, result.errors) == (15, 16, 20, 0)
    assert engine.asked == [(CharTokenizer().render_for_completion(task[i]), params) for i in range(20)]
    assert result.example["answer"].endswith("] I do not know.")


def test_any_right_sample_counts():
    task = make_task("arithmetic", "test", 10)
    engine = arithmetic_engine(task, lambda i, answer: [Answer("no"), answer if i < 7 else Answer("no")])
    assert run_chat_eval(task, engine, None, params=SamplingParams(n=2)).correct == 7


def test_problems_the_engine_refuses_are_wrong_and_counted(tmp_path):
    task = make_task("arithmetic", "test", 10)
    engine = arithmetic_engine(task)
    engine.answers[question(task[0])] = "a prompt must fit the context"
    log = ResponseLog(tmp_path / "log.jsonl", Runtime(torch.device("cpu")))
    result = run_chat_eval(task, engine, None, params=SamplingParams(n=2), log=log)
    assert (result.correct, result.errors) == (9, 1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["task"], row["index"], row["correct"]) for row in rows] == [
        ("arithmetic", i, i > 0) for i in range(10)]
    assert [answer["error"] for answer in rows[0]["responses"]] == ["a prompt must fit the context"] * 2
    assert rows[3]["question"] == question(task[3]) and rows[3]["reference"] == reference_text(task[3])
    tool = task[3]["messages"][-1]["content"]
    assert rows[3]["responses"] == [{"text": reference_text(task[3]), "correct": True, "finish_reason": None,
                                     "tool_calls": [[tool[0]["text"], tool[1]["text"]]], "error": None}]


def test_answers_are_graded_while_others_are_still_being_given(monkeypatch):
    """The first answer's verdict comes in a thread of its own; the engine goes on meanwhile, with a bounded queue."""
    monkeypatch.setattr(chat, "GRADERS", 2)
    task = make_task("arithmetic", "test", 30)
    engine, graded, evaluate = arithmetic_engine(task), threading.Event(), task.evaluate
    steps = engine.step

    def step():
        steps()
        if len(engine.asked) >= 20:
            assert graded.wait(10), "no verdict before the engine had finished"

    def grade(conversation, answer):
        graded.set()
        assert threading.current_thread() is not threading.main_thread()
        return evaluate(conversation, answer)

    engine.step, task.evaluate = step, grade
    assert run_chat_eval(task, engine, None, params=SamplingParams()).correct == 30
    assert engine.most == 2 * engine.max_batch


def test_a_verdict_that_fails_ends_the_evaluation_at_once():
    task = make_task("arithmetic", "test", 500)
    engine, failed = arithmetic_engine(task), threading.Event()
    steps = engine.step

    def step():
        steps()
        if len(engine.asked) > 20:
            failed.wait(10)

    def grade(conversation, answer):
        failed.set()
        raise ZeroDivisionError

    engine.step, task.evaluate = step, grade
    with pytest.raises(ZeroDivisionError):
        run_chat_eval(task, engine, None, params=SamplingParams())
    assert len(engine.asked) < 500 and engine.running == []


def test_an_interrupted_evaluation_leaves_nothing_running():
    task = make_task("arithmetic", "test", 12)
    engine = arithmetic_engine(task)

    def step():
        raise KeyboardInterrupt

    engine.step = step
    with pytest.raises(KeyboardInterrupt):
        run_chat_eval(task, engine, None, params=SamplingParams())
    assert len(engine.asked) == 6 and engine.running == []


def test_a_task_without_right_answers_is_refused():
    task = make_task("choice", "test", 2)
    task.kind = "dialogue"
    with pytest.raises(UserError, match="^a task to be examined on must have right answers, choice is a dialogue$"):
        run_chat_eval(task, ScriptedEngine({}), LetterScorer(), params=SamplingParams())


def test_a_limit_takes_the_first_problems():
    task = make_task("arithmetic", "test", 20)
    engine = arithmetic_engine(task)
    assert run_chat_eval(task, engine, None, params=SamplingParams(), max_problems=6).problems == 6
    assert len(engine.asked) == 6
    assert run_chat_eval(task, engine, None, params=SamplingParams(), max_problems=60).problems == 20


@pytest.mark.parametrize("name", ["arithmetic", "choice"])
def test_ranks_share_the_problems(name):
    task, sums = make_task(name, "test", 11), []

    class Rank(Runtime):
        def all_reduce(self, tensor, op="sum"):
            sums.append(tensor.tolist())
            return tensor

    if name == "arithmetic":
        engine, scorer = arithmetic_engine(task, lambda i, a: [a if i < 6 else Answer("")]), None
    else:
        engine, scorer = ScriptedEngine({}), LetterScorer(right_answers(task))
    for rank in range(2):
        run_chat_eval(task, engine, scorer, params=SamplingParams(), runtime=Rank(torch.device("cpu"), rank, 2))
    alone = run_chat_eval(task, engine, scorer, params=SamplingParams())
    assert sum(correct for correct, _, _ in sums) == alone.correct == (6 if name == "arithmetic" else 11)


def test_a_rank_without_problems_takes_part():
    task = make_task("arithmetic", "test", 1)
    result = run_chat_eval(task, arithmetic_engine(task), None, params=SamplingParams(),
                           runtime=type("Alone", (Runtime,), {"all_reduce": lambda self, t, op="sum": t})(
                               torch.device("cpu"), 1, 2))
    assert (result.correct, result.example) == (0, {})


def test_the_mean_needs_every_task():
    results = [ChatResult("a", 4, 3, 0.5, 1.0), ChatResult("b", 4, 1, 0.0, 1.0)]
    assert chat_core(results, ["a", "b"]) == pytest.approx((0.5 + 0.25) / 2)
    assert chat_core(results, ["a", "b", "c"]) is None
    assert chat_core(results[:1], ["a", "b"]) is None
