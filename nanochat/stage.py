"""What the training programs share: their flags, and putting model, optimizer and trainer together from them."""

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch

from kernels.device import device_name
from kernels.newton_schulz import COEFFICIENTS
from nanochat import flags
from nanochat.common import Runtime, UserError, human_bytes, print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.load import add_device_flags, fill_model, pick_dtype, pick_kernels, read_stage, stage_folder
from nanochat.metrics import start_wandb
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer
from nanochat.train import Schedule, Trainer


def add_training_flags(parser: argparse.ArgumentParser, *, device_batch_size: int, lr_scale: float, eval_every: int,
                       save_every: int) -> None:
    """Add the flags of every training program; the defaults that differ by stage are arguments."""
    add_device_flags(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="torch.compile the model; default: on a GPU only")
    parser.add_argument("--fp8", action="store_true",
                        help="the MLP's matrices in 8 bits: the same as linear=fp8 in --kernels; evaluations stay out")
    parser.add_argument("--device-batch-size", type=flags.positive_int, default=device_batch_size,
                        help="rows per rank and micro-batch")
    parser.add_argument("--matrix-lr", type=flags.rate, default=0.02, help="Muon's learning rate of the block matrices")
    parser.add_argument("--orthogonalization", choices=COEFFICIENTS, default="quintic",
                        help="Muon's Newton-Schulz coefficients")
    parser.add_argument("--embedding-lr", type=flags.rate, default=0.2, help="AdamW's, at width 768")
    parser.add_argument("--head-lr", type=flags.rate, default=0.004, help="AdamW's, at width 768")
    parser.add_argument("--weight-decay", type=flags.rate, default=0.0, help="decoupled, for every parameter")
    parser.add_argument("--lr-scale", type=flags.rate, default=lr_scale, help="factor on every learning rate")
    parser.add_argument("--eval-every", type=flags.positive_int_or_off, default=eval_every,
                        help="steps between evaluations, -1 = never")
    parser.add_argument("--save-every", type=flags.positive_int_or_off, default=save_every,
                        help="steps between checkpoints, -1 = only the last")
    parser.add_argument("--resume", choices=["auto", "none"], default="none",
                        help="auto: go on from the newest whole checkpoint; none: refuse when there is one")
    parser.add_argument("--wandb", metavar="NAME", default=None, help="log to Weights & Biases under this run name")
    parser.add_argument("--seed", type=flags.seed, default=42, help="seed of weights and shuffles")


def accumulation_steps(rows: int, device_batch_size: int, runtime: Runtime, *, unit: int = 1,
                       flag: str = "--total-batch-size") -> int:
    """Return micro-batches per step so that ranks x micro-batches x device batch is `rows`; UserError if it is not.

    unit scales the numbers in the sentence: tokens per row where the flag counts tokens.
    """
    per_pass = device_batch_size * runtime.world_size * unit
    if device_batch_size < 1 or rows < 1 or rows % per_pass:
        times_unit = f" x sequence-len {unit}" if unit > 1 else ""
        raise UserError(f"{flag} must be a positive multiple of device-batch-size {device_batch_size}{times_unit} x "
                        f"ranks {runtime.world_size} = {per_pass}, got {rows}")
    return rows // per_pass


def new_model(depth: int, vocab_size: int, sequence_len: int, args, runtime: Runtime, **shape) -> GPT:
    """Build an initialized model of this depth on the runtime's device."""
    try:
        config = GPTConfig.from_depth(depth, vocab_size, sequence_len, **shape)
    except ValueError as error:
        raise UserError(f"model of depth {depth}: {error}") from error
    return _build(config, args, runtime, seed=args.seed)


def model_from(stage: str, args, runtime: Runtime) -> tuple[GPT, Tokenizer, dict]:
    """Return (trainable model, tokenizer, state) of an earlier stage's checkpoint."""
    tensors, state, tokenizer = read_stage(stage, depth=args.depth, step=args.source_step)
    model = _build(GPTConfig(**state["model_config"]), args, runtime, seed=None)
    fill_model(model, tensors, f"{stage} step {state['step']}")
    return model, tokenizer, state


def _build(config: GPTConfig, args, runtime: Runtime, seed: int | None) -> GPT:
    dtype = pick_dtype(args.dtype, runtime.device)
    kernels = pick_kernels(args.kernels, runtime.device, dtype, config, args.fp8)
    return GPT.build(config, kernels, dtype, runtime.device, seed)


def make_trainer(stage: str, model: GPT, tokenizer: Tokenizer, runtime: Runtime, schedule: Schedule, args, *,
                 identity: dict, evaluate: Callable[[int], dict] | None = None) -> Trainer:
    """Put optimizer and trainer of a stage together; the checkpoint folder follows from the depth."""
    depth = model.config.n_layer
    compiled = args.compile if args.compile is not None else runtime.device.type == "cuda"
    optimizer = MuonAdamW(model, model.kernels, matrix_lr=args.matrix_lr, embedding_lr=args.embedding_lr,
                          head_lr=args.head_lr, weight_decay=args.weight_decay, lr_scale=args.lr_scale,
                          rank=runtime.rank, world_size=runtime.world_size, orthogonalization=args.orthogonalization,
                          compiled=compiled)
    identity = {"model": asdict(model.config), "tokenizer": tokenizer.fingerprint, "n_steps": schedule.n_steps,
                "seed": args.seed, **identity}
    forward = torch.compile(model, dynamic=stage in ("sft", "rl")) if compiled else model
    wandb_run = start_wandb(args.wandb if runtime.is_main else None, stage, vars(args))
    print0(f"device: {device_name(runtime.device)}, ranks {runtime.world_size}, torch {torch.__version__}, "
           f"compute {str(model.dtype).removeprefix('torch.')}, compile {'on' if compiled else 'off'}")
    print0(f"model: depth {depth}, width {model.config.n_embd}, vocabulary {model.config.vocab_size:,}, "
           f"{model.num_params():,} parameters, {model.estimate_flops():.3e} FLOPs per token")
    return Trainer(stage, stage_folder(stage, depth), model, optimizer, runtime, schedule, identity=identity,
                   args=vars(args), fingerprint=tokenizer.fingerprint, forward=forward, evaluate=evaluate,
                   eval_every=args.eval_every, save_every=args.save_every, wandb_run=wandb_run)


def training_facts(trainer: Trainer, schedule: Schedule, rows: int, accumulation: int) -> dict:
    """Return the numbers of a finished stage for its report section."""
    p, model = trainer.progress, trainer.model
    flops = model.estimate_flops() * p.tokens
    tok_per_s = p.tokens / p.train_seconds if p.train_seconds else None
    mfu = trainer.mfu(tok_per_s) if tok_per_s else None
    return {
        "Parameters": model.num_params(), "Steps": schedule.n_steps, "Rows per step": rows,
        "Micro-batches per step": accumulation, "Tokens": p.tokens, "Training FLOPs (nanochat's count)": f"{flops:.3e}",
        "Tokens per parameter": p.tokens / model.num_params(), "Final loss (smoothed)": trainer.smooth_loss,
        "Training seconds": p.train_seconds, "Tokens per second": tok_per_s,
        "MFU % (nanochat's FLOP count, dense bf16 peak)": mfu,
        "Peak memory of rank 0": human_bytes(trainer.runtime.peak_bytes()),
        "Kernels": " ".join(f"{op}={name}" for op, name in model.kernels.names.items()),
    }
