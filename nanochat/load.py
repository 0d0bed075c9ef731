"""Choosing kernels and dtype for a device, and loading a stage's checkpoint as a model ready to run."""

import argparse
from pathlib import Path

import torch

from kernels import KernelConfig, Kernels, resolve
from nanochat.checkpoint import find_checkpoint, load_checkpoint, weights_digest
from nanochat.common import UserError, base_dir, pick_device, print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

STAGES = ("base", "mid", "sft", "rl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every program with a model has."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="compute dtype; auto is bfloat16 on a GPU and float32 on the CPU")
    parser.add_argument("--kernels", default="auto",
                        help="a preset (auto, eager, triton, best), then op=backend pairs; see python -m kernels")


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which checkpoint of a stage to load."""
    parser.add_argument("--depth", type=int, default=None, help="model depth; default: the deepest that was trained")
    parser.add_argument("--step", type=int, default=None, help="checkpoint step; default: the newest whole one")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def pick_kernels(text: str, device: torch.device, dtype: torch.dtype, config: GPTConfig, fp8: bool = False) -> Kernels:
    """Resolve a --kernels text, and --fp8, for this model and print the choice."""
    kernels = resolve(KernelConfig.parse(text, fp8), device, dtype, config.shapes())
    print0(kernels.describe())
    return kernels


def stage_folder(stage: str, depth: int | None = None) -> Path:
    """Return the checkpoint folder of a stage; without a depth that of the deepest model trained."""
    if stage not in STAGES:
        raise UserError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    root = base_dir() / "checkpoints" / stage
    if depth is None:
        found = [int(p.name[1:]) for p in root.glob("d*") if p.name[1:].isdigit()]
        if not found:
            raise UserError(f"stage {stage} has no checkpoint in {root}; train it first")
        depth = max(found)
    return root / f"d{depth}"


def read_stage(stage: str, *, depth: int | None = None, step: int | None = None) -> tuple[dict, dict, Tokenizer]:
    """Return (model tensors on CPU, state, tokenizer) of a stage's checkpoint after checking that they fit."""
    folder = stage_folder(stage, depth)
    path = find_checkpoint(folder, step)
    if path is None:
        damaged = folder.is_dir() and any(folder.glob("step_*"))
        raise UserError(f"stage {stage} has no whole checkpoint in {folder}; "
                        + ("those there are damaged, train it again" if damaged else "train it first"))
    tensors, state = load_checkpoint(path)
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    if state["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise UserError(f"checkpoint {path} was trained with tokenizer {state['tokenizer_fingerprint'][:12]}, "
                        f"{base_dir() / 'tokenizer'} holds {tokenizer.fingerprint[:12]}")
    state["weights"] = weights_digest(path)
    if state["step"] < state.get("n_steps", 0):
        print0(f"note: stage {stage} is not finished, this is step {state['step']} of {state['n_steps']}")
    return tensors["model"], state, tokenizer


def fill_model(model: GPT, tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Copy checkpoint tensors into the model; UserError names the first that does not fit."""
    own = model.state_dict()
    for name in own.keys() | tensors.keys():
        want, got = (tuple(t[name].shape) if name in t else None for t in (own, tensors))
        if want != got:
            raise UserError(f"checkpoint {origin}: tensor {name} must have shape {want}, got {got}")
    model.load_state_dict(tensors)


def load_model(stage: str, *, device: str | torch.device = "auto", kernels: str = "auto", dtype: str = "auto",
               depth: int | None = None, step: int | None = None) -> tuple[GPT, Tokenizer, dict]:
    """Load a stage for inference: (model in eval mode, weights cast once to the compute dtype; tokenizer; state)."""
    tensors, state, tokenizer = read_stage(stage, depth=depth, step=step)
    device = pick_device(device) if isinstance(device, str) else device
    config = GPTConfig(**state["model_config"])
    compute = pick_dtype(dtype, device)
    chosen = pick_kernels(kernels, device, compute, config)
    note_kernels(state, chosen)
    model = GPT.build(config, chosen, compute, device)
    fill_model(model, tensors, f"{stage} step {state['step']}")
    return model.cast_weights().eval(), tokenizer, state


def note_kernels(state: dict, chosen: Kernels) -> None:
    """Print each op that now runs on another backend than the one the checkpoint was trained with."""
    changed = [f"{op}={was}" for op, was in state["kernels"].items() if chosen.names.get(op, was) != was]
    if changed:
        print0(f"note: trained with {' '.join(changed)}")
