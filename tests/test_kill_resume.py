"""Killed anywhere, run again, nothing is lost: SIGKILL at seeded random times in every stage of a shrunken pipeline.

The programs run in children of a fork server that has imported torch, 20 ms each; after every kill all that lies on
disk under a final name must be whole, and the newest checkpoint must be that of the uninterrupted run, bit for bit.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch

from nanochat.checkpoint import find_checkpoint, load_checkpoint
from nanochat.checkpoint_format import problem
from nanochat.common import base_dir
from nanochat.report import Report
from nanochat.tokenizer import Tokenizer
from nanochat.train import Trainer

TRAINERS = tuple(tiny.PROGRAMS)
STAGES = ("dataset", "tokenizer", *TRAINERS)
KILLS = {"dataset": 6, "tokenizer": 6, "base": 14, "mid": 12, "sft": 12, "rl": 14}  # at least, 64 in all
STEPS = ("--num-steps", "8", "--save-every", "1", "--resume", "auto")
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "test_kill_resume", *(f"scripts.{name}" for name in (
    "dataset", "tok_train", *tiny.PROGRAMS.values()))])


def run_stage(stage: str, folder: Path, copy: Path) -> None:
    """Run one stage's program on the texts of `folder` in the base directory of `copy`."""
    os.environ["NANOCHAT_BASE_DIR"] = str(copy / "artifacts")
    tiny.register_task()
    if stage in TRAINERS:
        return tiny.train(stage, folder, *STEPS)
    from scripts import dataset, tok_train

    program = {"dataset": dataset, "tokenizer": tok_train}[stage]
    vocab = ["--vocab-size", str(tiny.VOCAB)] if stage == "tokenizer" else []
    program.main(program.parse_args(["--data", str(folder / "texts"), *vocab]))


def start(stage: str, folder: Path, copy: Path):
    process = FORKSERVER.Process(target=_child, args=(stage, folder, copy))
    process.start()
    return process


def _child(stage: str, folder: Path, copy: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    run_stage(stage, folder, copy)


# --- the uninterrupted run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder where everything ran once; every checkpoint on the way; seconds per stage in a child."""
    folder = tmp_path_factory.mktemp("reference")
    before = os.environ["NANOCHAT_BASE_DIR"]
    tiny.write_texts(folder)
    snapshots, save = {}, Trainer.save

    def saving(self, batches):
        path = save(self, batches)
        snapshots[self.stage, self.progress.step] = _content(path)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", saving)
        for stage in STAGES:
            run_stage(stage, folder, folder)
    outcomes = {stage: tiny.outcome(stage) for stage in TRAINERS}
    warm_up = FORKSERVER.Process(target=os.getpid)  # the server starts, seconds that belong to no stage
    warm_up.start()
    warm_up.join()
    seconds = {}
    for number, stage in enumerate(STAGES):
        copy = _copy_without(folder, tmp_path_factory.mktemp("timing") / stage, STAGES[number:])
        started = time.perf_counter()
        process = start(stage, folder, copy)
        process.join(300)
        assert process.exitcode == 0
        seconds[stage] = time.perf_counter() - started
    os.environ["NANOCHAT_BASE_DIR"] = before
    yield folder, snapshots, outcomes, seconds
    tiny.forget_task()


def _content(path: Path) -> tuple[dict, dict]:
    tensors, state = load_checkpoint(path, groups=("model", "optim", "rng"))
    del state["progress"]["train_seconds"]
    return tensors, {key: value for key, value in state.items() if key != "args"}


def _copy_without(folder: Path, copy: Path, stages: tuple[str, ...]) -> Path:
    """Copy the reference as it was before `stages` ran; the copy becomes the base directory."""
    parts = {"dataset": ["base_data"], "tokenizer": ["tokenizer"]}
    missing = [part for stage in stages for part in parts.get(stage, [])]
    tiny.copy_base_dir(folder, copy, without=tuple(stage for stage in stages if stage in TRAINERS))
    for part in missing:
        tiny.remove(copy / "artifacts" / part)
    tiny.remove(copy / "artifacts" / "report")
    return copy


# --- what must hold after every kill --------------------------------------------------------------


def check_what_is_on_disk(snapshots: dict) -> Counter:
    """Fail when a file under a final name is not whole; return what was found."""
    found = Counter()
    for path in base_dir().rglob("*"):
        if any(part.startswith((".tmp-", ".trash-")) for part in path.relative_to(base_dir()).parts):
            found["unfinished"] += path.is_file()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.name == "tokenizer.bpe":
            Tokenizer.load(path.parent)
        elif path.suffix == ".jsonl" and path.parent.name == "metrics":
            *whole, _last = path.read_text(encoding="utf-8").split("\n")
            assert all("step" in json.loads(line) for line in whole)
    for stage in TRAINERS:
        folder = base_dir() / "checkpoints" / stage / "d1"
        for path in folder.glob("step_*"):
            assert problem(path, hashes=True) is None
        newest = find_checkpoint(folder)
        if newest is not None:
            tensors, state = _content(newest)
            want, want_state = snapshots[stage, state["step"]]
            assert state == want_state
            assert all(torch.equal(tensors[group][name], tensor) for group in want
                       for name, tensor in want[group].items())
            found["checkpoints"] += 1
    return found


def assert_stage_is_the_reference(stage: str, reference_folder: Path, outcomes: dict) -> None:
    if stage in TRAINERS:
        tiny.assert_same(tiny.outcome(stage), outcomes[stage])
        assert list(Report().folder.glob(f"section_{stage}*.json")), "the report lost its section"
    elif stage == "tokenizer":
        assert Tokenizer.load().fingerprint == Tokenizer.load(reference_folder / "artifacts" / "tokenizer").fingerprint
    else:
        (manifest,) = (base_dir() / "base_data").glob("*/manifest.json")
        there = reference_folder / "artifacts" / manifest.relative_to(base_dir())
        assert json.loads(manifest.read_text(encoding="utf-8")) == json.loads(there.read_text(encoding="utf-8"))


# --- the kills ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigkill_at_random_times_in_every_stage_loses_nothing(reference, tmp_path, monkeypatch, capsys):
    folder, snapshots, outcomes, seconds = reference
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced by the copies, restored after the test")
    draw = random.Random(20)
    kills, runs, found = Counter(), Counter(), Counter()
    for number, stage in enumerate(STAGES):
        while kills[stage] < KILLS[stage]:
            copy = _copy_without(folder, tmp_path / f"{stage}{runs[stage]}", STAGES[number:])
            longest = seconds[stage]
            while _killed(start(stage, folder, copy), draw.uniform(0, longest)):
                kills[stage] += 1
                found += check_what_is_on_disk(snapshots)
                longest *= 1.2  # every run ends some day, also when the machine has become slower since `seconds`
            runs[stage] += 1
            assert_stage_is_the_reference(stage, folder, outcomes)
            tiny.remove(copy)
    with capsys.disabled():
        each = ", ".join(f"{stage} {kills[stage]} (runs that finished: {runs[stage]})" for stage in STAGES)
        print(f"\n{sum(kills.values())} SIGKILLs: {each}; after them {found['checkpoints']} whole checkpoints, "
              f"{found['unfinished']} unfinished files under temporary names, 0 half-written ones under final names")
    assert sum(kills.values()) >= 60


def _killed(process, delay: float) -> bool:
    """Kill the process after `delay` seconds; return whether it was still running. A run that ends must succeed."""
    process.join(delay)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
