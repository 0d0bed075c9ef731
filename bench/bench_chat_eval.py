"""What batching gains in the chat evaluation: 64 rows and shared scoring against one problem at a time, greedy.

    python -m bench.bench_chat_eval                                  # a random d4
    NANOCHAT_BASE_DIR=... python -m bench.bench_chat_eval --stage sft
    python -m pytest bench/bench_chat_eval.py -s

One at a time, as nanochat (Nov 2025) generates: answers by an engine of one row, letters from a dense forward each.
Both must give the same answers. The two take turns task by task; the last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from bench.bench_core import Log, OneItemPerForward
from bench.bench_engine import random_tiny
from nanochat.common import run_script
from nanochat.engine import Engine, SamplingParams
from nanochat.evals.chat import run_chat_eval
from nanochat.evals.scoring import PagedScorer, Row, Score
from nanochat.gpt import GPT
from nanochat.load import load_model
from nanochat.tasks import make_task

TASKS = ("arithmetic", "spelling", "choice")  # answers with the tool, without it, letters


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default=None, help="measure this stage's checkpoint instead of a random model")
    parser.add_argument("--tasks", default=",".join(TASKS), help="task names with commas between")
    parser.add_argument("--problems", type=int, default=64, help="problems per task")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer in tokens")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each, after one that is not")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--kernels", default="auto", help="a preset, then op=backend pairs")
    return parser.parse_args(argv)


class OneProblemPerForward(OneItemPerForward):
    """Scores all letters of a problem, rows that differ in the last token, from one forward over the prompt."""

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[Score]:
        scores, prompt = [], None
        for row in rows:
            known = row.ids[:-1].tolist()
            if known != prompt:
                prompt, logits = known, self.model(torch.tensor([known], device=self.model.device))[0, -1]
            scores.append(Score(logits.logsumexp(0).item() - logits[row.ids[-1]].item(), greedy=False))
        return scores


def main(args: argparse.Namespace) -> None:
    model, tokenizer, _ = load_model(args.stage, device=args.device, kernels=args.kernels) if args.stage \
        else random_tiny(args)
    tasks = [make_task(name, "test", args.problems) for name in args.tasks.split(",")]
    params = SamplingParams(args.max_tokens, temperature=0.0)
    print(f"{'round':>5} {'task':16s} {'one by one':>10} {'batched':>8} {'ratio':>6}   seconds")
    totals = []
    for round_number in range(args.rounds + 1):
        times = [measure(model, tokenizer, task, params) for task in tasks]
        for task, (alone, batched) in zip(tasks, times, strict=True):
            print(f"{round_number or 'warm':>5} {task.name:16s} {alone:>10.2f} {batched:>8.2f} {alone / batched:>6.2f}",
                  flush=True)
        totals += [[sum(column) for column in zip(*times, strict=True)]] if round_number else []
    ratios = sorted(alone / batched for alone, batched in totals)
    print(f"all tasks: ratio median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}; "
          "equal answers")
    print(json.dumps({
        "bench": "chat_eval", "model": args.stage or "random d4", "device": str(model.device),
        "threads": torch.get_num_threads(), "kernels": dict(model.kernels.names), "tasks": args.tasks,
        "problems_per_task": args.problems, "max_tokens": args.max_tokens,
        "seconds_one_by_one": statistics.median(alone for alone, _ in totals),
        "seconds_batched": statistics.median(batched for _, batched in totals),
        "ratio_median": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1]}))


def measure(model: GPT, tokenizer, task, params: SamplingParams) -> tuple[float, float]:
    """Examine on a task one problem at a time and batched; return both times in seconds."""
    seconds, logs = [], []
    for max_batch, scorer in ((1, OneProblemPerForward(model, tokenizer.bos_id)), (64, PagedScorer(model))):
        engine = Engine(model, tokenizer, max_batch=max_batch, prefix_cache=max_batch > 1)
        logs.append(Log())
        start = time.perf_counter()
        run_chat_eval(task, engine, scorer, params=params, log=logs[-1])
        seconds.append(time.perf_counter() - start)
    assert logs[0] == logs[1], "one by one and batched must answer the same"
    return seconds[0], seconds[1]


def bench_chat_eval():
    """For `pytest bench/`: the default run."""
    main(parse_args([]))


if __name__ == "__main__":
    run_script(parse_args, main)
