"""Stopped and resumed, a run ends as if nothing had happened: parameters, optimizer, data position, losses, bit for
bit. Two ranks end where one rank with twice the accumulation ends.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch
import torch.distributed as dist
from tiny_pipeline import N_STEPS, Crash, assert_same, copy_base_dir, crash_at, outcome, signal_at, train

from nanochat.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, weights_digest
from nanochat.common import Runtime, UserError, base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.load import pick_kernels, stage_folder
from nanochat.metrics import metrics_path
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer
from nanochat.train import EXIT_STOPPED, Schedule, StopRequest, Trainer

STAGES = tuple(tiny.PROGRAMS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder in which every stage ran without interruption, and what each of them left."""
    folder = tmp_path_factory.mktemp("reference")
    before, threads = os.environ["NANOCHAT_BASE_DIR"], torch.get_num_threads()
    tiny.prepare_base_dir(folder)
    outcomes = {}
    for stage in STAGES:
        train(stage, folder)
        outcomes[stage] = outcome(stage)
    os.environ["NANOCHAT_BASE_DIR"] = before
    yield folder, outcomes
    torch.set_num_threads(threads)
    tiny.forget_task()


@pytest.fixture
def workplace(reference, tmp_path, monkeypatch):
    """Return a function: a private copy of the reference, without one stage, becomes the base directory."""

    def make(without: str | None = None) -> tuple[Path, dict | None]:
        folder, outcomes = reference
        monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced by the copy, restored after the test")
        copy_base_dir(folder, tmp_path / "copy", without=(without,) if without else ())
        return folder, outcomes.get(without)

    return make


def stopped(call, *args) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        call(*args)
    return caught.value.code


def error_of(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


# --- one process ----------------------------------------------------------------------------------


def test_the_reference_learns_and_crosses_an_epoch(reference):
    for stage, outcome_ in reference[1].items():
        rows = [row for row in outcome_["rows"] if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, N_STEPS + 1))
        assert len({row["loss"] for row in rows}) == N_STEPS, stage
        assert stage == "rl" or rows[-1]["epoch"] >= 1
    rewards = [row["reward"] for row in reference[1]["rl"]["rows"] if "reward" in row]
    assert len(set(rewards)) > 1, "advantages that are all zero would make the RL tests vacuous"


@pytest.mark.parametrize("step", range(N_STEPS - 1))
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_the_resumed_run_is_bit_equal(workplace, monkeypatch, stage, step):
    folder, want = workplace(stage)
    signal_at(monkeypatch, step)
    assert stopped(train, stage, folder) == EXIT_STOPPED
    assert find_checkpoint(stage_folder(stage)).name == f"step_{step + 1:06d}"
    train(stage, folder, "--resume", "auto")
    assert_same(outcome(stage), want)


def test_sigterm_in_the_last_step_finishes_the_stage(workplace, monkeypatch):
    folder, want = workplace("sft")
    signal_at(monkeypatch, N_STEPS - 1)
    train("sft", folder)
    assert_same(outcome("sft"), want)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_dies_in_every_step_ends_bit_equal(workplace, monkeypatch, stage):
    folder, want = workplace(stage)
    for step in range(1, N_STEPS + 1):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_at(patch, step)
            train(stage, folder, "--save-every", "1", "--resume", "auto")
    assert find_checkpoint(stage_folder(stage)).name == f"step_{N_STEPS - 1:06d}"
    train(stage, folder, "--save-every", "1", "--resume", "auto")
    assert_same(outcome(stage), want)


