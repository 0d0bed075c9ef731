"""Training on conversations, the same for mid-training and SFT but for packing, mask and schedule."""

import argparse

import torch

from nanochat import flags
from nanochat.common import Runtime, UserError, close_runtime, init_runtime, print0
from nanochat.dataloader import ConversationLoader
from nanochat.gpt import GPT
from nanochat.report import Report
from nanochat.stage import accumulation_steps, add_training_flags, make_trainer, model_from, training_facts
from nanochat.tasks import TaskMixture, mixture_texts, parse_mixture
from nanochat.tokenizer import Tokenizer
from nanochat.train import LoaderBatches, Schedule

PAD_MULTIPLE = 16  # of a padded row's length: conversations of 20 to 75 tokens waste a third of a multiple of 64
# Held-out rows of an evaluation, in updates' worth: as many on any number of GPUs, at nanochat's sizes its
# 20 x 524,288 tokens, and what its 100 batches of 4 rows on each of 8 GPUs are.
EVAL_UPDATES = {"mid": 20, "sft": 100}
SAMPLE = 4000  # conversations packed to tell how many rows all of them will fill, in about a second


def add_finetune_flags(parser: argparse.ArgumentParser, *, source: str, rows: int, device_batch_size: int,
                       eval_every: int, lr_scale: float) -> None:
    """Add the flags of a stage that starts from another stage and trains on conversations."""
    parser.add_argument("--source", default=source, choices=["base", "mid", "sft"], help="stage to start from")
    parser.add_argument("--depth", type=int, default=None, help="model depth; default: the deepest of the source stage")
    parser.add_argument("--source-step", type=int, default=None, help="checkpoint step of the source; default: newest")
    parser.add_argument("--tasks", default="recipe", help="training conversations, recipe (nanochat's), tiny or "
                        "name=size,name,json:FILE; a stored task needs no size, and one given twice counts twice")
    parser.add_argument("--val-tasks", default=None, help="held-out conversations, written alike; default: as --tasks")
    parser.add_argument("--sequence-len", type=flags.positive_int_or_off, default=-1,
                        help="tokens per row; -1 = the model's context")
    parser.add_argument("--num-steps", type=flags.positive_int_or_off, default=-1,
                        help="updates; -1 = one pass over the conversations")
    parser.add_argument("--rows-per-step", type=flags.positive_int, default=rows, help="rows per update over all ranks")
    parser.add_argument("--eval-batches", type=flags.positive_int, default=None, help="validation micro-batches per "
                        f"rank; default: the rows of {EVAL_UPDATES['mid']} updates in mid-training, "
                        f"{EVAL_UPDATES['sft']} in SFT, over all ranks")
    add_training_flags(parser, device_batch_size=device_batch_size, lr_scale=lr_scale, eval_every=eval_every,
                       save_every=-1)


def finetune(stage: str, title: str, args: argparse.Namespace, *, pack: bool, warmdown: float,
             momentum_steps: int) -> None:
    """Run a conversation stage from its source checkpoint to its report section."""
    runtime = init_runtime(args.device, seed=args.seed)
    model, tokenizer, source_state = model_from(args.source, args, runtime)
    accumulation = accumulation_steps(args.rows_per_step, args.device_batch_size, runtime, flag="--rows-per-step")
    context = model.config.sequence_len
    eval_batches = args.eval_batches or EVAL_UPDATES[stage] * accumulation
    T = args.sequence_len if args.sequence_len > 0 else context
    if T > context:
        raise UserError(f"--sequence-len must be at most the model's context of {context} tokens, got {T}")
    tasks, val_tasks = mixture_texts(stage, args.tasks, args.val_tasks)
    train_task, val_task = parse_mixture(tasks, "train", args.seed), parse_mixture(val_tasks, "val", args.seed)

    def loader(task, state: dict | None = None) -> ConversationLoader:
        return ConversationLoader(task, tokenizer, args.device_batch_size, T, pack=pack, shuffle_seed=args.seed,
                                  rank=runtime.rank, world_size=runtime.world_size, device=runtime.device, state=state,
                                  pad_multiple=PAD_MULTIPLE)

    def evaluate(step: int) -> dict:
        batches = loader(val_task)
        try:
            return {"val_loss": mean_loss(model, batches, eval_batches, runtime)}
        finally:
            batches.close()

    n_steps = args.num_steps
    if n_steps < 0:
        rows = packed_rows(train_task, tokenizer, T, args.seed) if pack else len(train_task)
        n_steps = max(1, rows // args.rows_per_step)
    schedule = Schedule(n_steps, warmdown=warmdown, momentum_steps=momentum_steps)
    identity = {"source": f"{args.source} step {source_state['step']}", "source_weights": source_state["weights"],
                "tasks": tasks, "sequence_len": T, "rows_per_step": args.rows_per_step}
    trainer = make_trainer(stage, model, tokenizer, runtime, schedule, args, identity=identity, evaluate=evaluate)
    parts = ", ".join(f"{part['task']} {part['conversations']:,}" for part in train_task.counts())
    print0(f"plan: {n_steps:,} steps of {args.rows_per_step} rows from {len(train_task):,} conversations: {parts}")
    if trainer.restore(args.resume):
        print0(f"{stage}: already finished, nothing to do")
        return close_runtime()
    train = loader(train_task, trainer.data_state)

    def report() -> None:
        facts = training_facts(trainer, schedule, args.rows_per_step, accumulation)
        Report().section(title, {"Started from": identity["source"], "Conversations": len(train_task),
                                 "Tasks": train_task.counts(), "Validation": val_task.counts(), **facts})

    trainer.run(LoaderBatches(train, accumulation), when_done=report)
    close_runtime()


def packed_rows(task: TaskMixture, tokenizer: Tokenizer, T: int, seed: int) -> int:
    """Return about how many rows of T tokens one pass fills: exact up to SAMPLE conversations, else in proportion."""
    sample = [task[i] for i in range(min(SAMPLE, len(task)))]
    loader = ConversationLoader(sample, tokenizer, 1, T, pack=True, shuffle_seed=seed)
    try:
        while loader.epoch == 0:
            next(loader)
        return round(loader.stats["rows"] * len(task) / len(sample))
    finally:
        loader.close()


@torch.no_grad()
def mean_loss(model: GPT, batches, n_batches: int, runtime: Runtime) -> float:
    """Return the mean loss in nats per supervised token over n_batches (x, y) per rank, over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for _ in range(n_batches):
        x, y = next(batches)
        sums[0] += model(x, y, reduction="sum")
        sums[1] += (y >= 0).sum()
    total, count = runtime.all_reduce(sums).tolist()
    return total / max(count, 1.0)
