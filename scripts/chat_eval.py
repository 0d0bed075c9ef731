"""Examine a chat model on held-out problems: python -m scripts.chat_eval sft

Categorical tasks compare the logits of the letters; generative ones sample an answer, with the calculator unless
--tools off takes it away.
"""

import argparse

from nanochat.common import UserError, close_runtime, init_runtime, print0, run_script
from nanochat.engine import Engine, SamplingParams
from nanochat.evals.chat import GENERATED_CHAT_CORE, ChatResult, chat_core, run_chat_eval
from nanochat.load import add_checkpoint_flags, add_device_flags, load_model
from nanochat.report import Report
from nanochat.tasks import CHAT_CORE_TASKS, TASKS, make_task

TITLES = {"mid": "Mid evaluation", "sft": "SFT evaluation", "rl": "RL evaluation"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=list(TITLES), help="stage of the model")
    parser.add_argument("-i", "--stage", dest="stage_flag", choices=list(TITLES), help="the same as a flag")
    add_checkpoint_flags(parser)
    add_device_flags(parser)
    parser.add_argument("--tasks", default=",".join(TASKS), help="task names with commas between; default: all")
    parser.add_argument("--max-problems", type=int, default=200, help="problems per task, from the test split")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top-k", type=int, default=None, help="sample among the k likeliest tokens")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer in tokens")
    parser.add_argument("--num-samples", type=int, default=1, help="answers per problem; one right one is enough")
    parser.add_argument("--device-batch-size", type=int, default=64, help="rows that the model works on at once")
    parser.add_argument("--tools", default="calculator", choices=["calculator", "off"], help="what the model may call")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    args = parser.parse_args(argv)
    if (args.stage is None) == (args.stage_flag is None):
        parser.error(f"say one stage, {', '.join(TITLES)}: python -m scripts.chat_eval sft")
    args.stage = args.stage or args.stage_flag
    return args


def main(args: argparse.Namespace) -> None:
    if args.max_problems < 1:
        raise UserError(f"--max-problems must be at least 1, got {args.max_problems}")
    tasks = [make_task(name, "test", args.max_problems) for name in dict.fromkeys(args.tasks.split(","))]
    params = SamplingParams(args.max_tokens, args.temperature, args.top_k, args.seed, args.num_samples)
    runtime = init_runtime(args.device)
    model, tokenizer, state = load_model(args.stage, device=runtime.device, kernels=args.kernels, dtype=args.dtype,
                                         depth=args.depth, step=args.step)
    engine = Engine(model, tokenizer, tools=args.tools, max_batch=args.device_batch_size)
    results = []
    for task in tasks:
        results.append(run_chat_eval(task, engine, params=params, batch_size=args.device_batch_size, runtime=runtime))
        _print_result(results[-1])
    scores = _scores(results, args.tools)
    if GENERATED_CHAT_CORE in scores:
        print0(f"{GENERATED_CHAT_CORE}: {scores[GENERATED_CHAT_CORE]:.4f}")
    if runtime.is_main:
        Report().scores(args.stage, scores)
        suffix = "" if args.tools == "calculator" else ", tool off"
        Report().section(TITLES[args.stage] + suffix, _section(state, results, scores, engine))
    close_runtime()


def _print_result(result: ChatResult) -> None:
    expressions = "" if result.expressions is None else f", expression right {result.expressions / result.problems:.1%}"
    errors = f", {result.errors} could not be answered" if result.errors else ""
    print0(f"{result.task:16s} {result.correct}/{result.problems} = {result.accuracy:.1%}{expressions}{errors} "
           f"({result.seconds:.1f} s)")


def _scores(results: list[ChatResult], tools: str) -> dict[str, float]:
    """The score table's metrics; without the tool they get names of their own and no ChatCORE."""
    suffix = "" if tools == "calculator" else ", tool off"
    scores = {result.task + suffix: result.accuracy for result in results}
    scores |= {f"{result.task}, expression right{suffix}": result.expressions / result.problems
               for result in results if result.expressions is not None}
    core = chat_core(results, CHAT_CORE_TASKS) if tools == "calculator" else None
    return scores if core is None else scores | {GENERATED_CHAT_CORE: core}


def _section(state: dict, results: list[ChatResult], scores: dict[str, float], engine: Engine) -> dict:
    table = [{"task": r.task, "problems": r.problems, "accuracy": r.accuracy, "centered": r.centered,
              "expression right": None if r.expressions is None else r.expressions / r.problems,
              "not answered": r.errors, "seconds": r.seconds} for r in results]
    section = {"Step": state["step"], "Tools": engine.tools, "Tasks": table,
               "First problem of each": [{"task": r.task, **r.example} for r in results]}
    if GENERATED_CHAT_CORE in scores:
        section[GENERATED_CHAT_CORE] = scores[GENERATED_CHAT_CORE]
    return section | {f"Engine {name}": value for name, value in engine.stats().items()}


if __name__ == "__main__":
    run_script(parse_args, main)
