"""What batching gains: the same 64 prompts through the engine with 64 rows and with one row, greedy.

    python -m bench.bench_engine                    # a random model of the tiny preset's shape
    python -m bench.bench_engine --stage sft        # a trained model, its own tokenizer, arithmetic and spelling
    python -m pytest bench/bench_engine.py -s

Both must say exactly the same. Rounds alternate, so that a machine that slows down slows both; the last line is JSON.
"""

import argparse
import json
import random
import statistics
import time

import torch

from kernels import KernelConfig, resolve
from nanochat.common import pick_device, run_script
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPT, GPTConfig
from nanochat.load import load_model
from nanochat.tasks import parse_mixture
from nanochat.tokenizer import Tokenizer

N_PROMPTS = 64


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default=None, help="measure this stage's checkpoint instead of a random model")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each, after one that is not")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--kernels", default="auto", help="a preset, then op=backend pairs")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    model, tokenizer, prompts = trained(args) if args.stage else random_tiny(args)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
    print(f"{'round':>5} {'64 rows':>12} {'1 row':>12} {'ratio':>6}   requests/s")
    rounds = []
    for i in range(args.rounds + 1):
        row = measure(model, tokenizer, prompts, params)
        print(f"{i or 'warm':>5} {row['batched']:>12.2f} {row['single']:>12.2f} {row['ratio']:>6.2f}", flush=True)
        rounds += [row] if i else []
    ratios = sorted(row["ratio"] for row in rounds)
    print(f"ratio: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}; equal text")
    print(json.dumps({
        "bench": "engine", "model": args.stage or "random d4", "device": str(model.device),
        "threads": torch.get_num_threads(), "kernels": dict(model.kernels.names), "prompts": N_PROMPTS,
        "prompt_tokens": sum(map(len, prompts)), "completion_tokens": rounds[0]["tokens"],
        "requests_per_s_64": statistics.median(row["batched"] for row in rounds),
        "requests_per_s_1": statistics.median(row["single"] for row in rounds),
        "ratio_median": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1]}))


def measure(model: GPT, tokenizer, prompts: list[list[int]], params: SamplingParams) -> dict:
    """Run all prompts in 64 rows, then in one; return requests per second. Raises AssertionError on unequal text."""
    said, speed = {}, {}
    for name, max_batch in (("batched", N_PROMPTS), ("single", 1)):
        engine = Engine(model, tokenizer, max_batch=max_batch)
        start = time.perf_counter()
        results = engine.generate(prompts, params)
        speed[name] = len(prompts) / (time.perf_counter() - start)
        said[name] = [completion.ids for (completion,) in results]
    assert said["batched"] == said["single"], "64 rows and one row must say the same"
    return speed | {"ratio": speed["batched"] / speed["single"], "tokens": sum(map(len, said["single"]))}


def random_tiny(args: argparse.Namespace) -> tuple[GPT, Tokenizer, list[list[int]]]:
    """Return a random model of 4 layers and prompts of 8 to 160 random tokens."""
    device = pick_device(args.device)
    config = GPTConfig.from_depth(4, 4096, 256)
    kernels = resolve(KernelConfig.parse(args.kernels), device, torch.float32, config.shapes())
    model = GPT.build(config, kernels, torch.float32, device, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():  # matrices that start at 0 would make all logits equal
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    lengths = torch.randint(8, 161, (N_PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(0, 4000, (length,), generator=generator).tolist() for length in lengths]
    return model, tokenizer_of_random_words(config.vocab_size), prompts


def tokenizer_of_random_words(vocab_size: int) -> Tokenizer:
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(20_000)]
    return Tokenizer.train([" ".join(words)], vocab_size)


def trained(args: argparse.Namespace) -> tuple[GPT, Tokenizer, list[list[int]]]:
    model, tokenizer, _ = load_model(args.stage, device=args.device, kernels=args.kernels)
    task = parse_mixture(f"arithmetic={N_PROMPTS - 24},spelling=24", "test")
    return model, tokenizer, [tokenizer.render_for_completion(task[i]) for i in range(N_PROMPTS)]


def bench_engine():
    """For `pytest bench/`: the default run."""
    main(parse_args([]))


if __name__ == "__main__":
    run_script(parse_args, main)
