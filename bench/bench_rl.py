"""What RL gains: held-out pass@1 before and after, for three seeds, and the same with permuted advantages.

    NANOCHAT_BASE_DIR=... python -m bench.bench_rl                       # needs a trained SFT stage there
    NANOCHAT_BASE_DIR=... python -m bench.bench_rl --lr-scale 0.1        # any flag of scripts.chat_rl
    NANOCHAT_BASE_DIR=... python -m pytest bench/bench_rl.py -s

Runs the tiny preset's RL in a folder of its own, the base directory is only read. Shuffling the advantages over a
step's answers keeps everything but the information in them: what the control gains, training gains by accident.
pass@1 is the mean over 8 answers to each problem, with the same seeds before and after. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from nanochat.common import Runtime, base_dir, print0, run_script
from nanochat.engine import Engine
from nanochat.load import load_model, stage_folder
from nanochat.metrics import metrics_path, rows_until
from nanochat.rl import RolloutSettings, evaluate_pass_at_k
from nanochat.tasks import make_task
from scripts import chat_rl

# the RL flags of speedrun.sh's tiny preset
TINY = ("--task arithmetic-hard --top-k 0 --examples-per-step 16 --num-samples 8 --num-steps 20 --device-batch-size 32 "
        "--lr-scale 0.1 --max-tokens 48").split()
TARGET = 0.05  # gain of pass@1 that every seed must reach and no control may


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="every other flag goes to scripts.chat_rl, after the tiny preset's")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--held-out", type=int, default=500, help="held-out problems, 8 answers each")
    args, args.flags = parser.parse_known_args(argv)
    return args


def main(args: argparse.Namespace) -> list[dict]:
    source = base_dir()
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-rl-") as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        try:
            shutil.copytree(source / "tokenizer", Path(folder, "tokenizer"))
            shutil.copytree(source / "checkpoints" / "sft", Path(folder, "checkpoints", "sft"))
            rows, settings = _measure(args)
        finally:
            os.environ["NANOCHAT_BASE_DIR"] = str(source)
    gains = {kind: [row["gain"] for row in rows if row["advantages"] == kind] for kind in ("true", "permuted")}
    print(f"gain of pass@1: true {_signed(gains['true'])}, permuted {_signed(gains['permuted'])}; "
          f"target: every true one at least {TARGET:+.2f}, every permuted one below")
    print(json.dumps({"bench": "rl", "held_out": args.held_out, "threads": torch.get_num_threads(), "flags": settings,
                      "rows": rows}))
    return rows


def _measure(args: argparse.Namespace) -> tuple[list[dict], dict]:
    before = _pass_at_k("sft", args)
    rows = []
    for seed in range(args.seeds):
        for kind, control in (("true", []), ("permuted", ["--permute-advantages"])):
            shutil.rmtree(base_dir() / "checkpoints" / "rl", ignore_errors=True)
            flags = _rl_flags(args, "--seed", str(seed), *control)
            started = time.perf_counter()
            chat_rl.main(flags)
            seconds = time.perf_counter() - started
            after = _pass_at_k("rl", args)
            rewards = [row["reward"] for row in rows_until(metrics_path("rl"), 10**9)]
            fifth = max(1, len(rewards) // 5)
            rows.append({"seed": seed, "advantages": kind, "steps": len(rewards),
                         "reward_first": sum(rewards[:fifth]) / fifth, "reward_last": sum(rewards[-fifth:]) / fifth,
                         "pass_at_1_before": before[0], "pass_at_1": after[0], "gain": after[0] - before[0],
                         "pass_at_8_before": before[-1], "pass_at_8": after[-1], "seconds": seconds})
            _print_row(rows[-1], header=len(rows) == 1)
    return rows, vars(flags)


def _rl_flags(args: argparse.Namespace, *more: str) -> argparse.Namespace:
    return chat_rl.parse_args([*TINY, "--eval-every", "-1", *args.flags, *more])


def _pass_at_k(stage: str, args: argparse.Namespace) -> list[float]:
    flags = _rl_flags(args)
    model, tokenizer, _ = load_model(stage, device=flags.device, kernels=flags.kernels, dtype=flags.dtype)
    print0(f"{stage}: {stage_folder(stage)}, {args.held_out} held-out problems")
    settings = RolloutSettings(flags.examples_per_step, flags.num_samples, flags.max_tokens, top_k=flags.top_k)
    engine = Engine(model, tokenizer, max_batch=flags.rollout_batch_size)
    return evaluate_pass_at_k(make_task(flags.task, "val", args.held_out), engine, settings, Runtime(model.device))


def _print_row(row: dict, header: bool) -> None:
    if header:
        print("seed advantages steps  reward first -> last   pass@1 before -> after    gain   pass@8 -> after  seconds")
    print(f"{row['seed']:>4} {row['advantages']:<10} {row['steps']:>5}  {row['reward_first']:>12.3f} -> "
          f"{row['reward_last']:.3f}  {row['pass_at_1_before']:>14.3f} -> {row['pass_at_1']:.3f}  "
          f"{row['gain']:>+7.3f}  {row['pass_at_8_before']:>7.3f} -> {row['pass_at_8']:.3f}  {row['seconds']:>7.0f}",
          flush=True)


def _signed(values: list[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def bench_rl():
    """For `pytest bench/`: the default run, held to the target."""
    rows = main(parse_args([]))
    assert all((row["gain"] >= TARGET) == (row["advantages"] == "true") for row in rows), "see the table"


if __name__ == "__main__":
    run_script(parse_args, main)
