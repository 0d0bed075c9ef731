"""Examine a chat model on held-out problems.

python -m scripts.chat_eval -i sft
python -m scripts.chat_eval -i rl -a GSM8K
python -m scripts.chat_eval -i mid -a "ARC-Easy|MMLU" -x 100

Categorical tasks compare the likelihoods of the letters; generative ones sample an answer, with the calculator unless
--tools off takes it away.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from nanochat.common import UserError, close_runtime, init_runtime, print0, run_script
from nanochat.engine import Engine, SamplingParams
from nanochat.engine.flags import add_engine_flags, engine_options
from nanochat.evals.chat import (
    CHAT_CORE,
    CHAT_CORE_TASKS,
    GENERATED_CHAT_CORE,
    ChatResult,
    chat_core,
    run_chat_eval,
)
from nanochat.evals.results import ResponseLog
from nanochat.evals.scoring import PagedScorer
from nanochat.load import add_checkpoint_flags, add_device_flags, load_model
from nanochat.report import Report
from nanochat.tasks import CHAT_CORE_TASKS as GENERATED_CHAT_CORE_TASKS
from nanochat.tasks import TASKS, Task, make_task
from nanochat.tasks.conversations import PREFIX

TITLES = {"mid": "Mid evaluation", "sft": "SFT evaluation", "rl": "RL evaluation"}
MAX_TOKENS = 512
GENERATED_PROBLEMS, GENERATED_MAX_TOKENS = 200, 128


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=list(TITLES), help="stage of the model")
    parser.add_argument("-i", "--stage", dest="stage_flag", choices=list(TITLES), help="the same as a flag")
    add_checkpoint_flags(parser)
    add_device_flags(parser)
    add_engine_flags(parser)
    parser.add_argument("-a", "--tasks", "--task-name", default=None, help="task names with | or commas between; "
                        "default: the generated ones for a model that was tuned on no others but files, else "
                        + "|".join(CHAT_CORE_TASKS))
    parser.add_argument("-x", "--max-problems", type=int, default=None, help="most problems per task, from the test "
                        f"split; default: all, of a generated task {GENERATED_PROBLEMS}")
    parser.add_argument("-t", "--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("-k", "--top-k", type=int, default=50, help="sample among the k likeliest tokens, 0 = all")
    parser.add_argument("-m", "--max-tokens", "--max-new-tokens", type=int, default=None, help="longest answer in "
                        f"tokens; default: {MAX_TOKENS}, of a generated task {GENERATED_MAX_TOKENS}")
    parser.add_argument("-n", "--num-samples", type=int, default=1, help="answers per problem; one right one is enough")
    parser.add_argument("-b", "--device-batch-size", "--batch-size", type=int, default=64, help="answers that the "
                        "engine works on at once")
    parser.add_argument("--tools", default="calculator", choices=["calculator", "off"], help="what the model may call")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--save-responses", type=Path, default=None, help="write every problem with its answers and "
                        "their verdicts to this new JSONL file")
    args = parser.parse_args(argv)
    if (args.stage is None) == (args.stage_flag is None):
        parser.error(f"say one stage, {', '.join(TITLES)}: python -m scripts.chat_eval -i sft")
    args.stage = args.stage or args.stage_flag
    return args


def main(args: argparse.Namespace) -> None:
    if args.max_problems is not None and args.max_problems < 1:
        raise UserError(f"--max-problems must be at least 1, got {args.max_problems}")
    params = SamplingParams(MAX_TOKENS if args.max_tokens is None else args.max_tokens, args.temperature,
                            args.top_k or None, args.seed, args.num_samples)
    runtime = init_runtime(args.device)
    log = ResponseLog(args.save_responses, runtime) if args.save_responses else None
    tasks = _tasks(re.split("[|,]", args.tasks), args) if args.tasks else None
    model, tokenizer, state = load_model(args.stage, device=runtime.device, kernels=args.kernels, dtype=args.dtype,
                                         depth=args.depth, step=args.step)
    tasks = tasks or _tasks(default_tasks(state), args)
    engine = Engine(model, tokenizer, tools=args.tools, max_batch=args.device_batch_size, **engine_options(args))
    scorer = PagedScorer(engine.model)
    results = []
    for task in tasks:
        own = replace(params, max_tokens=GENERATED_MAX_TOKENS) if args.max_tokens is None and task.name in TASKS \
            else params
        results.append(run_chat_eval(task, engine, scorer, params=own, runtime=runtime, log=log))
        _print_result(results[-1])
    conditions = _conditions(tasks, args)
    means = {} if args.tools == "off" else _means(results, conditions)
    for name, value in means.items():
        print0(f"{name}: {value:.4f}")
    if runtime.is_main:
        suffix = "" if args.tools == "calculator" else ", tool off"
        Report().scores(args.stage, _scores(results, [suffix + _conditions([task], args) for task in tasks]) | means)
        Report().add(TITLES[args.stage] + suffix, _section(state, results, means, engine, conditions))
    close_runtime()


def default_tasks(state: dict) -> list[str]:
    """The generated tasks for a model whose last stage saw no others but files, else those of ChatCORE: what would
    have to be downloaded is the default only where it was downloaded to train."""
    seen = state["args"].get("tasks") or state["args"].get("task") or ""
    entries = [entry.strip() for entry in seen.split(",")]
    names = {entry.partition("=")[0] for entry in entries if not entry.startswith(PREFIX)}
    return list(TASKS) if names <= {"tiny", *TASKS} else list(CHAT_CORE_TASKS)


def _tasks(names: list[str], args: argparse.Namespace) -> list[Task]:
    """The test split of each task, as long as --max-problems says."""
    return [make_task(name, "test", args.max_problems or (GENERATED_PROBLEMS if name in TASKS else None))
            for name in dict.fromkeys(names)]


def _conditions(tasks: list[Task], args: argparse.Namespace) -> str:
    """What sets scores apart from those of all problems answered greedily, once and at any length; "" for these."""
    said = []
    if any(len(task) == args.max_problems for task in tasks):
        said.append(f"at most {args.max_problems} problems" + " per task" * (len(tasks) > 1))
    if any(task.kind == "generative" for task in tasks):
        if args.max_tokens is not None:
            said.append(f"at most {args.max_tokens} tokens")
        if args.num_samples > 1:
            said.append(f"any of {args.num_samples}")
        if args.temperature > 0:
            said.append(f"temperature {args.temperature:g}")
    return f" ({', '.join(said)})" if said else ""


def _means(results: list[ChatResult], conditions: str) -> dict[str, float]:
    """The ChatCOREs by name, each where all its tasks ran."""
    means = {CHAT_CORE + conditions: chat_core(results, CHAT_CORE_TASKS),
             GENERATED_CHAT_CORE + conditions: chat_core(results, GENERATED_CHAT_CORE_TASKS)}
    return {name: value for name, value in means.items() if value is not None}


def _print_result(result: ChatResult) -> None:
    expressions = "" if result.expressions is None else f", expression right {result.expressions / result.problems:.1%}"
    errors = f", {result.errors} could not be answered" if result.errors else ""
    chance = ", near chance" if result.near_chance else ""
    print0(f"{result.task:16s} {result.correct}/{result.problems} = {result.accuracy:.1%}{chance}{expressions}{errors} "
           f"({result.seconds:.1f} s)")


def _scores(results: list[ChatResult], suffixes: list[str]) -> dict[str, float]:
    """The score table's metrics; under conditions of its own, or without the tool, a score gets a name of its own."""
    named = list(zip(results, suffixes, strict=True))
    scores = {result.task + suffix: result.accuracy for result, suffix in named}
    return scores | {f"{result.task}, expression right{suffix}": result.expressions / result.problems
                     for result, suffix in named if result.expressions is not None}


def _section(state: dict, results: list[ChatResult], means: dict[str, float], engine: Engine, conditions: str) -> dict:
    table = [{"task": r.task, "problems": r.problems, "accuracy": r.accuracy, "baseline": r.baseline,
              "centered": r.centered, "near chance": r.near_chance,
              "expression right": None if r.expressions is None else r.expressions / r.problems,
              "not answered": r.errors, "seconds": r.seconds} for r in results]
    own = {"Tasks": table, "First problem of each": [{"task": r.task, **r.example} for r in results]}
    own |= {f"Engine {name}": value for name, value in engine.stats().items()}
    return {"Step": state["step"], "Tools": engine.tools} | means | {k + conditions: v for k, v in own.items()}


if __name__ == "__main__":
    run_script(parse_args, main)
