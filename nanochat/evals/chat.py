"""Chat tasks: categorical ones by the likeliest of their letters, generative ones by sampling through the engine."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from nanochat.common import Runtime, UserError
from nanochat.engine import Completion, Engine, Request, SamplingParams
from nanochat.evals.results import ResponseLog, is_near_chance
from nanochat.evals.scoring import Row, Scorer
from nanochat.tasks import Answer, Task
from nanochat.tasks.common import reference_text

# The tasks of nanochat's ChatCORE of October 2025; spelling joined later. Over generated tasks the mean is not that.
CHAT_CORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")
CHAT_CORE, GENERATED_CHAT_CORE = "ChatCORE", "ChatCORE (generated tasks)"

CHUNK_PROBLEMS = 256  # multiple-choice prompts scored at a time
GRADERS = min(8, os.cpu_count() or 1)  # threads that judge answers; HumanEval's wait for the sandbox


@dataclass(frozen=True)
class ChatResult:
    """How a model did on a task. `expressions` counts right tool expressions, None where the task has none; `errors`
    problems that the engine could not serve (they count as wrong); `example` the first question and its answer."""

    task: str
    problems: int
    correct: int
    baseline: float
    seconds: float
    expressions: int | None = None
    errors: int = 0
    example: dict[str, str] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.correct / self.problems

    @property
    def centered(self) -> float:
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def near_chance(self) -> bool:
        return is_near_chance(self.accuracy, self.baseline, self.problems)


@dataclass(frozen=True)
class Graded:
    """The answers to one problem, and which of them are right."""

    answers: Sequence[Answer | Completion]
    right: list[bool]


def run_chat_eval(task: Task, engine: Engine, scorer: Scorer, *, params: SamplingParams,
                  max_problems: int | None = None, runtime: Runtime | None = None,
                  log: ResponseLog | None = None) -> ChatResult:
    """Examine a model on the first `max_problems` problems of a task, spread over all ranks.

    The scorer answers categorical tasks, the engine generative ones with `params`, where any right answer of params.n
    counts.
    """
    if task.kind not in ("categorical", "generative"):
        raise UserError(f"a task to be examined on must have right answers, {task.name} is a {task.kind}")
    started = time.perf_counter()
    runtime = runtime or Runtime(torch.device("cpu"))
    problems = len(task) if max_problems is None else min(max_problems, len(task))
    numbers = range(runtime.rank, problems, runtime.world_size)
    conversations = [task[i] for i in numbers]

    def grade(conversation: dict, answers: Sequence[Answer | Completion]) -> Graded:
        return Graded(answers, [task.evaluate(conversation, answer) for answer in answers])

    if task.kind == "categorical":
        letters = answer_letters(scorer, engine.tokenizer, conversations, task.name, runtime.is_main)
        graded = [grade(c, [Answer(letter)]) for c, letter in zip(conversations, letters, strict=True)]
    else:
        graded = answer_and_grade(engine, conversations, params, grade, task.name, runtime.is_main)
    if log is not None:
        log.add([{"task": task.name, "index": i, **_logged(*pair)}
                 for i, pair in zip(numbers, zip(conversations, graded, strict=True), strict=True)])
    tally = torch.tensor(_tally(task, conversations, graded), dtype=torch.int64, device=runtime.device)
    correct, expressions, errors = runtime.all_reduce(tally).tolist()
    example = _example(conversations[0], graded[0].answers[0]) if conversations else {}
    return ChatResult(task.name, problems, correct, task.baseline, time.perf_counter() - started,
                      expressions if hasattr(task, "expression_ok") else None, errors, example)


def _tally(task: Task, conversations: Sequence[dict], graded: Sequence[Graded]) -> list[int]:
    """[problems with a right answer, problems whose first answer has the right tool expression, problems not served]"""
    correct = expressions = errors = 0
    for conversation, own in zip(conversations, graded, strict=True):
        correct += any(own.right)
        expressions += hasattr(task, "expression_ok") and task.expression_ok(conversation, own.answers[0])
        errors += getattr(own.answers[0], "finish_reason", None) == "error"
    return [correct, expressions, errors]


def _logged(conversation: dict, graded: Graded) -> dict:
    responses = [{"text": answer.text, "tool_calls": list(answer.tool_calls), "correct": right,
                  "finish_reason": getattr(answer, "finish_reason", None), "error": getattr(answer, "error", None)}
                 for answer, right in zip(graded.answers, graded.right, strict=True)]
    return {"question": conversation["messages"][-2]["content"], "reference": reference_text(conversation),
            "correct": any(graded.right), "responses": responses}


def _example(conversation: dict, answer: Answer | Completion) -> dict[str, str]:
    calls = "".join(f"[{expression} = {result}] " for expression, result in answer.tool_calls)
    return {"question": conversation["messages"][-2]["content"], "answer": calls + answer.text}


# --- categorical ----------------------------------------------------------------------------------


def answer_letters(scorer: Scorer, tokenizer, conversations: Sequence[dict], desc: str = "choice",
                   progress: bool = False) -> list[str]:
    """The likeliest first token of the answer to each conversation, among conversation["letters"]; of equals the first.

    A prompt longer than the scorer takes loses its beginning. UserError for a letter that is not one token.
    """
    answers = []
    with tqdm(total=len(conversations), desc=desc, disable=None if progress else True, leave=False) as bar:
        for first in range(0, len(conversations), CHUNK_PROBLEMS):
            chunk = conversations[first : first + CHUNK_PROBLEMS]
            scores = iter(scorer.score([row for c in chunk for row in _letter_rows(scorer, tokenizer, c)]))
            for conversation in chunk:
                nats = [next(scores).nats for _ in conversation["letters"]]
                answers.append(conversation["letters"][nats.index(min(nats))])
            bar.update(len(chunk))
    return answers


def _letter_rows(scorer: Scorer, tokenizer, conversation: dict) -> list[Row]:
    """A row per letter, all of which share the prompt: the last token of a row is not read."""
    prompt = tokenizer.render_for_completion(conversation)[-scorer.max_len :]
    return [Row(np.array([*prompt, letter_id(tokenizer, letter)]), len(prompt)) for letter in conversation["letters"]]


def letter_id(tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise UserError(f"the letter of a choice must be one token, {letter!r} is {len(ids)}")
    return ids[0]


# --- generative -----------------------------------------------------------------------------------


def answer_and_grade(engine: Engine, conversations: Sequence[dict], params: SamplingParams,
                     grade: Callable[[dict, Sequence[Completion]], Graded], desc: str = "generate",
                     progress: bool = False) -> list[Graded]:
    """Answer every conversation; each is graded in a thread of its own once it is answered, beside the engine.

    A prompt that cannot be served gets answers that say so (finish_reason "error"). A grade that fails ends it all.
    """
    graded: dict[int, Future] = {}
    failed: list[Future] = []
    running: dict[int, Request] = {}
    todo = list(enumerate(conversations))[::-1]
    with (ThreadPoolExecutor(GRADERS) as pool,
          tqdm(total=len(conversations), desc=desc, disable=None if progress else True, leave=False) as bar):

        def answered(i: int, completions: Sequence[Completion]) -> None:
            graded[i] = pool.submit(grade, conversations[i], completions)
            graded[i].add_done_callback(lambda future: failed.append(future) if future.exception() else None)
            bar.update()

        try:
            while (todo or running) and not failed:
                while todo and len(running) < 2 * engine.max_batch:  # as many again wait, so that no row stays idle
                    i, conversation = todo.pop()
                    try:
                        running[i] = engine.submit(engine.tokenizer.render_for_completion(conversation), params)
                    except UserError as error:
                        answered(i, [Completion([], [], [], "error", "", [], str(error))] * params.n)
                for i in [i for i, request in running.items() if request.done]:
                    answered(i, running.pop(i).completions())
                if running:
                    engine.step()
        finally:
            for request in running.values():
                engine.abort(request)
    return [future.result() for future in (*failed, *(graded[i] for i in sorted(graded)))]


def chat_core(results: Sequence[ChatResult], tasks: Sequence[str]) -> float | None:
    """Mean of the centered accuracies of `tasks` when every one of them was run, else None."""
    centered = {result.task: result.centered for result in results if result.task in tasks}
    return sum(centered.values()) / len(centered) if len(centered) == len(tasks) else None
