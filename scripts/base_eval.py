"""Examine a base model: bits per byte, in-context tasks of an evaluation bundle, samples.

python -m scripts.base_eval
python -m scripts.base_eval --bundle core --eval bundle --max-per-task 100
python -m scripts.base_eval --hf-path openai-community/gpt2
"""

import argparse
from pathlib import Path

import torch

from nanochat import flags, hub
from nanochat.common import Runtime, UserError, close_runtime, init_runtime, print0, run_script
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import open_dataset
from nanochat.engine import Engine, SamplingParams
from nanochat.evals.bpb import evaluate_bpb, token_counts, unigram_bpb
from nanochat.evals.core import Bundle, TaskResult, evaluate_bundle, load_bundle
from nanochat.evals.huggingface import load_huggingface
from nanochat.evals.mini_bundle import write_mini_bundle
from nanochat.evals.results import ResponseLog
from nanochat.evals.scoring import PagedScorer
from nanochat.fineweb import NAME as FINEWEB
from nanochat.load import add_checkpoint_flags, add_device_flags, load_model, pick_dtype
from nanochat.report import Report

PARTS = ("bpb", "bundle", "samples")
EVAL_STEPS = 20  # 20 * 524,288 tokens for d20, as in nanochat
SAMPLE_TOKENS = 16
# nanochat's seven, then three that suit a model trained on Python's documentation
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
    "Return the number of",
    "This function is used to",
    "    def __init__(self,",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_checkpoint_flags(parser)
    add_device_flags(parser)
    parser.add_argument("--eval", default=None, help=f"what to do, out of {','.join(PARTS)}; default: all of it, "
                        "with --hf-path the bundle")
    parser.add_argument("--data", default=None, help="text for bits per byte; default: what the model was trained on")
    parser.add_argument("--eval-tokens", type=int, default=None,
                        help=f"tokens per split for bits per byte; default: {EVAL_STEPS} training steps' worth")
    parser.add_argument("--device-batch-size", type=int, default=32, help="rows per rank and forward pass")
    parser.add_argument("--unigram-tokens", type=flags.count, default=1_000_000,
                        help="most training tokens to fit the token unigram on, for comparison; 0 = no unigram")
    parser.add_argument("--bundle", default=None, help="evaluation bundle: core (downloaded), mini (generated) or a "
                        f"folder; default: core for a model trained on {FINEWEB} or of --hf-path, else mini")
    parser.add_argument("--bundle-url", default=hub.BUNDLE_URL, help="where --bundle core comes from")
    parser.add_argument("--max-per-task", type=int, default=None, help="most items per task of the bundle")
    parser.add_argument("--hf-path", default=None, help="examine this model of transformers instead: a folder, or a "
                        "repository of the hub")
    parser.add_argument("--save-responses", type=Path, default=None, help="write every item with its losses and "
                        "verdict to this new JSONL file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    parts = (args.eval or ("bundle" if args.hf_path else ",".join(PARTS))).split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--eval takes {', '.join(PARTS)} with commas between, got {part!r}")
    if args.hf_path and parts != ["bundle"]:
        raise UserError(f"--hf-path can be examined on the bundle alone, --eval asks for {args.eval}")
    for flag in ("eval_tokens", "device_batch_size", "max_per_task"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    runtime = init_runtime(args.device)
    log = ResponseLog(args.save_responses, runtime) if args.save_responses else None
    if args.hf_path:
        _examine_huggingface(args, runtime, log)
        return close_runtime()
    bundle = _bundle(args, args.bundle) if args.bundle and "bundle" in parts else None  # before the rest: it may break
    model, tokenizer, state = load_model("base", device=runtime.device, kernels=args.kernels, dtype=args.dtype,
                                         depth=args.depth, step=args.step)
    scores, section = {}, {"Step": state["step"]}
    if "bundle" in parts:
        bundle = bundle or _bundle(args, "core" if state["args"].get("data") == FINEWEB else "mini")
    if "bpb" in parts:
        measured = _bits_per_byte(args, runtime, model, tokenizer, state)
        for name, value in measured.items():
            print0(f"{name}: {value:.4f}")
        conditions = _bpb_conditions(args, state)
        scores |= {f"{split}_bpb{conditions}": measured[f"{name} bpb"]
                   for split, name in (("val", "validation"), ("train", "training"))}
        section |= {name + conditions: value for name, value in measured.items()}
    if bundle:
        found, tables = _in_context(args, bundle, PagedScorer(model), tokenizer, runtime, log)
        scores |= found
        section |= found | tables
    if "samples" in parts and runtime.is_main:
        section["Samples"] = _samples(model, tokenizer)
    if runtime.is_main:
        Report().scores("base", scores)
        Report().add("Base evaluation", section)
    close_runtime()


def _examine_huggingface(args: argparse.Namespace, runtime: Runtime, log: ResponseLog | None) -> None:
    """Another model's scores get a section of their own and stay out of this run's score table."""
    bundle = _bundle(args, args.bundle or "core")
    scorer, tokenizer = load_huggingface(args.hf_path, runtime.device, pick_dtype(args.dtype, runtime.device))
    found, tables = _in_context(args, bundle, scorer, tokenizer, runtime, log)
    if runtime.is_main:
        Report().add(f"Base evaluation, {args.hf_path}", found | tables)


def _bundle(args: argparse.Namespace, name: str) -> Bundle:
    if name == "mini":
        return load_bundle(write_mini_bundle())
    return load_bundle(hub.fetch_bundle(args.bundle_url) if name == "core" else Path(name))


def _in_context(args: argparse.Namespace, bundle: Bundle, scorer, tokenizer, runtime: Runtime,
                log: ResponseLog | None) -> tuple[dict[str, float], dict[str, list]]:
    """({name of the score: score}, {title: rows of the report's table}) of a bundle; prints as it goes."""
    result = evaluate_bundle(scorer, tokenizer, bundle, max_per_task=args.max_per_task, runtime=runtime, log=log,
                             on_task=_print_task)
    print0(f"{result.name}: {result.score:.4f}")
    return {result.name: result.score}, {f"Tasks of {result.name}": [vars(task) for task in result.tasks]}


def _bits_per_byte(args: argparse.Namespace, runtime: Runtime, model, tokenizer, state: dict) -> dict[str, float]:
    """Bits per byte of both splits, and of a unigram fitted on the training tokens, by name."""
    source = args.data or state["args"].get("data")
    if source is None:
        raise UserError("--data must name the text to measure on, an imported model does not know its own")
    dataset = open_dataset(source)
    B, T, token_bytes = args.device_batch_size, model.config.sequence_len, tokenizer.token_bytes()
    per_batch = B * T * runtime.world_size
    step_tokens = _step_tokens(state)
    n_batches = max(1, (args.eval_tokens or EVAL_STEPS * step_tokens) // per_batch)

    def loader(split: str) -> PretrainLoader:
        return PretrainLoader(dataset, split, tokenizer, B, T, rank=runtime.rank, world_size=runtime.world_size,
                              device=runtime.device)

    def over(split: str, measure, *rest):
        batches = loader(split)
        try:
            return measure(batches, *rest)
        finally:
            batches.close()

    def bpb(split: str) -> float:
        return over(split, lambda batches: evaluate_bpb(model, batches, n_batches, token_bytes, runtime))

    def counts(split: str, n: int):
        own = over(split, token_counts, n, tokenizer.vocab_size)
        return runtime.all_reduce(torch.from_numpy(own).to(runtime.device)).cpu().numpy()

    found = {"training bpb": bpb("train"), "validation bpb": bpb("val")}
    if args.unigram_tokens > 0:
        fitted = min(args.unigram_tokens, state["step"] * step_tokens or args.unigram_tokens)
        unigram = unigram_bpb(counts("train", -(-fitted // per_batch)), counts("val", n_batches), token_bytes)
        found["unigram validation bpb"] = unigram
        found["below unigram %"] = 100 * (1 - found["validation bpb"] / unigram)
    return found


def _step_tokens(state: dict) -> int:
    return state["args"].get("total_batch_size", 1 << 19)  # nanochat's, for an imported model


def _bpb_conditions(args: argparse.Namespace, state: dict) -> str:
    """What sets bits per byte apart from those of the default tokens of the model's own data; "" for these."""
    said = []
    if args.data not in (None, state["args"].get("data")):
        said.append(f"on {args.data}")
    if args.eval_tokens not in (None, EVAL_STEPS * _step_tokens(state)):
        said.append(f"{args.eval_tokens:,} tokens")
    return f" ({', '.join(said)})" if said else ""


def _print_task(result: TaskResult) -> None:
    print0(f"{result.label:32s} items {result.items:5d}  accuracy {result.accuracy:.4f}  "
           f"centered {result.centered:+.4f}  {result.seconds:.1f} s{'  near chance' if result.near_chance else ''}")


def _samples(model, tokenizer) -> list[dict[str, str]]:
    """Greedy continuations of the fixed prompts, printed as they are reported."""
    engine = Engine(model, tokenizer, tools="off", max_batch=len(PROMPTS))
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    completions = engine.generate(prompts, SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.0))
    rows = [{"prompt": prompt, "continuation": completion.text}
            for prompt, [completion] in zip(PROMPTS, completions, strict=True)]
    for row in rows:
        print0(f"{row['prompt']}|{row['continuation']}")
    return rows


if __name__ == "__main__":
    run_script(parse_args, main)
