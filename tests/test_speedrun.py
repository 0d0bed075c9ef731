"""speedrun.sh on stand-in programs: order, skipping, failing, setting aside, one run at a time, passing on a stop.

And the commands that it prints in a dry run, each parsed by its own program.
"""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import plan
from nanochat.report import Report

SPEEDRUN = Path(__file__).parent.parent / "speedrun.sh"
STAGES = ["dataset", "tok_train", "tok_eval", "base_train", "base_eval", "mid_train", "chat_eval", "chat_sft",
          "chat_eval", "chat_eval", "chat_rl", "chat_eval"]
# Logs its arguments; fails or waits where the test says so.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
if [ "$2" = scripts.report ]; then mkdir -p "$NANOCHAT_BASE_DIR/report"; touch "$NANOCHAT_BASE_DIR/report/run.json"; fi
if [ "$2" = scripts.plan ]; then cd "$ROOT"; exec "$PLANNER" "$@"; fi
[ "$2" != "scripts.${FAIL:-none}" ] || exit 3
if [ "$2" = "scripts.${WAIT:-none}" ]; then
    trap 'echo stopped >> "$CALLS"; exit 75' TERM
    touch "$CALLS.waiting"
    for _ in $(seq 200); do sleep 0.05; done
fi
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with speedrun.sh, a set-up that does nothing and a python that only logs."""
    (tmp_path / "repo/scripts").mkdir(parents=True)
    (tmp_path / "repo/.venv/bin").mkdir(parents=True)
    shutil.copy(SPEEDRUN, tmp_path / "repo")
    (tmp_path / "repo/scripts/setup.sh").write_text("echo set-up\n")
    python = tmp_path / "repo/.venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def gpus(folder: Path, count: int, name: str = "NVIDIA H100 80GB HBM3", mib: int = 81559) -> None:
    """Make folder/bin/nvidia-smi list `count` GPUs."""
    (folder / "bin").mkdir(exist_ok=True)
    smi = folder / "bin/nvidia-smi"
    smi.write_text(f'''#!/bin/sh
case "$1" in *=name) said="{name}" ;; *=memory.total) said={mib} ;; *) said="GPU: {name}" ;; esac
for _ in $(seq {count}); do echo "$said"; done
[ {count} -gt 0 ]
''')
    smi.chmod(0o755)


@pytest.fixture(autouse=True)
def no_gpu(tmp_path, monkeypatch):
    """Whatever this machine has; a dry run then prints as for 8 x H100."""
    gpus(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def environment(checkout: Path, **extra: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(checkout), "NANOCHAT_BASE_DIR": str(checkout / "base"),
            "ROOT": str(SPEEDRUN.parent), "PLANNER": sys.executable, "CALLS": str(checkout / "calls"), **extra}


def speedrun(checkout: Path, *arguments: str, preset: str = "tiny", **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(checkout / "repo/speedrun.sh"), preset, *arguments], capture_output=True,
                          text=True, cwd=checkout, env=environment(checkout, **extra))


def programs(checkout: Path) -> list[str]:
    """The stage programs called so far, in order, and forget them."""
    calls = (checkout / "calls").read_text().splitlines()
    (checkout / "calls").unlink()
    return [call.split()[1].removeprefix("scripts.") for call in calls if "scripts.report" not in call]


def test_runs_every_stage_in_order_once_and_tells_how_to_chat(checkout):
    first = speedrun(checkout)
    assert first.returncode == 0, first.stderr
    assert programs(checkout) == STAGES
    assert "scripts.chat_cli -p" in first.stdout and "9 minutes on two idle cores, 0 dollars" in first.stdout
    rows = [json.loads(line) for line in (checkout / "base/report/timing.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows][:4] == ["dataset", "tok-train", "tok-eval", "base-train"]
    assert len(rows) == len(STAGES) and all(row["seconds"] >= 0 for row in rows)
    again = speedrun(checkout)
    assert again.returncode == 0 and programs(checkout) == []
    assert again.stdout.count("finished earlier, skipped") == len(STAGES)


def test_a_failing_stage_ends_the_run_with_its_status_and_is_where_the_next_run_goes_on(checkout):
    failed = speedrun(checkout, FAIL="mid_train")
    assert failed.returncode == 3
    calls = (checkout / "calls").read_text().splitlines()
    assert calls[-1].startswith("-m scripts.report generate")  # the report shows what the run had
    assert programs(checkout) == STAGES[:6]
    assert speedrun(checkout).returncode == 0
    assert programs(checkout) == STAGES[5:]


def test_flags_reach_the_programs(checkout):
    (checkout / "texts").mkdir()
    speedrun(checkout, "--data", "texts", "--kernels", "eager")
    calls = (checkout / "calls").read_text().splitlines()
    assert f"-m scripts.dataset --data {checkout}/texts" in calls
    [base] = [call for call in calls if "base_train" in call]
    for flags in ("--depth 4", "--resume auto", "--kernels eager", f"--data {checkout}/texts"):
        assert flags in base


@pytest.mark.parametrize("arguments", [["--fresh"], ["--data", "elsewhere"]])
def test_a_fresh_or_different_run_sets_the_earlier_one_aside(checkout, arguments):
    speedrun(checkout)
    (checkout / "base/checkpoints").mkdir()
    (checkout / "base/checkpoints/precious").write_text("weights")
    (checkout / "base/base_data").mkdir()
    programs(checkout)
    assert speedrun(checkout, *arguments).returncode == 0
    assert programs(checkout) == STAGES
    [kept] = (checkout / "base/earlier").glob("*/checkpoints/precious")
    assert kept.read_text() == "weights"
    assert (checkout / "base/base_data").is_dir() and not (checkout / "base/checkpoints").exists()


def start_waiting(checkout: Path) -> subprocess.Popen:
    process = subprocess.Popen(["bash", str(checkout / "repo/speedrun.sh"), "tiny"], cwd=checkout,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=environment(checkout, WAIT="base_train"))
    deadline = time.monotonic() + 20
    while not (checkout / "calls.waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_second_run_is_refused_even_when_only_a_child_of_a_killed_one_is_left(checkout):
    process = start_waiting(checkout)
    refusal = f"error: another run is at work in {checkout}/base; wait for it, stop it, or set NANOCHAT_BASE_DIR"
    assert speedrun(checkout).stderr.strip() == refusal
    process.kill()
    process.wait()
    assert speedrun(checkout).stderr.strip() == refusal
    os.killpg(process.pid, signal.SIGTERM)


def test_a_stop_is_passed_on_and_the_child_may_save(checkout):
    process = start_waiting(checkout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert "stopped" in (checkout / "calls").read_text().splitlines()
    assert not (checkout / "base/stamps/base-train").exists()


def timing(checkout: Path) -> list[dict]:
    return [json.loads(line) for line in (checkout / "base/report/timing.jsonl").read_text().splitlines()]


def test_the_time_of_a_stopped_attempt_counts(checkout):
    process = start_waiting(checkout)
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert speedrun(checkout).returncode == 0
    attempts = [row for row in timing(checkout) if row["stage"] == "base-train"]
    assert [row["status"] for row in attempts] == [75, 0] and attempts[0]["seconds"] >= 1
    spent = sum(row["seconds"] for row in attempts)
    (checkout / "base/report/run.json").unlink()  # the stand-in's is empty
    assert f"| base-train | {spent}s | n/a |" in Report(checkout / "base/report").generate(facts={}).read_text()


def test_stages_note_the_gpus_that_they_ran_on(checkout):
    gpus(checkout, 8)
    done = speedrun(checkout, "--gpus", "3", preset="d12")
    assert done.returncode == 0, done.stderr
    assert {(row["gpus"], row["gpu"]) for row in timing(checkout)} == {(3, "NVIDIA H100 80GB HBM3")}


def test_tiny_takes_one_of_several_gpus(checkout):
    gpus(checkout, 2)
    assert speedrun(checkout).returncode == 0
    assert "torch.distributed.run" not in (checkout / "calls").read_text()
    assert {row["gpus"] for row in timing(checkout)} == {1}


@pytest.mark.parametrize("visible, seen", [("0,1,2", 3), ("GPU-1a,GPU-1b", 2), ("4,-1,5", 1), (None, 8)])
def test_gpus_that_are_hidden_are_not_counted(checkout, visible, seen):
    hidden = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    gpus(checkout, 8)
    said = speedrun(checkout, "--dry-run", preset="d20", **hidden)
    assert f"d20 on {seen}x H100" in said.stdout and f"kernels auto, {seen} GPU(s)" in said.stdout


def test_no_visible_gpu_is_none(checkout):
    gpus(checkout, 8)
    said = speedrun(checkout, preset="d20", CUDA_VISIBLE_DEVICES="")
    assert said.returncode == 2 and said.stderr == (
        "error: preset d20 needs a GPU that nvidia-smi lists and CUDA_VISIBLE_DEVICES shows, found none (tiny runs "
        "without; --dry-run only prints)\n")


def test_more_gpus_than_there_are_can_be_printed_but_not_run(checkout):
    gpus(checkout, 1)
    said = speedrun(checkout, "--gpus", "8", "--dry-run", preset="d20")
    assert said.returncode == 0 and "--nproc_per_node 8" in said.stdout
    said = speedrun(checkout, "--gpus", "8", preset="d20")
    assert said.returncode == 2 and said.stderr == "error: speedrun.sh --gpus must be from 1 to the 1 here, got 8\n"


def test_a_model_that_does_not_fit_ends_the_run_before_a_download(checkout):
    gpus(checkout, 1, "NVIDIA GeForce RTX 4090", 24564)
    said = speedrun(checkout, preset="d32")
    assert said.returncode == 2 and said.stderr.startswith("error: d32 must fit a GPU: pretraining needs ")
    assert [call.split()[1] for call in (checkout / "calls").read_text().splitlines()] == ["scripts.plan"]
    assert speedrun(checkout, "--dry-run", preset="d32").returncode == 0


def test_a_rehearsal_is_reported_as_one(checkout):
    assert speedrun(checkout, "--rehearse").returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert "-m scripts.report reset --preset tiny rehearsal" in calls


def dry_run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SPEEDRUN), *arguments, "--dry-run"], capture_output=True, text=True)


def commands(*arguments: str) -> list[tuple[str, int, object]]:
    """(program, ranks, its parsed flags) of every command that a dry run prints."""
    said = dry_run(*arguments)
    assert said.returncode == 0, said.stderr
    found = []
    for words in (shlex.split(line) for line in said.stdout.splitlines() if line.startswith(".venv/bin/python -m")):
        ranks = int(words[words.index("--nproc_per_node") + 1]) if "torch.distributed.run" in words else 1
        at = next(i for i, word in enumerate(words) if word.startswith("scripts."))
        parse = importlib.import_module(words[at]).parse_args
        found.append((words[at].removeprefix("scripts."), ranks, parse(words[at + 1:])))
    return found


MORE = [[], ["--rehearse"], ["--kernels", "eager"], ["--fp8", "--kernels", "eager"]]


@pytest.mark.parametrize("preset, more", [(preset, more) for preset in ("tiny", "d12", "d20", "d26", "d32")
                                          for more in MORE if preset != "tiny" or "--fp8" not in more])
def test_every_command_of_a_dry_run_is_one_that_its_program_takes(preset, more, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "untouched"))
    found = commands(preset, *more)
    names = [name for name, _, _ in found]
    order = ["dataset", "tok_train", "tok_eval", "base_train", "base_eval", "mid_train", "chat_eval", "chat_sft",
             "chat_eval", "chat_rl", "chat_eval"]
    assert list(dict.fromkeys(names)) == list(dict.fromkeys(order)) and names.count("chat_eval") >= 3
    depths = {args.depth for _, _, args in found if hasattr(args, "depth")}
    assert depths == {4 if preset == "tiny" else int(preset[1:])}
    assert not (tmp_path / "untouched").exists(), "a dry run must leave nothing behind"


@pytest.mark.parametrize("count", [1, 3, 5, 6, 7, 8, 64])
def test_batches_are_whole_and_near_nanochats_for_any_number_of_gpus(count):
    for name, ranks, args in commands("d20", "--gpus", str(count)):
        if name in ("base_train", "mid_train", "chat_sft", "chat_rl", "base_eval", "chat_eval"):
            assert ranks == count
        if name == "base_train":
            assert args.total_batch_size % (args.device_batch_size * args.sequence_len * count) == 0
            assert abs(args.total_batch_size - 524288) <= 0.05 * 524288
        if name == "mid_train":
            assert abs(args.rows_per_step - 256) <= 0.05 * 256
        if name == "chat_sft" and count <= 32:
            assert abs(args.rows_per_step - 32) <= 0.13 * 32
        if name in ("mid_train", "chat_sft"):
            assert args.rows_per_step % (args.device_batch_size * count) == 0
        if name == "chat_rl":
            assert args.examples_per_step % count == 0


def test_d20_on_eight_gpus_is_nanochats_recipe():
    found = {(name, getattr(args, "stage", None)): args for name, _, args in commands("d20", "--gpus", "8")}
    base, rl = found["base_train", None], found["chat_rl", None]
    assert (base.data, base.total_batch_size, base.device_batch_size, base.param_data_ratio) == (
        "fineweb-edu", 524288, 32, 20.0)
    assert (base.matrix_lr, base.embedding_lr, base.head_lr, base.warmdown) == (0.02, 0.2, 0.004, 0.2)
    assert (found["mid_train", None].tasks, found["chat_sft", None].tasks) == ("recipe", "recipe")
    assert (rl.task, rl.examples_per_step, rl.num_samples, rl.max_tokens, rl.top_k) == ("GSM8K", 16, 16, 256, 50)
    assert found["tok_train", None].vocab_size == 65536 and found["chat_eval", "rl"].tasks == "GSM8K"


@pytest.mark.parametrize("depth", plan.TIERS)
def test_a_preset_downloads_the_shards_that_its_tokens_need(depth):
    [base] = [args for name, _, args in commands(f"d{depth}") if name == "base_train"]
    assert plan.Shape(depth).shards <= base.shards <= 1.1 * plan.Shape(depth).shards


def test_a_preset_that_needs_a_gpu_says_so_where_there_is_none(checkout):
    said = speedrun(checkout, preset="d20")
    assert said.returncode == 2 and said.stderr == (
        "error: preset d20 needs a GPU that nvidia-smi lists, found none (tiny runs without; --dry-run only prints)\n")


@pytest.mark.parametrize("count", ["two", "-1", "0", "08", "1000"])
def test_gpus_must_be_a_number(count):
    said = dry_run("d20", "--gpus", count)
    assert said.returncode == 2
    assert said.stderr == f"error: speedrun.sh --gpus must be a whole number from 1 to 999, got {count}\n"


@pytest.mark.parametrize("flags, sentence", [
    (["--gpus", "2"], "preset tiny runs in one process, so --gpus must be 1, got 2"),
    (["--fp8"], "speedrun.sh --fp8 is for d12 to d32, got it with preset tiny"),
])
def test_what_tiny_cannot_do_is_refused(flags, sentence):
    said = dry_run("tiny", *flags)
    assert said.returncode == 2 and said.stderr == f"error: {sentence}\n"


def test_the_plan_and_the_preset_agree_about_shards():
    said = dry_run("d20").stdout
    assert "at least 281 FineWeb-EDU shards" in said and "(300 shards, some to spare)" in said
