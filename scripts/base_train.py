"""Pretrain a base model on text: python -m scripts.base_train --depth 4 --data builtin

The number of steps follows from --param-data-ratio (tokens per parameter; 20 is nanochat's) unless --num-steps says it.
Under torchrun every rank trains its share; accumulation makes up the rest of --total-batch-size.
"""

import argparse

from nanochat import flags
from nanochat.common import UserError, base_dir, close_runtime, init_runtime, print0, run_script
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import open_dataset
from nanochat.evals.bpb import evaluate_bpb
from nanochat.report import Report
from nanochat.stage import accumulation_steps, add_training_flags, make_trainer, new_model, training_facts
from nanochat.tokenizer import Tokenizer
from nanochat.train import LoaderBatches, Schedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin", help="builtin, fineweb-edu, or a folder of .parquet, .jsonl or "
                        ".txt")
    parser.add_argument("--shards", type=flags.positive_int, default=None,
                        help="training shards of fineweb-edu that must be here; default: all that are")
    parser.add_argument("--depth", type=int, default=20, help="layers; width is 64 x depth")
    parser.add_argument("--sequence-len", type=flags.positive_int, default=2048, help="context length in tokens")
    parser.add_argument("--window-pattern", default="L", help="per layer: L full attention, S a quarter of the context")
    parser.add_argument("--num-steps", type=flags.positive_int_or_off, default=-1,
                        help="updates; -1 = from --param-data-ratio")
    parser.add_argument("--param-data-ratio", type=flags.positive_float, default=20.0,
                        help="training tokens per parameter")
    parser.add_argument("--total-batch-size", type=flags.positive_int, default=524288,
                        help="tokens per update over all ranks")
    parser.add_argument("--warmup", type=flags.fraction, default=0.0,
                        help="fraction of the steps with a rising learning rate")
    parser.add_argument("--warmdown", type=flags.fraction, default=0.2,
                        help="fraction of the steps with a falling one")
    parser.add_argument("--eval-tokens", type=flags.positive_int, default=20 * 524288,
                        help="validation tokens per evaluation")
    add_training_flags(parser, device_batch_size=32, lr_scale=1.0, eval_every=250, save_every=1000)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.warmup + args.warmdown > 1:
        raise UserError("--warmup and --warmdown must be at most 1 together, got "
                        f"{args.warmup} and {args.warmdown}")
    runtime = init_runtime(args.device, seed=args.seed)
    dataset = open_dataset(args.data, shards=args.shards)
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    B, T, world_size = args.device_batch_size, args.sequence_len, runtime.world_size
    accumulation = accumulation_steps(args.total_batch_size, B, runtime, unit=T)
    model = new_model(args.depth, tokenizer.vocab_size, T, args, runtime, window_pattern=args.window_pattern)
    schedule = Schedule(_num_steps(args, model.num_params()), warmup=args.warmup, warmdown=args.warmdown)

    def loader(split: str, state: dict | None = None) -> PretrainLoader:
        return PretrainLoader(dataset, split, tokenizer, B, T, rank=runtime.rank, world_size=world_size,
                              device=runtime.device, state=state)

    eval_batches = max(1, args.eval_tokens // (B * T * world_size))
    token_bytes = tokenizer.token_bytes()

    def evaluate(step: int) -> dict:
        batches = loader("val")
        try:
            return {"val_bpb": evaluate_bpb(model, batches, eval_batches, token_bytes, runtime)}
        finally:
            batches.close()

    identity = {"data": dataset.fingerprint, "total_batch_size": args.total_batch_size}
    trainer = make_trainer("base", model, tokenizer, runtime, schedule, args, identity=identity, evaluate=evaluate)
    tokens = schedule.n_steps * args.total_batch_size
    print0(f"plan: {schedule.n_steps:,} steps of {args.total_batch_size:,} tokens ({accumulation} micro-batches) = "
           f"{tokens:,} tokens, {tokens / model.num_params():.2f} per parameter, "
           f"{tokens * model.estimate_flops():.2e} FLOPs")
    if trainer.restore(args.resume):
        print0("base: already finished, nothing to do")
        return close_runtime()
    train = loader("train", trainer.data_state)

    def report() -> None:
        Report().section("Base training", _facts(args, trainer, schedule, accumulation, dataset, train.stats))

    trainer.run(LoaderBatches(train, accumulation), when_done=report)
    close_runtime()


def _num_steps(args: argparse.Namespace, n_params: int) -> int:
    if args.num_steps > 0:
        return args.num_steps
    return max(1, round(args.param_data_ratio * n_params / args.total_batch_size))


def _facts(args, trainer, schedule, accumulation, dataset, stats) -> dict:
    facts = training_facts(trainer, schedule, args.total_batch_size // args.sequence_len, accumulation)
    if facts["Tokens per parameter"] < 10:
        facts["Note"] = "not converged by design: far fewer than 20 tokens per parameter"
    packed = stats["tokens"] + stats["cropped_tokens"]
    return {"Data": dataset.name, **facts, "Best validation bits per byte": trainer.progress.best_val_bpb,
            "Epochs begun": stats["epoch"] + 1,
            "Tokens cropped by packing %": 100 * stats["cropped_tokens"] / packed if packed else None}


if __name__ == "__main__":
    run_script(parse_args, main)
