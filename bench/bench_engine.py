"""What the engine gains: 64 prompts of mixed length with 64 rows, with one row, and with no cache at all, greedy.

    python -m bench.bench_engine                    # a random model of the tiny preset's shape
    python -m bench.bench_engine --stage sft        # a trained model, its own tokenizer, arithmetic and spelling
    python -m pytest bench/bench_engine.py -s

All must say exactly the same (on a GPU the row says how many do: rounding may choose between near ties). The naive way
is a forward over the whole sequence for every token, one prompt at a time; it takes another eighth of the prompts,
alike in length, every round. Rounds alternate, so that a machine that slows down slows all; the last line is JSON.
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
NAIVE_SHARE = 8  # of the prompts, one in so many: recomputing them all takes half a minute
TARGET = 5.0  # times the requests per second of either other way


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
    found = compare(model, tokenizer, prompts, args.max_tokens, args.rounds)
    print(json.dumps({"bench": "engine", "model": args.stage or "random d4", **found}))


def compare(model: GPT, tokenizer, prompts: list[list[int]], max_tokens: int, rounds: int) -> dict:
    """Run all ways in turns and print a line a round; return medians and ratios with their spread."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    print(f"{'round':>5} {'64 rows':>12} {'1 row':>12} {'no cache':>12} {'ratios':>14}   requests/s")
    timed = []
    for i in range(rounds + 1):
        row = measure(model, tokenizer, prompts, params, i)
        print(f"{i or 'warm':>5} {row['batched']:>12.2f} {row['single']:>12.2f} {row['naive']:>12.2f} "
              f"{row['ratio']:>6.2f} {row['naive_ratio']:>7.2f}", flush=True)
        timed += [row] if i else []
    ratios = {name: sorted(row[name] for row in timed) for name in ("ratio", "naive_ratio")}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    print("requests/s of 64 rows, times those of " + ", of ".join(
        f"{what} {medians[name]:.2f} ({ratios[name][0]:.2f} to {ratios[name][-1]:.2f})"
        for name, what in (("ratio", "1 row"), ("naive_ratio", "no cache"))) + f"; target {TARGET:g} each: "
        + ("met" if min(medians.values()) >= TARGET else "missed"))
    return {
        "device": str(model.device), "threads": torch.get_num_threads(), "kernels": dict(model.kernels.names),
        "prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "completion_tokens": timed[0]["tokens"],
        "equal": min(row["equal"] for row in timed), "rounds": rounds,
        **{f"requests_per_s_{way}": statistics.median(row[name] for row in timed)
           for way, name in (("64", "batched"), ("1", "single"), ("naive", "naive"))},
        **{f"{name}_{which}": value for name, values in ratios.items()
           for which, value in (("median", medians[name]), ("min", values[0]), ("max", values[-1]))}}


def measure(model: GPT, tokenizer, prompts: list[list[int]], params: SamplingParams, turn: int = 0) -> dict:
    """Run the prompts in 64 rows, in one, and some without a cache; return requests per second.

    Raises AssertionError on unequal text on a CPU in fp32.
    """
    said, speed = {}, {}
    for name, max_batch in (("batched", N_PROMPTS), ("single", 1)):
        engine = Engine(model, tokenizer, tools="off", max_batch=max_batch)
        start = time.perf_counter()
        results = engine.generate(prompts, params)
        speed[name] = len(prompts) / (time.perf_counter() - start)
        said[name] = [completion.ids for (completion,) in results]
    some = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[turn % NAIVE_SHARE::NAIVE_SHARE]
    start = time.perf_counter()
    said["naive"] = [recompute(engine.model, prompts[i], params.max_tokens, engine.terminals) for i in some]
    speed["naive"] = len(some) / (time.perf_counter() - start)
    pairs = [*zip(said["batched"], said["single"], strict=True),
             *((said["batched"][i], ids) for i, ids in zip(some, said["naive"], strict=True))]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    assert equal == 1 or model.device.type != "cpu" or model.dtype != torch.float32, "all ways must say the same"
    return speed | {"ratio": speed["batched"] / speed["single"], "naive_ratio": speed["batched"] / speed["naive"],
                    "tokens": sum(map(len, said["single"])), "equal": equal}


@torch.inference_mode()
def recompute(model: GPT, prompt: list[int], max_tokens: int, terminals: frozenset[int]) -> list[int]:
    """Continue a prompt greedily, computing the whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_tokens, model.config.sequence_len):
        token = model(torch.tensor([ids], device=model.device))[0, -1].argmax().item()
        if token in terminals:
            break
        ids.append(token)
    return ids[len(prompt):]


# --- models and prompts ---------------------------------------------------------------------------


def random_tiny(args: argparse.Namespace) -> tuple[GPT, Tokenizer, list[list[int]]]:
    """Return a random model of 4 layers and prompts of 8 to 160 random tokens."""
    model = random_model(GPTConfig.from_depth(4, 4096, 256), args.kernels, pick_device(args.device), torch.float32)
    return model, tokenizer_of_random_words(4096), mixed_prompts(4000)


def random_model(config: GPTConfig, kernels: str, device: torch.device, dtype: torch.dtype) -> GPT:
    model = GPT.build(config, resolve(KernelConfig.parse(kernels), device, dtype, config.shapes()), dtype, device,
                      seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():  # matrices that start at 0 would make all logits equal
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.cast_weights().eval()


def mixed_prompts(vocab_size: int) -> list[list[int]]:
    """Return 64 prompts of 8 to 160 random tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(8, 161, (N_PROMPTS,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def tokenizer_of_random_words(vocab_size: int) -> Tokenizer:
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(5 * vocab_size)]
    return Tokenizer.train([" ".join(words)], vocab_size)


def trained(args: argparse.Namespace) -> tuple[GPT, Tokenizer, list[list[int]]]:
    model, tokenizer, _ = load_model(args.stage, device=args.device, kernels=args.kernels)
    return model, tokenizer, task_prompts(tokenizer)


def task_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    task = parse_mixture(f"arithmetic={N_PROMPTS - 24},spelling=24", "test")
    return [tokenizer.render_for_completion(task[i]) for i in range(N_PROMPTS)]


def bench_engine():
    """For `pytest bench/`: the default run."""
    main(parse_args([]))


if __name__ == "__main__":
    run_script(parse_args, main)
