"""speedrun.sh on stand-in programs: order, skipping, failing, setting aside, one run at a time, passing on a stop."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

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
    assert "--depth 4" in base and "--resume auto --kernels eager" in base and f"--data {checkout}/texts" in base


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
