"""Parity, the largest ops, d12 and d20 steps in turns, decoding, inside a budget of minutes: bash bench/qualify.sh

Each stage is a process of its own: a kernel that breaks the CUDA context, or hangs, takes its own rows with it and no
others. A stage that has less time left than it needs is dropped and named; one that overruns is ended, its rows kept.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from bench import harness, results
from bench.compare import summary
from nanochat.common import UserError, run_script
from nanochat.environment import ROOT
from nanochat.flags import positive_float

# by their share of a d20 step, largest first
LARGEST_OPS = ("linear_relu2", "linear", "attention", "cross_entropy", "rms_norm", "qk_norm_rope")
PARITY_SHARE = 0.25  # of the budget at most: the rest would be of little use without times
DECODE_SHARE = 0.2  # at most for a run of it: d20's step comes after the first


@dataclass(frozen=True)
class Stage:
    """A command and the seconds below which starting it is pointless (estimates: nothing was measured yet)."""

    name: str
    command: list[str]
    needs_s: float
    most_share: float = 1.0


def plan(path: Path) -> list[Stage]:
    """Return the stages in order of worth; `path` collects the rows."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parity = [*pytest, "-m", "gpu", "tests/test_kernels_gpu.py", "-k", "exact or repeats"]
    graphs = [*pytest, "-m", "gpu", "tests/test_runner.py"]

    def op_rows(op: str) -> Stage:
        return Stage(f"op {op}", [*pytest, "bench/bench_kernels.py", "-k", "not window", "--op", op, "--size", "d20",
                                  "--rows", str(path)], 20)

    def train(depth: int, needs_s: float) -> Stage:
        return Stage(f"train d{depth}", [
            sys.executable, "-m", "bench.bench_train", "--depth", str(depth), "--rounds", "4", "--rows", str(path),
            "--sets", "eager", "compile", "best", "best+fp8", "--best-from", str(path)], needs_s)

    def decode(name: str, needs_s: float, *flags: str) -> Stage:
        command = [sys.executable, "-m", "bench.bench_decode", "--depth", "20", "--tokens", "64", "--rows", str(path)]
        return Stage(f"decode {name}", [*command, *flags], needs_s, DECODE_SHARE)

    few = ("--parts", "steps", "--batch-sizes", "1", "64", "--contexts", "1024")
    return [Stage("parity", parity, 20, PARITY_SHARE), Stage("parity of graphs", graphs, 20, DECODE_SHARE),
            *map(op_rows, LARGEST_OPS), train(12, 60),
            decode("d20", 60, "--parts", "steps", "closed", "poisson", "--batch-sizes", "1", "8", "64"), train(20, 100),
            decode("overlapped", 30, "--overlap", *few), decode("with fp8 KV", 30, "--kv", "fp8", *few),
            decode("without graphs", 30, "--no-graphs", *few)]


def run_stages(stages: list[Stage], seconds: float, note: Callable[[str], None],
               run: Callable[[list[str], float], int | None], now: Callable[[], float] = time.monotonic) -> bool:
    """Run what fits into `seconds`; return whether every stage that ran succeeded.

    run(command, limit) returns the exit code, None when it was ended at `limit` seconds.
    """
    end, good = now() + seconds, True
    for stage in stages:
        left = end - now()
        if left < stage.needs_s:
            note(f"dropped for want of time: {stage.name} ({left:.0f} s left, it needs {stage.needs_s:.0f})")
            continue
        limit = min(left, stage.most_share * seconds)
        code = run(stage.command, limit)
        if code is None:
            note(f"cut short: {stage.name} was ended after {limit:.0f} s, rows until then are kept")
        elif code:
            note(f"failed: {stage.name} (exit code {code})")
        good = good and code == 0
    return good


def run_process(command: list[str], limit: float) -> int | None:
    """Run in the checkout, output passed through; at the limit end the process and wait for it."""
    print(f"\n$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive_float, default=10.0, help="the budget for everything")
    parser.add_argument("--only", action="append", choices=("parity", "op", "train", "decode"),
                        help="these stages only")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("qualify needs a CUDA GPU that torch can see, found none; nothing was measured")
    environment = harness.environment(torch.device("cuda"))
    path = results_path(environment["gpu"])
    print(f"{environment['gpu']}, driver {environment['driver']}, torch {environment['torch']}, triton "
          f"{environment['triton']}, commit {environment['commit']}{', with changes' if environment['dirty'] else ''}")

    def note(text: str) -> None:
        print(text, flush=True)
        results.Results(path, environment).note(text)  # read again: the stages write the same file

    results.Results(path, environment).save()
    stages = [stage for stage in plan(path) if not args.only or stage.name.split()[0] in args.only]
    good = run_stages(stages, 60 * args.minutes, note, run_process)
    print(f"\n{summary(results.load(path))}\n\nrows: {path}\n"
          f"to keep them: python -m bench.compare {path} --accept (baseline, best.json and README's table)")
    if not good:
        raise SystemExit(1)


def results_path(gpu: str) -> Path:
    """Return a path that does not exist yet, in $OUT when that is set."""
    if os.environ.get("OUT"):
        path = Path(os.environ["OUT"]) / "qualify.json"
        if not path.exists():
            return path
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    return folder / f"{name}-{datetime.now():%Y-%m-%d-%H-%M-%S}.json"


if __name__ == "__main__":
    run_script(parse_args, main)