def test_a_resumed_run_cuts_the_metrics_back_to_its_checkpoint(workplace, monkeypatch):
    folder, want = workplace("base")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 4)
        train("base", folder, "--save-every", "2")
    with metrics_path("base").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "los')  # a kill in the middle of a line
    train("base", folder, "--resume", "auto")
    assert outcome("base")["rows"] == want["rows"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_death_before_the_last_checkpoint_finds_the_report_written(workplace, monkeypatch, stage):
    """Once that checkpoint exists the stage is finished, and nothing would write its section any more."""
    folder, _ = workplace(stage)
    (section,) = (base_dir() / "report").glob(f"section_{'base-training' if stage == 'base' else stage}*.json")
    section.unlink()
    monkeypatch.setattr(Trainer, "save", lambda self, batches: tiny.die())
    with pytest.raises(Crash):
        train(stage, folder)
    assert section.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_left_alone(reference, workplace, capsys, stage):
    folder, _ = workplace()
    assert list((base_dir() / "report").glob(f"section_{stage}*.json"))
    before = {path: path.stat().st_mtime_ns for path in base_dir().rglob("*") if path.is_file()}
    train(stage, folder, "--resume", "auto")
    assert f"{stage}: already finished, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in base_dir().rglob("*") if path.is_file()} == before


def test_a_second_signal_ends_the_process_at_once():
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert stopped(os.kill, os.getpid(), signal.SIGTERM) == 128 + signal.SIGTERM
    finally:
        stop.restore()


# --- refusals -------------------------------------------------------------------------------------


def test_resume_none_refuses_an_existing_checkpoint(reference, workplace):
    folder, _ = workplace()
    where = stage_folder("base")
    assert error_of(train, "base", folder) == (
        f"{where} already holds checkpoint step_000005; use --resume auto to go on from it or move the folder away "
        "to start over")
    assert_same(outcome("base"), reference[1]["base"])


@pytest.mark.parametrize("stage, flags, key, was, now", [
    ("base", ["--total-batch-size", "512"], "total_batch_size", "256", "512"),
    ("base", ["--seed", "7"], "seed", "42", "7"),
    ("base", ["--num-steps", "9"], "n_steps", "5", "9"),
    ("sft", ["--source", "base"], "source", "mid step 5", "base step 5"),
    ("sft", ["--tasks", "spelling=3"], "tasks", tiny.TASKS_FLAG, "spelling=3"),
    ("sft", ["--sequence-len", "32"], "sequence_len", "64", "32"),
    ("sft", ["--rows-per-step", "2"], "rows_per_step", "4", "2"),
    ("rl", ["--num-samples", "2"], "num_samples", "4", "2"),
    ("rl", ["--temperature", "0.5"], "temperature", "1.0", "0.5"),
])
def test_another_run_under_the_same_name_is_refused_by_the_key(reference, workplace, stage, flags, key, was, now):
    folder, _ = workplace()
    path = find_checkpoint(stage_folder(stage))
    assert error_of(train, stage, folder, "--resume", "auto", *flags) == (
        f"checkpoint {path} was made with {key} = {was}, this run has {now}; resume with the same or move the folder "
        "away")
    assert_same(outcome(stage), reference[1][stage])


def test_a_source_trained_anew_is_refused_though_its_step_is_the_same(workplace):
    folder, _ = workplace()
    path = find_checkpoint(stage_folder("mid"))
    tensors, state = load_checkpoint(path, groups=("model", "optim", "rng"))
    was = weights_digest(path)
    tensors["model"]["lm_head.weight"] += 1e-3
    shutil.rmtree(path)
    now = weights_digest(save_checkpoint(path.parent, state["step"], tensors, state))
    assert f"was made with source_weights = {was}, this run has {now}" in error_of(train, "sft", folder, "--resume",
                                                                                    "auto")


def test_another_tokenizer_is_refused(workplace):
    folder, _ = workplace()
    old = Tokenizer.load().fingerprint
    Tokenizer.train(["one two three four five six " * 9, *tiny.WORDS, "0123 4567"], tiny.VOCAB).save()
    new = Tokenizer.load().fingerprint
    assert error_of(train, "mid", folder, "--resume", "auto") == (
        f"checkpoint {find_checkpoint(stage_folder('base'))} was trained with tokenizer {old[:12]}, "
        f"{base_dir() / 'tokenizer'} holds {new[:12]}")
    assert "with tokenizer = " + old in error_of(train, "base", folder, "--resume", "auto")


@pytest.mark.parametrize("stage, flags, sentence", [
    ("base", ["--total-batch-size", "200"],
     "--total-batch-size must be a positive multiple of device-batch-size 2 x sequence-len 64 x ranks 1 = 128, "
     "got 200"),
    ("mid", ["--rows-per-step", "3"],
     "--rows-per-step must be a positive multiple of device-batch-size 2 x ranks 1 = 2, got 3"),
    ("sft", ["--rows-per-step", "1"],
     "--rows-per-step must be a positive multiple of device-batch-size 2 x ranks 1 = 2, got 1"),
])
def test_a_batch_size_that_does_not_divide_is_refused(workplace, stage, flags, sentence):
    folder, _ = workplace(stage)
    assert error_of(train, stage, folder, *flags) == sentence
    assert not (base_dir() / "checkpoints" / stage).exists()


# --- the loss must be finite ----------------------------------------------------------------------


class RandomBatches:
    """One micro-batch of random tokens per step; `handed_out` is the data position."""

    def __init__(self):
        self.handed_out, self.closed = 0, False

    def micro_batches(self):
        self.handed_out += 1
        tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(self.handed_out))
        return [(tokens[:, :-1], tokens[:, 1:], None)]

    def metrics(self):
        return {}

    def state_dict(self):
        return {"handed_out": self.handed_out}

    def close(self):
        self.closed = True


