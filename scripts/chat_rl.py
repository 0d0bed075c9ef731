"""Reinforcement learning: sample answers to a task's problems, reward them, train on what did better than average.

python -m scripts.chat_rl
"""

import argparse

from nanochat.common import UserError, close_runtime, init_runtime, print0, run_script
from nanochat.engine import Engine
from nanochat.engine.flags import add_engine_flags, engine_options
from nanochat.metrics import metrics_path, rows_until
from nanochat.report import Report
from nanochat.rl import (
    PASS_AT,
    FittingProblems,
    RolloutBatches,
    RolloutSettings,
    evaluate_pass_at_k,
    rollout_identity,
)
from nanochat.stage import add_training_flags, make_trainer, model_from, training_facts
from nanochat.tasks import make_task
from nanochat.train import Schedule

# Problems of their own: supervised training draws those of seeds 0, 1, ...
TASK_SEED = 1000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="sft", choices=["mid", "sft"], help="stage to start from")
    parser.add_argument("--depth", type=int, default=None, help="model depth; default: the deepest of the source stage")
    parser.add_argument("--source-step", type=int, default=None, help="checkpoint step of the source; default: newest")
    parser.add_argument("--task", default="GSM8K", help="task that gives the rewards")
    parser.add_argument("--problems", type=int, default=7473, help="training problems, at most; GSM8K has 7,473")
    parser.add_argument("--num-steps", type=int, default=-1, help="updates; -1 = one pass over the problems")
    parser.add_argument("--examples-per-step", type=int, default=16, help="problems per update over all ranks")
    parser.add_argument("--num-samples", type=int, default=16, help="answers per problem")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens, tool output included")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled answers")
    parser.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest tokens, 0 = all")
    parser.add_argument("--rollout-batch-size", type=int, default=64, help="answers that the engine works on at once")
    parser.add_argument("--eval-problems", type=int, default=400, help=f"held-out problems of pass@k, {PASS_AT} "
                        "answers each")
    parser.add_argument("--permute-advantages", action="store_true",
                        help="control: shuffle the advantages over a step's answers; nothing must be learned")
    add_engine_flags(parser)
    add_training_flags(parser, device_batch_size=8, lr_scale=0.05, eval_every=60, save_every=60)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    settings = RolloutSettings(args.examples_per_step, args.num_samples, args.max_tokens, args.temperature, args.top_k,
                               args.seed, args.permute_advantages)
    runtime = init_runtime(args.device, seed=args.seed)
    model, tokenizer, source_state = model_from(args.source, args, runtime)
    train_task, val_task = (
        FittingProblems(make_task(args.task, split, size, seed), tokenizer, model.config.sequence_len)
        for split, size, seed in (("train", args.problems, TASK_SEED), ("val", args.eval_problems, 0)))
    engine = Engine(model, tokenizer, max_batch=args.rollout_batch_size, **engine_options(args))

    def evaluate(step: int) -> dict:
        passed = evaluate_pass_at_k(val_task, engine, settings, runtime)
        return {"pass_at_1": passed[0], "pass_at_k": passed}

    schedule = Schedule(_num_steps(args, len(train_task)), warmdown=1.0, momentum_steps=0)
    identity = {"source": f"{args.source} step {source_state['step']}", "source_weights": source_state["weights"],
                "task": train_task.name, "problems": len(train_task), **rollout_identity(settings),
                **engine_options(args)}
    trainer = make_trainer("rl", model, tokenizer, runtime, schedule, args, identity=identity, evaluate=evaluate)
    finished = trainer.restore(args.resume)
    batches = RolloutBatches(train_task, engine, settings, args.device_batch_size, runtime, trainer.data_state)
    print0(f"plan: {schedule.n_steps:,} steps of {args.examples_per_step} problems x {args.num_samples} answers, "
           f"{len(train_task):,} problems of {train_task.name} ({train_task.left_out} too long for the context), "
           f"{len(val_task):,} held out ({val_task.left_out} too long)")
    if finished:
        print0("rl: already finished, nothing to do")
        return close_runtime()
    trainer.run(batches, when_done=lambda: Report().section("RL", _facts(args, trainer, schedule, engine, identity,
                                                                        train_task, len(val_task))))
    close_runtime()


def _num_steps(args: argparse.Namespace, n_problems: int) -> int:
    if args.num_steps == 0 or args.num_steps < -1:
        raise UserError(f"--num-steps must be at least 1, or -1 for one pass over the problems, got {args.num_steps}")
    return args.num_steps if args.num_steps > 0 else max(1, n_problems // args.examples_per_step)


def _facts(args, trainer, schedule, engine, identity, task, n_held_out) -> dict:
    rows = rows_until(metrics_path("rl"), schedule.n_steps)
    steps = [row for row in rows if "reward" in row]
    rewards = [row["reward"] for row in steps]
    passed = [row["pass_at_k"] for row in rows if "pass_at_k" in row]
    tenth = max(1, len(rewards) // 10)
    facts = {"Started from": identity["source"], "Task": task.name, "Problems": len(task),
             "Problems left out, too long for the context": task.left_out,
             "Problems per step": args.examples_per_step, "Answers per problem": args.num_samples,
             "Reward, mean of the first tenth of the steps": sum(rewards[:tenth]) / tenth,
             "Reward, mean of the last tenth": sum(rewards[-tenth:]) / tenth,
             "|log p of engine - of trainer| in nats, mean": sum(row["logprob_gap"] for row in steps) / len(steps),
             "The same, largest": max(row["logprob_gap_max"] for row in steps)}
    if args.permute_advantages:
        facts["Control"] = "advantages permuted"
    if passed:
        facts[f"pass@k on {n_held_out} held-out problems"] = [
            {"k": k, "before": before, "after": after}
            for k, (before, after) in enumerate(zip(passed[0], passed[-1], strict=True), start=1)]
    rows_per_rank = args.examples_per_step * args.num_samples // trainer.runtime.world_size
    facts |= training_facts(trainer, schedule, args.examples_per_step * args.num_samples,
                            -(-rows_per_rank // args.device_batch_size))
    return facts | {f"Engine {name}": value for name, value in engine.stats().items()}


if __name__ == "__main__":
    run_script(parse_args, main)
