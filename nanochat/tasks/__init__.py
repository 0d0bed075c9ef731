"""Tasks: what the model is taught to do in conversations and how its answers are judged."""

from nanochat.common import UserError
from nanochat.tasks.arc import ARCChallenge, ARCEasy
from nanochat.tasks.arithmetic import Arithmetic, HardArithmetic, Sums
from nanochat.tasks.choice import MultipleChoice
from nanochat.tasks.common import Answer, GeneratedTask, Task, TaskMixture, exchange
from nanochat.tasks.conversations import PREFIX, Conversations
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.identity import Identity
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling import Spelling

# TASKS are generated, STORED_TASKS come from the hub.
TASKS = {task.name: task for task in (Arithmetic, Sums, HardArithmetic, Spelling, Identity, MultipleChoice)}
STORED_TASKS = {task.name: task for task in (SmolTalk, MMLU, ARCEasy, ARCChallenge, GSM8K, HumanEval)}
# What the mean over all generated tasks counts; sums are a part of arithmetic already.
CHAT_CORE_TASKS = tuple(name for name in TASKS if name != Sums.name)

# Named mixtures by stage: (training, validation). "recipe" is that of nanochat (October 2025), on the hub's files 568K
# conversations for mid-training and 21.4K for supervised fine-tuning. "tiny" has the conversations of the tiny preset:
# mid-training shows every format once; fine-tuning is mostly the arithmetic that the tiny model is judged by, with few
# three-operand problems so that RL finds something to improve.
_TINY_MID = "arithmetic=4000,arithmetic-hard=300,spelling=600,identity=300,choice=800"
_TINY_SFT = "arithmetic=4500,arithmetic-hard=900,spelling=400,identity=200,choice=800"
MIXTURES = {
    "mid": {"recipe": ("SmolTalk,MMLU,GSM8K", "SmolTalk,MMLU=5200,GSM8K=420"), "tiny": (_TINY_MID, _TINY_MID)},
    "sft": {"recipe": ("ARC-Easy,ARC-Challenge,GSM8K,SmolTalk=10000", "SmolTalk"), "tiny": (_TINY_SFT, _TINY_SFT)},
}

__all__ = ["CHAT_CORE_TASKS", "MIXTURES", "STORED_TASKS", "TASKS", "Answer", "GeneratedTask", "Task", "TaskMixture",
           "exchange", "make_task", "mixture_texts", "parse_mixture"]


def make_task(name: str, split: str, size: int | None = None, seed: int = 0, **options) -> Task:
    """The task of that name (case does not matter) with `size` problems; None or more than there are: all there are.

    A generated task needs a size and draws other problems for another seed; options go to it (terms, digits,
    operators of arithmetic). "json:PATH" is a file of conversations, the same in every split.
    """
    kind = _kind(name, size)
    if kind is Conversations:
        return Conversations(name.removeprefix(PREFIX), size)
    return kind(split, size, seed, **options) if issubclass(kind, GeneratedTask) else kind(split, size)


def parse_mixture(text: str, split: str, seed: int = 42) -> TaskMixture:
    """The mixture that "name=size,name" describes. A generated task given twice gets other problems the second time,
    a stored one the same, which oversamples it."""
    entries = [_parse_entry(entry.strip()) for entry in text.split(",")]
    for name, size in entries:
        _kind(name, size)  # a wrong name is told before anything is downloaded
    tasks, given = [], {}
    for name, size in entries:
        tasks.append(make_task(name, split, size, seed=given.get(name, 0)))
        given[name] = given.get(name, 0) + 1
    return TaskMixture(tasks, seed)


def mixture_texts(stage: str, text: str, held_out: str | None = None) -> tuple[str, str]:
    """The texts of training and validation, the names of mixtures replaced by what they stand for.

    Without `held_out` the validation is that of `text`, files left out: they would be the very rows trained on.
    """
    known = MIXTURES[stage]
    entries = [entry.strip() for entry in text.split(",")]
    training = ",".join(known[entry][0] if entry in known else entry for entry in entries)
    asked = entries if held_out is None else [entry.strip() for entry in held_out.split(",")]
    validation = [known[entry][1] if entry in known else entry for entry in asked
                  if held_out is not None or not entry.startswith(PREFIX)]
    if not validation:
        raise UserError(f"--val-tasks must name held-out conversations where --tasks has files alone, got {text}")
    return training, ",".join(validation)


def _kind(name: str, size: int | None) -> type[Task]:
    if name.startswith(PREFIX):
        return Conversations
    stored = {known.lower(): task for known, task in STORED_TASKS.items()}
    if name.lower() in stored:
        return stored[name.lower()]
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose from {', '.join([*TASKS, *STORED_TASKS])} or {PREFIX}FILE")
    if size is None:
        raise UserError(f"task {name} is generated and needs a number of problems, as in {name}=1000")
    return TASKS[name]


def _parse_entry(entry: str) -> tuple[str, int | None]:
    name, equals, size = entry.rpartition("=")
    if size.isdecimal() and equals:
        return name, int(size)
    if entry and (not equals or entry.startswith(PREFIX)):
        return entry, None
    raise UserError(f"a task mixture is written name=size,name=size, and {entry!r} is not")