def bare_trainer(folder: Path, forward=None) -> Trainer:
    config = GPTConfig(sequence_len=8, vocab_size=50, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    device = torch.device("cpu")
    model = GPT.build(config, pick_kernels("eager", device, torch.float32, config), torch.float32, device, seed=1)
    optimizer = MuonAdamW(model, model.kernels)
    wrapped = None if forward is None else lambda *args, **options: forward(model(*args, **options))
    return Trainer("base", folder, model, optimizer, Runtime(device), Schedule(6), identity={}, args={},
                   fingerprint="f" * 64, forward=wrapped, save_every=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, bad):
    calls = []

    def forward(loss):
        calls.append(loss)
        return loss + bad if len(calls) == 4 else loss

    trainer, batches = bare_trainer(tmp_path / "d1", forward), RandomBatches()
    seen = {}
    update = trainer.optimizer.step

    def remember(*args):
        update(*args)
        seen.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer.optimizer.step = remember
    assert error_of(trainer.run, batches) == (
        f"base: the loss must be finite, got {bad} at step 3; stopped before the update, saved checkpoints in "
        f"{tmp_path / 'd1'} are intact")
    assert len(calls) == 4 and trainer.optimizer.step_count == 3
    assert all(torch.equal(p, seen[name]) for name, p in trainer.model.named_parameters())
    assert find_checkpoint(tmp_path / "d1").name == "step_000002"
    assert batches.closed
    healthy = bare_trainer(tmp_path / "d1")
    assert not healthy.restore("auto")
    assert healthy.data_state == {"handed_out": 2}


# --- two ranks ------------------------------------------------------------------------------------

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "scripts.base_train", "scripts.chat_sft", "test_train_resume"])


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def on_two_ranks(function, *args, n_groups: int) -> None:
    """Run function(rank, join, *args) in two processes; join() readies the next of n_groups process groups."""
    ports = free_ports(n_groups)
    children = [FORKSERVER.Process(target=_rank_main, args=(function, rank, ports, args)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0]


def _rank_main(function, rank: int, ports: list[int], args: tuple) -> None:
    tiny.register_task()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    waiting = iter(ports)

    def join() -> None:
        if dist.is_initialized():  # a run that was stopped did not leave its group
            dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(next(waiting))

    function(rank, join, *args)
    sys.stdout.flush()


# Half the evaluation batches per rank that one rank alone takes.
TWO_RANK_FLAGS = {"base": (), "sft": ("--eval-batches", "1")}


def _run_on_this_rank(rank: int, join, folder: Path, copy: Path) -> None:
    """Train two stages."""
    os.environ["NANOCHAT_BASE_DIR"] = str(copy / "artifacts")
    join()
    train("base", folder)
    join()
    train("sft", folder, *TWO_RANK_FLAGS["sft"])


def _stop_and_resume_on_this_rank(rank: int, join, folder: Path, copy: Path, stage: str, steps: range) -> None:
    """Stop the run after each of the steps in turn, by a SIGTERM that reaches rank 1 alone, and let it finish."""
    os.environ["NANOCHAT_BASE_DIR"] = str(copy / "artifacts")
    flags = (*TWO_RANK_FLAGS[stage], "--resume", "auto")
    for step in steps:
        join()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                signal_at(patch, step)
            assert stopped(train, stage, folder, *flags) == EXIT_STOPPED
        assert find_checkpoint(stage_folder(stage)).name == f"step_{step + 1:06d}"
    join()
    train(stage, folder, *flags)


@pytest.fixture(scope="module")
def two_rank_reference(reference, tmp_path_factory):
    """What base and SFT leave after running on two ranks, and the folder."""
    folder, _ = reference
    copy = tmp_path_factory.mktemp("two") / "copy"
    before = os.environ["NANOCHAT_BASE_DIR"]
    copy_base_dir(folder, copy, without=("base", "sft"))
    on_two_ranks(_run_on_this_rank, folder, copy, n_groups=2)
    outcomes = {stage: outcome(stage, world_size=2) for stage in ("base", "sft")}
    os.environ["NANOCHAT_BASE_DIR"] = before
    return copy, outcomes


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_two_ranks_equal_accumulation_over_the_same_micro_batches(reference, two_rank_reference, stage):
    alone, two = reference[1][stage], two_rank_reference[1][stage]
    assert two["rows"] == alone["rows"]
    assert two["state"] == alone["state"]
    for name, tensor in alone["tensors"][0]["model"].items():
        assert all(torch.equal(tensors["model"][name], tensor) for tensors in two["tensors"]), name
    for name, tensor in alone["tensors"][0]["optim"].items():
        slices = [tensors["optim"][name] for tensors in two["tensors"]]
        whole = torch.cat(slices)[: len(tensor)] if tensor.dim() else slices[0]
        assert torch.equal(whole, tensor), name


@pytest.mark.parametrize("stage, steps", [
    ("base", range(N_STEPS - 1)),
    *[pytest.param(stage, range(step, step + 1), marks=pytest.mark.slow)
      for stage in ("base", "sft") for step in range(N_STEPS - 1)],
])
def test_two_ranks_stop_together_and_resume_bit_equal(reference, two_rank_reference, tmp_path, monkeypatch, stage,
                                                      steps):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced by the copy, restored after the test")
    copy_base_dir(reference[0], tmp_path / "copy", without=(stage,))
    on_two_ranks(_stop_and_resume_on_this_rank, reference[0], tmp_path / "copy", stage, steps,
                 n_groups=len(steps) + 1)
    assert_same(outcome(stage, world_size=2), two_rank_reference[1][stage])


def test_another_number_of_ranks_is_refused(two_rank_reference, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced by the copy, restored after the test")
    copy_base_dir(two_rank_reference[0], tmp_path / "copy")
    assert error_of(train, "sft", tmp_path, "--resume", "auto") == (
        f"checkpoint {find_checkpoint(stage_folder('sft'))} was saved with world size 2, its optim state cannot be "
        "loaded with world size 1")
