"""Chat tasks: categorical ones by the logits of their letters, generative ones by sampling through the engine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from nanochat.common import Runtime
from nanochat.engine import Engine, SamplingParams
from nanochat.tasks import Answer, Task

# nanochat's ChatCORE is the mean over ARC, MMLU, GSM8K, HumanEval and spelling; over generated tasks it is not that.
GENERATED_CHAT_CORE = "ChatCORE (generated tasks)"


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


def run_chat_eval(task: Task, engine: Engine, *, params: SamplingParams, max_problems: int | None = None,
                  batch_size: int = 16, runtime: Runtime | None = None) -> ChatResult:
    """Examine the engine's model on the first `max_problems` problems of a task, spread over all ranks.

    `params` and the engine's batch are for generative tasks, where any right answer of params.n counts; `batch_size` is
    for categorical ones.
    """
    started = time.perf_counter()
    runtime = runtime or Runtime(engine.model.device)
    problems = len(task) if max_problems is None else min(max_problems, len(task))
    conversations = [task[i] for i in range(runtime.rank, problems, runtime.world_size)]
    if task.kind == "categorical":
        letters = answer_letters(engine.model, engine.tokenizer, conversations, batch_size, desc=task.name)
        answers = [[Answer(letter)] for letter in letters]
    else:
        prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
        answers = engine.generate(prompts, params, progress=runtime.is_main) if prompts else []
    tally = _tally(task, conversations, answers)
    totals = runtime.all_reduce(torch.tensor(tally, dtype=torch.int64, device=runtime.device)).tolist()
    example = _example(conversations[0], answers[0][0]) if conversations else {}
    return ChatResult(task.name, problems, totals[0], task.baseline, time.perf_counter() - started,
                      totals[1] if hasattr(task, "expression_ok") else None, totals[2], example)


def _tally(task: Task, conversations: Sequence[dict], answers: Sequence[Sequence]) -> list[int]:
    """[problems with a right answer, problems whose first answer has the right tool expression, problems not served]"""
    correct = expressions = errors = 0
    for conversation, samples in zip(conversations, answers, strict=True):
        correct += any(task.evaluate(conversation, answer) for answer in samples)
        expressions += hasattr(task, "expression_ok") and task.expression_ok(conversation, samples[0])
        errors += getattr(samples[0], "finish_reason", None) == "error"
    return [correct, expressions, errors]


def _example(conversation: dict, answer) -> dict[str, str]:
    calls = "".join(f"[{expression} = {result}] " for expression, result in answer.tool_calls)
    return {"question": conversation["messages"][-2]["content"], "answer": calls + answer.text}


@torch.no_grad()
def answer_letters(model, tokenizer, conversations: Sequence[dict], batch_size: int, desc: str = "choice") -> list[str]:
    """The letter with the largest logit after each conversation's prompt, among conversation["letters"].

    Prompts of similar length share a batch, padded on the right; one longer than the context loses its beginning.
    """
    max_len = model.config.sequence_len
    prompts = [tokenizer.render_for_completion(conversation)[-max_len:] for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for first in tqdm(range(0, len(order), batch_size), desc=desc, disable=None, leave=False):
        batch = order[first : first + batch_size]
        lengths = [len(prompts[i]) for i in batch]
        x = torch.full((len(batch), max(lengths)), tokenizer.bos_id)
        for row, i in enumerate(batch):
            x[row, : lengths[row]] = torch.tensor(prompts[i])
        last = torch.tensor(lengths, device=model.device) - 1
        logits = model(x.to(model.device))[torch.arange(len(batch), device=model.device), last]
        for i, row in zip(batch, logits, strict=True):
            letters = conversations[i]["letters"]
            answers[i] = letters[int(row[letter_ids(tokenizer, letters)].argmax())]
    return answers


def letter_ids(tokenizer, letters: Sequence[str]) -> list[int]:
    """The token of each letter; every letter is a byte and so always a token of its own."""
    return [tokenizer.encode(letter)[0] for letter in letters]


def chat_core(results: Sequence[ChatResult], tasks: Sequence[str]) -> float | None:
    """Mean of the centered accuracies of `tasks` when every one of them was run, else None."""
    centered = {result.task: result.centered for result in results if result.task in tasks}
    return sum(centered.values()) / len(centered) if len(centered) == len(tasks) else None
