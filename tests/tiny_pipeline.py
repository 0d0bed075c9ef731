"""The training programs shrunk until a whole stage takes a fraction of a second: 90K parameters on a folder of text.

The programs themselves run, in this process; only the data, the model and the RL task are toys.
"""

import importlib
import json
import os
import shutil
import signal
from pathlib import Path

import torch

from nanochat.checkpoint import find_checkpoint, load_checkpoint
from nanochat.dataset import prepare
from nanochat.load import stage_folder
from nanochat.metrics import MetricsLog, metrics_path
from nanochat.tasks import TASKS, Answer, exchange
from nanochat.tasks.common import GeneratedTask
from nanochat.tokenizer import Tokenizer
from nanochat.train import Trainer

PROGRAMS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
N_STEPS = 5
VOCAB = 300
TASKS_FLAG = "arithmetic=10,spelling=5"  # fewer conversations than a run reads: it crosses an epoch
COMMON = ["--device", "cpu", "--kernels", "eager", "--num-steps", str(N_STEPS), "--eval-every", "2"]
FLAGS = {
    "base": ["--depth", "1", "--sequence-len", "64", "--device-batch-size", "2", "--total-batch-size", "256",
             "--eval-tokens", "256", "--embedding-lr", "0.02"],
    "mid": ["--tasks", TASKS_FLAG, "--device-batch-size", "2", "--rows-per-step", "4", "--eval-batches", "2"],
    "sft": ["--tasks", TASKS_FLAG, "--device-batch-size", "2", "--rows-per-step", "4", "--eval-batches", "2"],
    "rl": ["--task", "even-length", "--device-batch-size", "3", "--examples-per-step", "2", "--num-samples", "4",
           "--max-tokens", "6", "--eval-problems", "3", "--lr-scale", "1.0"],
}
TIMINGS = ("ms", "tok_per_s", "mfu", "rollout_s")
WORDS = ("apple", "river", "stone", "window", "seven", "bright", "carry", "under", "cloud", "mild", "forest", "lamp")


class EvenLength(GeneratedTask):
    """Say anything of even length: a model that knows nothing is right now and then, so RL has a signal at once."""

    name = "even-length"

    def draw(self, rng):
        return rng.randrange(10_000)

    def key(self, problem):
        return str(problem)

    def render(self, problem, rng):
        return exchange(str(problem), "ok")

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        return len(answer.text) % 2 == 0


def prepare_base_dir(folder: Path) -> None:
    """Make `folder`/artifacts the base directory, with a dataset of 40 short documents and a tokenizer of 300 ids."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder / "artifacts")
    register_task()
    documents = write_texts(folder)
    prepare(str(folder / "texts"))
    Tokenizer.train(documents, VOCAB).save()


def register_task() -> None:
    TASKS.setdefault(EvenLength.name, EvenLength)


def forget_task() -> None:
    """A toy task must not show up in other tests' lists."""
    TASKS.pop(EvenLength.name, None)


def write_texts(folder: Path) -> list[str]:
    """Write 40 short documents to `folder`/texts and return them."""
    documents = [f"{i}: " + " ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(1, 4 + i % 23)) for i in range(40)]
    (folder / "texts").mkdir(parents=True)
    lines = "\n".join(json.dumps({"text": document}) for document in documents)
    (folder / "texts" / "all.jsonl").write_text(lines, encoding="utf-8")
    return documents


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def copy_base_dir(original: Path, copy: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy a base directory except the stages `without` and make the copy the base directory."""
    shutil.copytree(original, copy)
    os.environ["NANOCHAT_BASE_DIR"] = str(copy / "artifacts")
    for stage in without:
        remove(copy / "artifacts" / "checkpoints" / stage)
        metrics_path(stage).unlink(missing_ok=True)


def train(stage: str, base: Path, *flags: str) -> None:
    """Run a stage's program with the tiny flags; later flags win."""
    torch.set_num_threads(1)
    program = importlib.import_module(f"scripts.{PROGRAMS[stage]}")
    data = ["--data", str(base / "texts")] if stage == "base" else []
    program.main(program.parse_args([*COMMON, *FLAGS[stage], *data, *flags]))


def outcome(stage: str, world_size: int = 1) -> dict:
    """Return all that a finished run leaves and that must not depend on interruptions: tensors, state, metrics."""
    path = find_checkpoint(stage_folder(stage))
    ranks = [load_checkpoint(path, groups=("model", "optim", "rng"), rank=rank, world_size=world_size)
             for rank in range(world_size)]
    state = dict(ranks[0][1])
    del state["args"]  # --resume and --save-every differ
    state["progress"] = {k: v for k, v in state["progress"].items() if k != "train_seconds"}
    rows = [json.loads(line) for line in metrics_path(stage).read_text(encoding="utf-8").splitlines()]
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
    return {"tensors": [tensors for tensors, _ in ranks], "state": state, "rows": rows}


def assert_same(got: dict, want: dict) -> None:
    """Compare two outcomes: tensors bit for bit, everything else by value."""
    assert got["state"] == want["state"]
    assert got["rows"] == want["rows"]
    for mine, other in zip(got["tensors"], want["tensors"], strict=True):
        for group in ("model", "optim", "rng"):
            assert mine[group].keys() == other[group].keys()
            different = [name for name in mine[group] if not torch.equal(mine[group][name], other[group][name])]
            assert not different, f"{group}: {different}"


class Crash(BaseException):
    """Stands for a sudden death inside the process: nothing in the programs may catch it."""


def die() -> None:
    raise Crash


def crash_at(monkeypatch, step: int) -> None:
    """Let the run die when it records training step `step`: the update is done, nothing of it is saved."""
    add = MetricsLog.add

    def adding(self, **row):
        add(self, **row)
        if row["step"] == step and "loss" in row:
            die()

    monkeypatch.setattr(MetricsLog, "add", adding)


def signal_at(monkeypatch, step: int) -> None:
    """Send this process SIGTERM when `step` steps are done; it saves after the next one."""
    evaluate_if_due = Trainer._evaluate_if_due

    def evaluating(self, log):
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate_if_due(self, log)

    monkeypatch.setattr(Trainer, "_evaluate_if_due", evaluating)
