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
import time
from pathlib import Path

import pytest

from nanochat import plan

SPEEDRUN = Path(__file__).parent.parent / "speedrun.sh"
STAGES = ["dataset", "tok_train", "tok_eval", "base_train", "base_eval", "mid_train", "chat_eval", "chat_sft",
          "chat_eval", "chat_eval", "chat_rl", "chat_eval"]
# Logs its arguments; fails or waits where the test says so.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
if [ "$2" = scripts.report ]; then mkdir -p "$NANOCHAT_BASE_DIR/report"; touch "$NANOCHAT_BASE_DIR/report/run.json"; fi
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


def environment(checkout: Path, **extra: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(checkout), "NANOCHAT_BASE_DIR": str(checkout / "base"),
            "CALLS": str(checkout / "calls"), **extra}


def speedrun(checkout: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(checkout / "repo/speedrun.sh"), "tiny", *arguments], capture_output=True,
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


@pytest.mark.parametrize("preset", ["tiny", "d12", "d20", "d26", "d32"])
@pytest.mark.parametrize("more", [[], ["--rehearse"], ["--fp8", "--kernels", "eager"]], ids=lambda more: "".join(more))
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


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_batches_are_whole_for_any_number_of_gpus(gpus):
    for name, ranks, args in commands("d20", "--gpus", str(gpus)):
        if name in ("base_train", "mid_train", "chat_sft", "chat_rl", "base_eval", "chat_eval"):
            assert ranks == gpus
        if name == "base_train":
            assert args.total_batch_size % (args.device_batch_size * args.sequence_len * gpus) == 0
            assert abs(args.total_batch_size - 524288) <= args.device_batch_size * args.sequence_len * gpus / 2
        if name in ("mid_train", "chat_sft"):
            assert args.rows_per_step % (args.device_batch_size * gpus) == 0
        if name == "chat_rl":
            assert args.examples_per_step % gpus == 0


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
    (checkout / "bin").mkdir()
    (checkout / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (checkout / "bin/nvidia-smi").chmod(0o755)
    environment_without = environment(checkout) | {"PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    said = subprocess.run(["bash", str(checkout / "repo/speedrun.sh"), "d20"], capture_output=True, text=True,
                          env=environment_without)
    assert said.returncode == 2 and said.stderr == (
        "error: preset d20 needs a GPU that nvidia-smi lists, found none (tiny runs without; --dry-run only prints)\n")


@pytest.mark.parametrize("gpus", ["two", "-1"])
def test_gpus_must_be_a_number(gpus):
    said = dry_run("d20", "--gpus", gpus)
    assert said.returncode == 2 and said.stderr == f"error: speedrun.sh --gpus must be a whole number, got {gpus}\n"
