"""Decoding beside what memory allows: the roof first, then steps at each batch and context, then clients, then ratios.

    python -m bench.bench_decode --depth 20                                      # on a GPU; on a CPU: --depth 4
    python -m bench.bench_decode --stage sft --batch-sizes 1 8 --contexts 256    # a trained model
    python -m bench.bench_decode --depth 20 --roof H200                          # the roof of a GPU that is not here
    python -m pytest bench/bench_decode.py -s

A round is two phases. First all prompts of random tokens are submitted at once to an engine that knows none of them:
TTFT. Then the same prompts again, from known pages, so that all rows decode together: TPOT is the time of such a step
as its caller waits for it, and contexts are centred on the one that is named. Nothing ends before its length.
MBU counts the bytes that a step must move - weights of blocks and head, keys and values of every row's context - and
"as stored" every parameter, as nanochat's infer_bench does, and keys and values in whole pages. The last line is JSON.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import bench_engine, decode_load, harness, results
from bench.bench_engine import random_model, tokenizer_of_random_words
from bench.bench_train import kernel_groups
from kernels import KernelConfig, resolve
from kernels.device import GPUS, device_name, peak
from nanochat.common import UserError, human_bytes, pick_device, run_script
from nanochat.engine import Engine, Request, SamplingParams
from nanochat.engine.flags import add_engine_flags, engine_options
from nanochat.flags import positive_float, positive_int
from nanochat.gpt import GPT, GPTConfig, PagedCache
from nanochat.load import DTYPES, add_device_flags, load_model, pick_dtype

PARTS = ("steps", "closed", "poisson", "ratio")
PAGE = 16  # tokens, the engine's default
SLACK_BYTES = 2e9  # left to activations and graphs when KV capacity is told
ATTENTION = ("paged_attention", "attention")  # groups of bench_train.kernel_groups
# what the flags mean when they are not given, per kind of device
DEFAULTS = {
    "cuda": dict(depth=20, vocab_size=65_536, batch_sizes=[1, 8, 32, 64, 128], contexts=[256, 1024, 2048], tokens=128,
                 requests=256, clients=32),
    "cpu": dict(depth=4, vocab_size=4096, batch_sizes=[1, 8, 32], contexts=[64, 224], tokens=32,
                requests=48, clients=8),
}


Watch = Callable[[Callable[[], None]], object]  # takes a step, makes it, and tells something of it


# --- the roof -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """The bytes that a decoding step of `model` (which may be on the meta device) moves, and what moves them."""

    model: GPT
    fp8_kv: bool
    gpu: str
    bytes_per_s: float | None  # None where the peak is not known
    memory: int | None  # bytes

    @classmethod
    def of(cls, model: GPT, fp8_kv: bool) -> "Roof":
        device = model.device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        return cls(model, fp8_kv, device_name(device), peak(device, "memory"), memory)

    @property
    def parameters(self) -> int:
        """Return the bytes of all parameters."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def weights(self) -> int:
        """Return the bytes of blocks and head; of the embedding a step reads one row per sequence."""
        return self.parameters - self.model.transformer["wte"].weight.nbytes

    def kv(self, context: int, page_size: int = 1) -> int:
        """Return the bytes of one row's keys and values that attention reads, or stores in whole pages."""
        model, kept = self.model, -(-context // page_size) * page_size
        cell = PagedCache.allocate(model.config, 1, 1, model.dtype, torch.device("meta"), self.fp8_kv)
        windows = [model.config.window(layer) for layer in range(model.config.n_layer)]
        keys = [kept if page_size > 1 or w < 0 else min(kept, w + 1) for w in windows]
        sizes = [sum(t.nbytes for t in layer if t is not None) for layer in cell.layers]
        return sum(n * size for n, size in zip(keys, sizes, strict=True))

    def step(self, batch: int, context: int) -> dict:
        """Return bytes of a step, and the time and speed that the peak would allow; None without a peak."""
        needed, rate = self.weights + batch * self.kv(context), self.bytes_per_s
        return {"batch": batch, "context": context, "necessary_bytes": needed,
                "stored_bytes": self.parameters + batch * self.kv(context, PAGE),
                "floor_s": rate and needed / rate, "floor_tokens_per_s": rate and batch * rate / needed}

    def card(self, batch_sizes: list[int], contexts: list[int]) -> dict:
        capacity = self.memory and max(0, int((0.9 * self.memory - self.parameters - SLACK_BYTES) // self.kv(1)))
        return {"gpu": self.gpu, "peak_bytes_per_s": self.bytes_per_s, "parameters": self.model.num_params(),
                "weight_bytes": self.weights, "parameter_bytes": self.parameters, "kv_bytes_per_token": self.kv(1),
                "kv_capacity_tokens": capacity,
                "steps": [self.step(batch, context) for context in contexts for batch in batch_sizes]}


def describe_card(card: dict, dtype: str, kv: str) -> str:
    rate, capacity = card["peak_bytes_per_s"], card["kv_capacity_tokens"]
    lines = [
        f"roof: {card['parameters']:,} parameters in {dtype}; a step reads {card['weight_bytes'] / 1e6:,.1f} MB "
        f"(blocks and head) of {card['parameter_bytes'] / 1e6:,.1f} as stored; KV {kv}, "
        f"{card['kv_bytes_per_token']:,} B a token",
        f"{card['gpu']}: peak {f'{rate / 1e12:.2f} TB/s' if rate else 'n/a'}; tokens of KV that fit 90 % of the memory "
        f"less parameters and 2 GB: {'n/a' if capacity is None else f'{capacity:,}'}",
        "floor = (weights + batch x context x KV) / peak; computed, not measured",
        f"{'batch':>6} {'context':>8} {'MB/step':>10} {'as stored':>10} {'floor ms':>9} {'floor tok/s':>12}"]
    for step in card["steps"]:
        floor, speed = (f"{1e3 * step['floor_s']:.3f}", f"{step['floor_tokens_per_s']:,.0f}") if rate else ("n/a",) * 2
        lines.append(f"{step['batch']:>6} {step['context']:>8} {step['necessary_bytes'] / 1e6:>10,.1f} "
                     f"{step['stored_bytes'] / 1e6:>10,.1f} {floor:>9} {speed:>12}")
    return "\n".join(lines)


# --- steps ----------------------------------------------------------------------------------------


class Cell:
    """One batch size at one context, on an engine of its own with just the pages that it needs."""

    def __init__(self, model: GPT, tokenizer, batch: int, context: int, tokens: int, options: dict):
        self.batch, self.context, self.tokens = batch, context, min(tokens, context)
        length = context - self.tokens // 2
        pages = -(-(length + self.tokens) // PAGE) + 1  # one in reserve: the scheduler keeps it for a running row
        self.engine = Engine(model, tokenizer, tools="off", max_batch=batch, page_size=PAGE, n_pages=batch * pages,
                             step_tokens=max(2048, PAGE * batch), **options)
        draw = random.Random(batch * context)
        self.prompts = [random_prompt(draw, model.config.vocab_size, length) for _ in range(batch)]
        self.ttft, self.prefill, self.seconds = [], [], []
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)

    def round(self) -> None:
        """Time the prompts cold, then the steps in which all rows decode."""
        self.engine.reset()
        start = time.perf_counter()
        requests = self._run(1)
        self.prefill.append(time.perf_counter() - start)
        self.ttft += [request.rows[0].first_token - request.queued for request in requests]
        self.seconds += self.decode(_seconds)

    def decode(self, watch: Watch, tokens: int | None = None) -> list:
        """Return watch(step) of every step in which all rows decode; the prompts are known by now."""
        seen = []
        self._run(tokens or self.tokens, lambda step: seen.append(watch(step)))
        return seen

    def _run(self, tokens: int, together: Watch = lambda step: step()) -> list[Request]:
        """Generate for all prompts; steps in which every row decodes go through `together`."""
        engine, params = self.engine, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        requests = [engine.submit(prompt, params) for prompt in self.prompts]
        while not all(request.done for request in requests):
            rows = engine.running
            if len(rows) == self.batch and all(row.pending == 1 for row in rows):
                together(engine.step)
            else:
                engine.step()
        return requests

    def row(self, name: str, roof: Roof, rounds: int) -> dict:
        """Return the figures so far; MBU is in percent, n/a (None) without a known peak."""
        median, mad = harness.median_and_mad(self.seconds)
        step, device = roof.step(self.batch, self.context), self.engine.model.device
        rate, generated = roof.bytes_per_s, self.batch * len(self.seconds)
        return {
            "key": f"decode/{name}/b{self.batch}/c{self.context}", **step,
            "median_s": median, "mad_s": mad, "p95_s": float(np.percentile(self.seconds, 95)),
            "steps": len(self.seconds), "rounds": rounds, "tokens_per_s": generated / sum(self.seconds),
            "ttft_s": statistics.median(self.ttft), "ttft_p95_s": float(np.percentile(self.ttft, 95)),
            "prompt_tokens": sum(map(len, self.prompts)),
            "prefill_tokens_per_s": sum(map(len, self.prompts)) / statistics.median(self.prefill),
            **{mbu: rate and 100 * step[moved] / median / rate
               for mbu, moved in (("mbu", "necessary_bytes"), ("mbu_stored", "stored_bytes"))},
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            **self._attention(roof)}

    def _attention(self, roof: Roof) -> dict:
        """Return what a profile of one more step tells about attention; on a CPU its kernels have no names."""
        device = self.engine.model.device
        groups = self.decode(partial(kernel_groups, device=device), tokens=3)[-1] if device.type == "cuda" else {}
        moved = self.batch * roof.kv(len(self.prompts[0]) + 2)  # the contexts of that step
        return {"kernel_ms": groups, **attention_figures(groups, moved, roof.bytes_per_s)}


def attention_figures(groups: dict[str, float], moved: int, bytes_per_s: float | None) -> dict:
    """Return attention's share of the kernels' time and its own MBU in percent; groups are ms, moved bytes of KV."""
    spent = sum(groups.get(name, 0.0) for name in ATTENTION)
    return {"attention_share": 100 * spent / sum(groups.values()) if groups else None,
            "attention_mbu": 100 * moved / (spent / 1e3) / bytes_per_s if spent and bytes_per_s else None}


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def random_prompt(draw: random.Random, vocab_size: int, length: int) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(length)]


STEP_TITLE = (f"{'batch':>6} {'context':>8} {'TTFT ms':>9} {'p95':>9} {'TPOT ms':>9} {'MAD':>7} {'p95':>9} "
              f"{'tok/s':>10} {'MBU':>7} {'stored':>7} {'attn':>6} {'its MBU':>7} {'peak':>9}")


def describe_step(row: dict) -> str:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.1f} %"

    memory = "n/a" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"])
    times = " ".join(f"{1e3 * row[name]:>{width}.3f}" for name, width in (
        ("ttft_s", 9), ("ttft_p95_s", 9), ("median_s", 9), ("mad_s", 7), ("p95_s", 9)))
    return (f"{row['batch']:>6} {row['context']:>8} {times} {row['tokens_per_s']:>10,.0f} {percent(row['mbu']):>7} "
            f"{percent(row['mbu_stored']):>7} {percent(row['attention_share']):>6} {percent(row['attention_mbu']):>7} "
            f"{memory:>9}")


# --- clients --------------------------------------------------------------------------------------


def load_jobs(n: int, context: int, vocab_size: int, seed: int) -> list[decode_load.Job]:
    """Return n random prompts of a sixteenth to half of the context, answers of a 32nd to a quarter."""
    draw, jobs = random.Random(seed), []
    for _ in range(n):
        prompt = random_prompt(draw, vocab_size, draw.randint(max(1, context // 16), max(1, context // 2)))
        tokens = draw.randint(max(2, context // 32), max(2, context // 4))
        jobs.append((prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)))
    return jobs


def load_row(name: str, mode: str, traces: list[decode_load.Trace], args: argparse.Namespace, **setting) -> dict:
    """Return the figures of a load; median_s and mad_s are TPOT's over its requests."""
    found = decode_load.figures(traces, args.slo_ttft, args.slo_tpot)
    median, mad = harness.median_and_mad([trace.tpot for trace in traces])
    return {"key": f"decode/{name}/{mode}", "mode": mode, "median_s": median, "mad_s": mad, **setting, **found}


def describe_load(row: dict) -> str:
    setting = f"{row['clients']} clients" if row["mode"] == "closed" else f"{row['rate']:.2f} requests/s due"
    lines = [f"{row['mode']} loop, {setting}: {row['requests_per_s']:.2f} requests/s, "
             f"{row['tokens_per_s']:,.0f} tok/s, goodput {row['goodput_per_s']:.2f} requests/s "
             f"(TTFT <= {row['slo_s']['ttft']:g} s, TPOT <= {1e3 * row['slo_s']['tpot']:g} ms)"]
    for what in ("queue", "ttft", "tpot", "itl"):
        values = "  ".join(f"{name} {1e3 * value:.2f}" for name, value in row[f"{what}_s"].items())
        lines.append(f"    {what:<6} {values} ms")
    return "\n".join(lines)


# --- the program ----------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="what is not given: d20 at 1 to 128 rows on a GPU, d4 elsewhere")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--depth", type=positive_int, help="a random model of this depth")
    what.add_argument("--stage", help="this stage's checkpoint")
    parser.add_argument("--vocab-size", type=positive_int, help="of a random model: 65,536 on a GPU, 4,096 elsewhere")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--batch-sizes", type=positive_int, nargs="+")
    parser.add_argument("--contexts", type=positive_int, nargs="+", help="tokens of a row halfway through decoding")
    parser.add_argument("--tokens", type=positive_int, help="decoded per row and round, at most the context")
    parser.add_argument("--rounds", type=positive_int, default=3, help="timed rounds, after one that is not")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="CUDA graphs; default: where possible")
    parser.add_argument("--compiled", action="store_true", help="decode through torch.compile")
    parser.add_argument("--overlap", action="store_true", help="launch a step before the last one's draws are read")
    parser.add_argument("--requests", type=positive_int, help="of each load")
    parser.add_argument("--clients", type=positive_int, help="of the closed loop, and rows of the engine under load")
    parser.add_argument("--rate", type=positive_float, help="requests/s of the open loop; default: 0.7 of the closed's")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    parser.add_argument("--slo-ttft", type=positive_float, default=1.0, help="seconds that goodput allows")
    parser.add_argument("--slo-tpot", type=positive_float, default=0.05, help="seconds that goodput allows")
    parser.add_argument("--roof", choices=[gpu["name"] for gpu in GPUS], help="only print the roof of this GPU")
    parser.add_argument("--rows", type=Path, help="a JSON file that gets every row at once; its earlier rows are kept")
    parser.add_argument("--baselines", type=Path, default=results.BASELINES, help="folder of the baselines")
    add_device_flags(parser)
    add_engine_flags(parser)
    return parser.parse_args(argv)


def fill_defaults(args: argparse.Namespace, kind: str) -> None:
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.contexts = list(dict.fromkeys(args.contexts))


def main(args: argparse.Namespace) -> None:
    if args.roof:
        print_roof(args)
        return
    device = pick_device(args.device)
    rows = results.Results(args.rows, harness.environment(device))

    def keep(row: dict) -> None:
        rows.add({**row, **harness.clocks(device)})

    found = measure(args, device, keep, rows.note)
    base = results.baseline_rows(rows.environment["gpu"], args.baselines) or {}
    faults = [*found["left_out"], *filter(None, (results.slowdown(row, base.get(row["key"])) for row in found["rows"]))]
    print(json.dumps({"bench": "decode", **rows.environment, **found}))
    if faults:
        raise UserError("; ".join(faults))


def print_roof(args: argparse.Namespace) -> None:
    """Print the card of a GPU that need not be here, for the shapes that it would measure."""
    fill_defaults(args, "cuda")
    gpu = next(gpu for gpu in GPUS if gpu["name"] == args.roof)
    dtype = DTYPES.get(args.dtype, torch.bfloat16)
    with torch.device("meta"):
        kernels = resolve(KernelConfig.parse("eager"), torch.device("cpu"), dtype)
        model = GPT(GPTConfig.from_depth(args.depth, args.vocab_size, 2048), kernels, dtype).cast_weights()
    roof = Roof(model, args.kv == "fp8", gpu["name"], gpu["bytes_per_s"], int(gpu["memory_gib"] * 2**30))
    card = roof.card(args.batch_sizes, args.contexts)
    print(describe_card(card, str(dtype).removeprefix("torch."), args.kv))
    print(json.dumps({"bench": "decode", "roof": card}))


def measure(args: argparse.Namespace, device: torch.device, keep: Callable[[dict], None],
            note: Callable[[str], None]) -> dict:
    """Print and measure what the flags ask for, keep(row) at once; return what the JSON line says."""
    fill_defaults(args, device.type)
    model, tokenizer = load(args, device)
    fit_contexts(args, model.config.sequence_len)
    options = {**engine_options(args), "graphs": args.graphs, "compiled": args.compiled, "overlap": args.overlap}
    roof = Roof.of(model, args.kv == "fp8")
    card = roof.card(args.batch_sizes, args.contexts)
    print(describe_card(card, str(model.dtype).removeprefix("torch."), args.kv), flush=True)
    probe = Engine(model, tokenizer, tools="off", max_batch=1, n_pages=1, **options)  # refuses what cannot be here
    switches = {"graphs": probe.runner.graphs, "compiled": args.compiled, "overlap": args.overlap,
                "invariant": args.batch_invariant}
    how = "-".join(name for name, on in switches.items() if on) or "eager"
    del probe
    harness.free_memory()
    about = {"model": f"{args.stage or 'random'} d{model.config.n_layer}", "how": how, "kv": args.kv,
             "dtype": str(model.dtype).removeprefix("torch."), "kernels": dict(model.kernels.names)}
    name = f"{about['model'].replace(' ', '-')}/{args.kernels}/{args.kv}/{how}"
    print(f"{about['model']}, {model.kernels.describe()}; {how}, KV {args.kv}", flush=True)
    found = {**about, "roof": card, "rows": [], "left_out": [], "ratio": None}

    def store(row: dict) -> None:
        keep({**row, **about})
        found["rows"].append(row)

    def leave_out(what: str, error: Exception) -> None:
        found["left_out"].append(f"{name} {what} was left out: {type(error).__name__}: {str(error)[:300]}")
        note(found["left_out"][-1])
        print(found["left_out"][-1], flush=True)

    if "steps" in args.parts:
        measure_steps(args, model, tokenizer, name, roof, options, store, leave_out)
    if {"closed", "poisson"} & set(args.parts):
        try:
            measure_loads(args, model, tokenizer, name, options, store)
        except Exception as error:
            leave_out("under load", error)
    if "ratio" in args.parts:
        prompts = bench_engine.task_prompts(tokenizer) if args.stage else bench_engine.mixed_prompts(
            model.config.vocab_size)
        found["ratio"] = bench_engine.compare(model, tokenizer, prompts, args.tokens, args.rounds)
    return found


def load(args: argparse.Namespace, device: torch.device) -> tuple[GPT, object]:
    """Return the stage's model, or a random one with a tokenizer of as many tokens."""
    if args.stage:
        model, tokenizer, _ = load_model(args.stage, device=device, kernels=args.kernels, dtype=args.dtype)
        return model, tokenizer
    config = GPTConfig.from_depth(args.depth, args.vocab_size, max(256, *args.contexts) + args.tokens)
    model = random_model(config, args.kernels, device, pick_dtype(args.dtype, device))
    return model, tokenizer_of_random_words(args.vocab_size)


def fit_contexts(args: argparse.Namespace, limit: int) -> None:
    """Lower the contexts that leave a trained model no room to decode, and say so."""
    fitting = list(dict.fromkeys(min(context, limit - args.tokens // 2 - 1) for context in args.contexts))
    if min(*fitting, args.tokens) < 2:
        raise UserError(f"--contexts and --tokens must be at least 2 and fit the model's context of {limit}, got "
                        f"{args.contexts} and {args.tokens}")
    if fitting != args.contexts:
        print(f"contexts {args.contexts} become {fitting}: the model's is {limit}, {args.tokens} tokens are decoded")
    args.contexts = fitting


def measure_steps(args: argparse.Namespace, model: GPT, tokenizer, name: str, roof: Roof, options: dict,
                  store: Callable[[dict], None], leave_out: Callable[[str, Exception], None]) -> None:
    """Measure every batch at every context; what breaks is left out."""
    print(STEP_TITLE)
    for context in args.contexts:
        for batch in args.batch_sizes:
            try:
                cell = Cell(model, tokenizer, batch, context, args.tokens, options)
                cell.round()
                cell.ttft, cell.prefill, cell.seconds = [], [], []  # that one warmed up
                for _ in range(args.rounds):
                    cell.round()
                row = cell.row(name, roof, args.rounds)
            except Exception as error:  # of any kind, from a compiler or a GPU: the others keep their rows
                leave_out(f"b{batch} c{context}", error)
                continue
            finally:
                cell = None
                harness.free_memory()
            store(row)
            print(describe_step(row), flush=True)


def measure_loads(args: argparse.Namespace, model: GPT, tokenizer, name: str, options: dict,
                  store: Callable[[dict], None]) -> None:
    """Measure both kinds of clients, on one engine and the same requests, each from an empty prefix cache."""
    engine = Engine(model, tokenizer, tools="off", max_batch=args.clients, **options)
    vocab, context = model.config.vocab_size, max(args.contexts)
    jobs = load_jobs(args.requests, context, vocab, args.seed)
    decode_load.closed_loop(engine, load_jobs(args.clients, context, vocab, args.seed + 1), args.clients)  # warms up
    rate = args.rate
    if "closed" in args.parts or rate is None:
        engine.reset()
        row = load_row(name, "closed", decode_load.closed_loop(engine, jobs, args.clients), args, clients=args.clients)
        rate = rate or 0.7 * row["requests_per_s"]
        if "closed" in args.parts:
            store(row)
            print(describe_load(row), flush=True)
    if "poisson" in args.parts:
        engine.reset()
        arrivals = decode_load.poisson_arrivals(len(jobs), rate, args.seed)
        row = load_row(name, "poisson", decode_load.open_loop(engine, jobs, arrivals), args, rate=rate)
        store(row)
        print(describe_load(row), flush=True)


def bench_decode(device, benchmark, keep):
    """For `pytest bench/`: the default run."""
    found = benchmark.pedantic(measure, args=(parse_args([]), device, keep, print))
    assert not found["left_out"]


if __name__ == "__main__":
    run_script(parse_args, main)
