"""Tasks: what the model is taught to do in conversations and how its answers are judged."""

from nanochat.common import UserError
from nanochat.tasks.arithmetic import Arithmetic, HardArithmetic, Sums
from nanochat.tasks.choice import MultipleChoice
from nanochat.tasks.common import Answer, GeneratedTask, Task, TaskMixture, exchange
from nanochat.tasks.identity import Identity
from nanochat.tasks.spelling import Spelling

TASKS = {task.name: task for task in (Arithmetic, Sums, HardArithmetic, Spelling, Identity, MultipleChoice)}
# What the mean over all generated tasks counts; sums are a part of arithmetic already.
CHAT_CORE_TASKS = tuple(name for name in TASKS if name != Sums.name)

# Conversations per stage of the tiny preset. Mid-training shows every format once; supervised fine-tuning is
# mostly the arithmetic that the tiny model is judged by, with few three-operand problems so that RL finds
# something to improve.
MID_MIXTURE = "arithmetic=4000,arithmetic-hard=300,spelling=600,identity=300,choice=800"
SFT_MIXTURE = "arithmetic=4500,arithmetic-hard=900,spelling=400,identity=200,choice=800"

__all__ = ["CHAT_CORE_TASKS", "MID_MIXTURE", "SFT_MIXTURE", "TASKS", "Answer", "GeneratedTask", "Task", "TaskMixture",
           "exchange", "make_task", "parse_mixture"]


def make_task(name: str, split: str, size: int, seed: int = 0, **options) -> Task:
    """The task of that name with `size` problems; options go to the task (terms, digits, operators of
    arithmetic)."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name](split, size, seed, **options)


def parse_mixture(text: str, split: str, seed: int = 42) -> TaskMixture:
    """The mixture that "name=size,name=size" describes; a name given twice gets other problems the second
    time."""
    tasks, given = [], {}
    for entry in text.split(","):
        name, _, size = entry.strip().partition("=")
        if not size.isdecimal():
            raise UserError(f"a task mixture is written name=size,name=size, and {entry.strip()!r} is not")
        tasks.append(make_task(name, split, int(size), seed=given.get(name, 0)))
        given[name] = given.get(name, 0) + 1
    return TaskMixture(tasks, seed)
