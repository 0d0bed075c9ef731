"""What sharing gains in CORE: the tasks of a bundle by PagedScorer, and by nanochat's way, one item per forward.

    python -m bench.bench_core                                              # a random d4, the generated mini bundle
    NANOCHAT_BASE_DIR=... python -m bench.bench_core --stage base --bundle FOLDER --max-per-task 40
    python -m pytest bench/bench_core.py -s

nanochat (Nov 2025) gives the options of an item, padded to the longest, to the dense forward, and takes losses and
likeliest tokens at every position. Both must judge every item alike. The two take turns task by task; prompts and
tokenizing count for both. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from bench.bench_engine import random_tiny
from nanochat.common import run_script
from nanochat.evals import core
from nanochat.evals.mini_bundle import write_mini_bundle
from nanochat.evals.scoring import PagedScorer, Row, Score
from nanochat.gpt import GPT
from nanochat.load import load_model


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default=None, help="measure this stage's checkpoint instead of a random model")
    parser.add_argument("--bundle", type=Path, default=None, help="bundle folder; default: the mini bundle")
    parser.add_argument("--max-per-task", type=int, default=40, help="items per task")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each, after one that is not")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--kernels", default="auto", help="a preset, then op=backend pairs")
    return parser.parse_args(argv)


class OneItemPerForward:
    """Scores the rows of one item in a forward of their own."""

    def __init__(self, model: GPT, pad_id: int):
        self.model, self.max_len, self.pad_id = model, model.config.sequence_len, pad_id

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[Score]:
        x = torch.full((len(rows), max(len(row.ids) for row in rows)), self.pad_id)
        for padded, row in zip(x, rows, strict=True):
            padded[: len(row.ids)] = torch.from_numpy(row.ids)
        x = x.to(self.model.device)
        logits, targets = self.model(x), x.roll(-1, 1)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(x.shape)
        right = logits.argmax(-1) == targets
        spans = [slice(row.start - 1, len(row.ids) - 1) for row in rows]
        return [Score(losses[i, span].mean().item(), bool(right[i, span].all())) for i, span in enumerate(spans)]


class Log(list):
    """Takes the place of a ResponseLog."""

    def add(self, rows: Sequence[dict]) -> None:
        self.extend(rows)


def main(args: argparse.Namespace) -> None:
    model, tokenizer, _ = load_model(args.stage, device=args.device, kernels=args.kernels) if args.stage \
        else random_tiny(args)
    bundle = core.load_bundle(args.bundle or write_mini_bundle())
    ways = {"one by one": (OneItemPerForward(model, tokenizer.bos_id), 1),
            "shared": (PagedScorer(model), core.CHUNK_ITEMS)}
    ways["shared"][0].max_len = model.config.sequence_len  # the dense forward ends there: both get the same rows
    seconds = {(task.label, way): [] for task in bundle.tasks for way in ways}
    for round_number in range(args.rounds + 1):
        for task in bundle.tasks:
            logs = {}
            for way, (scorer, chunk) in ways.items():
                logs[way] = Log()
                with mock.patch.object(core, "CHUNK_ITEMS", chunk):
                    start = time.perf_counter()
                    core.evaluate_task(scorer, tokenizer, task, max_per_task=args.max_per_task, log=logs[way])
                    model_seconds = time.perf_counter() - start
                seconds[task.label, way] += [model_seconds] if round_number else []
            assert_alike(*logs.values())
        print(f"round {round_number or 'warm'}", flush=True)
    report(args, model, bundle, seconds, ways)


def assert_alike(a: Log, b: Log) -> None:
    for mine, other in zip(a, b, strict=True):
        far = max(abs(x - y) for x, y in zip(mine["nats"], other["nats"], strict=True))
        assert far < 1e-4 and mine["correct"] == other["correct"], f"{mine} and {other} must be alike"


def report(args: argparse.Namespace, model: GPT, bundle: core.Bundle, seconds: dict, ways: dict) -> None:
    print(f"{'task':32s} {'one by one':>10} {'shared':>8} {'ratio':>6}   median seconds")
    for task in bundle.tasks:
        medians = [statistics.median(seconds[task.label, way]) for way in ways]
        print(f"{task.label:32s} {medians[0]:>10.2f} {medians[1]:>8.2f} {medians[0] / medians[1]:>6.2f}")
    totals = [[sum(own) for own in zip(*(seconds[task.label, way] for task in bundle.tasks), strict=True)]
              for way in ways]
    ratios = sorted(a / b for a, b in zip(*totals, strict=True))
    print(f"all tasks: ratio median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}; "
          "equal verdicts")
    print(json.dumps({
        "bench": "core", "model": args.stage or "random d4", "bundle": bundle.folder.name, "tasks": len(bundle.tasks),
        "items_per_task": args.max_per_task, "device": str(model.device), "threads": torch.get_num_threads(),
        "kernels": dict(model.kernels.names), "seconds_one_by_one": statistics.median(totals[0]),
        "seconds_shared": statistics.median(totals[1]), "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0], "ratio_max": ratios[-1]}))


def bench_core():
    """For `pytest bench/`: the default run."""
    main(parse_args([]))


if __name__ == "__main__":
    run_script(parse_args, main)
