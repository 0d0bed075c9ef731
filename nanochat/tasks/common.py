"""What every task has in common: conversations by index, a verdict on an answer, disjoint splits.

A conversation is the dict that `Tokenizer.render_conversation` takes, {"messages": [...]}; its last message
is the reference answer. A categorical task's conversation also carries "letters", the answers to choose from.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.common import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Answer:
    """What a model said: the visible text, and its tool calls as (expression, result or None).

    The engine's Completion has the same two attributes and can be passed wherever an Answer is expected.
    """

    text: str
    tool_calls: Sequence[tuple[str, str | None]] = ()


class Task:
    """A sequence of conversations. `kind` says how a model is examined: "generative" (sample an answer, then
    `evaluate`), "categorical" (compare the logits of conversation["letters"]) or "dialogue" (not at all).
    `baseline` is the accuracy of guessing."""

    name = "task"
    kind = "generative"
    baseline = 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the answer is right."""
        raise NotImplementedError

    def reward(self, conversation: dict, answer: Answer) -> float:
        """Reward for reinforcement learning: 1 for a right answer, 0 for any other."""
        return float(self.evaluate(conversation, answer))


class GeneratedTask(Task):
    """A task whose problems are drawn, not stored: item i of a split is a pure function of (name, split,
    seed, i).

    `draw` invents a problem, `key` names what makes it the same problem as another (so that 37+85 and 85+37
    are one), and the key's hash decides the split: 80 % train, 10 % val, 10 % test. Draws of other splits are
    thrown away, so a problem seen in training can never be asked in a test, whatever the sizes. Tasks that can
    draw the same problem name the same `family`, so that they agree on its split.
    """

    family: str | None = None

    def __init__(self, split: str, size: int, seed: int = 0):
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r} of task {self.name}: choose from {', '.join(SPLITS)}")
        if size < 1:
            raise UserError(f"task {self.name} needs at least one problem, not {size}")
        self.split, self.size, self.seed = split, size, seed

    def draw(self, rng: random.Random) -> object:
        raise NotImplementedError

    def key(self, problem) -> str:
        raise NotImplementedError

    def render(self, problem, rng: random.Random) -> dict:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} problems, no {index}")
        # A string seed: Random(int) drops the sign, so Random(-1) and Random(1) would be one stream.
        rng = random.Random(f"{self.name}/{self.split}/{self.seed}/{index}")
        while True:
            problem = self.draw(rng)
            if split_of(f"{self.family or self.name}/{self.key(problem)}") == self.split:
                return self.render(problem, rng)


def split_of(key: str) -> str:
    """The split that owns a problem: the first 8 bytes of the key's SHA-256, modulo 10, gives val 0, test 1,
    train 2-9."""
    bucket = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") % 10
    return {0: "val", 1: "test"}.get(bucket, "train")


class TaskMixture:
    """Several tasks shuffled into one sequence of conversations by Random(seed).

    A task is oversampled by listing it twice, or as a pair (task, times).
    """

    def __init__(self, tasks: Sequence[Task | tuple[Task, int]], seed: int = 42):
        repeated = [entry if isinstance(entry, tuple) else (entry, 1) for entry in tasks]
        self.tasks = [task for task, times in repeated for _ in range(times)]
        self._ends = np.cumsum([len(task) for task in self.tasks])
        order = list(range(int(self._ends[-1])))
        random.Random(seed).shuffle(order)
        self._order = np.array(order)  # 568K numbers: 36 MB as a list, 5 MB so

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture has {len(self)} conversations, no {index}")
        number = int(self._order[index])
        task = int(np.searchsorted(self._ends, number, side="right"))
        return self.tasks[task][number - int(self._ends[task - 1] if task else 0)]

    def counts(self) -> list[dict]:
        """Return {"task", "conversations"} of every part, for the report."""
        return [{"task": task.name, "conversations": len(task)} for task in self.tasks]


def exchange(question: str, answer: str | list[dict]) -> dict:
    """The conversation of one question and its reference answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def reference_text(conversation: dict) -> str:
    """The reference answer's text, tool parts left out."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
