"""One optimizer step of d12, d20 and d26 per kernel set: tokens/s, MFU in both conventions, peak memory, components.

    .venv/bin/python -m bench.bench_train --depth 20 --rounds 4 --rows d20.json
    .venv/bin/python -m pytest bench/bench_train.py

The real model and optimizer on random tokens. The sets take turns, round by round, so that a GPU that slows down slows
all of them, and they share one copy of weights, gradients and optimizer state. On one GPU the optimizer updates every
matrix, which on eight would be an eighth each: its share of the step is larger here than there.
"""

import argparse
import copy
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import harness, results
from kernels import KernelConfig, KernelUnavailable, registry, resolve
from kernels.device import device_name, peak
from nanochat.common import UserError, human_bytes, pick_device, run_script
from nanochat.flags import positive_int
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, PhaseTimer

# name -> (--kernels, torch.compile). Eager attention would keep 8 GB of scores per layer at d20, so torch's fused one
# stands in for it; `compile` is then what nanochat ran in November 2025, and what the others have to beat.
SETS = {
    "eager": ("eager,attention=sdpa", False),
    "compile": ("eager,attention=sdpa", True),
    "triton": ("triton", True),
    "best": ("best", True),
    "best+fp8": ("best,linear=fp8", True),
}
DEPTHS = (12, 20, 26)
LR_FACTOR = 0.1  # random tokens teach nothing: the weights stay near where they began
CONVENTIONS = {"mfu": False, "mfu_causal": True}  # nanochat's count of attention, and only the pairs it needs


class Workload:
    """A model, its optimizer and one step's random tokens; kernel sets run on it in turn."""

    def __init__(self, config: GPTConfig, tokens: int, micro_batch: int, device: torch.device, dtype: torch.dtype):
        rows = max(1, tokens // config.sequence_len)
        self.device, self.micro_batch = device, min(micro_batch, rows)
        self.model = GPT.build(config, _kernels("eager", config, device, dtype), dtype, device, seed=1)
        with torch.no_grad():
            for name, p in self.model.named_parameters():  # zeros run faster than what training multiplies
                if name.endswith("c_proj.weight") or name == "lm_head.weight":
                    p.normal_(std=config.n_embd ** -0.5)
        self.optimizer = MuonAdamW(self.model, self.model.kernels)
        generator = torch.Generator().manual_seed(2)
        shape = (rows, config.sequence_len + 1)
        self.tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)

    @property
    def n_tokens(self) -> int:
        return self.tokens[:, 1:].numel()


class Contender:
    """One kernel set on a workload's weights."""

    def __init__(self, name: str, work: Workload, text: str, compiled: bool):
        self.name, self.work, self.micro_batch, self.compiled = name, work, work.micro_batch, compiled
        base = work.model
        self.kernels = _kernels(text, base.config, work.device, base.dtype)
        with torch.device("meta"):
            self.model = GPT(base.config, self.kernels, base.dtype)
        self.model.load_state_dict(base.state_dict(keep_vars=True), assign=True)
        self.model.cos, self.model.sin = base.cos, base.sin
        self.optimizer = copy.copy(work.optimizer)
        self.optimizer.model = self.model
        self.optimizer.use(self.kernels, compiled)
        self.forward = compile_model(self.model) if compiled else self.model
        self.seconds, self.parts = [], defaultdict(list)
        self.peak, self.by_kernel, self.by_phase, self.graph_breaks = None, {}, {}, None

    def forward_backward(self, mark: Callable[[str], None]) -> None:
        for rows in self.work.tokens.split(self.micro_batch):
            loss = self.forward(rows[:, :-1], rows[:, 1:], reduction="sum") / self.work.n_tokens
            mark("forward")
            loss.backward()
            mark("backward")

    def update(self, mark: Callable[[str], None]) -> None:
        self.optimizer.step(LR_FACTOR)
        self.optimizer.zero_grad()
        mark("optimizer")

    def warm(self) -> None:
        """Run two steps, which compiles, halving the micro-batch until they fit the memory; then look inside."""
        while True:
            try:
                for _ in range(2):
                    self.step()
                break
            except torch.OutOfMemoryError as error:
                if self.micro_batch == 1:
                    raise UserError(f"{self.name}: one row does not fit the memory ({error})") from None
            self.micro_batch //= 2
            self.optimizer.zero_grad()
            harness.free_memory()
        if self.compiled:
            self.graph_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        self.look_inside()

    def step(self) -> None:
        """Run and time one step."""
        timer = PhaseTimer(self.work.device)
        timer.start()
        self.forward_backward(timer.mark)
        self.update(timer.mark)
        parts = timer.milliseconds()
        self.seconds.append(sum(parts.values()) / 1e3)
        for name, ms in parts.items():
            self.parts[name].append(ms)

    def look_inside(self) -> None:
        """Measure what needs steps of its own: peak memory, time by kernel, the optimizer's phases."""
        device = self.work.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.step()
            self.peak = torch.cuda.max_memory_allocated(device)
        quiet = lambda name: None  # noqa: E731
        for part, run in (("model", self.forward_backward), ("optimizer", self.update)):
            self.by_kernel[part] = kernel_groups(lambda run=run: run(quiet), device)
        timed = copy.copy(self.optimizer)
        timed.timer = PhaseTimer(device)
        timed.use(self.kernels)
        for _ in range(2):  # the timer keeps the second
            self.forward_backward(quiet)
            timed.step(LR_FACTOR)
            timed.zero_grad()
        self.by_phase = timed.timer.milliseconds()
        self.seconds.clear()
        self.parts.clear()


def compile_model(model: GPT) -> Callable:
    """Compile as training does. The sets share forward's code, and past its limit dynamo would silently run eagerly."""
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, dynamic=False)


def _kernels(text: str, config: GPTConfig, device: torch.device, dtype: torch.dtype):
    return resolve(KernelConfig.parse(text), device, dtype, config.shapes())


# --- time by kernel -------------------------------------------------------------------------------


GROUPS = (  # of kernels that are not ours, by name; the first that matches
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|bmm|addmm|baddbmm|_scaled_mm)$"),
    ("copies and fills", r"memcpy|memset|copy|fill|zero|aten::(cat|clone|contiguous)"),
    ("fused by inductor", r"^triton_"),
)


def kernel_groups(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return milliseconds per group of kernels, of one call: our kernels by file, the others by what they do."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    found, ours = defaultdict(float), our_kernels()
    for event in profiler.key_averages():
        # Ranges that inductor annotates appear on the GPU's line too, beside the kernels that they contain.
        annotated = getattr(event, "is_user_annotation", False)
        if (event.device_type == torch.autograd.DeviceType.CUDA) == cuda and not annotated:
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[_group(event.key, ours)] += spent / 1e3
    return {name: ms for name, ms in sorted(found.items(), key=lambda item: -item[1]) if ms}


def our_kernels() -> dict[str, str]:
    """Return kernel name -> file of kernels/ that defines it."""
    return {name: module.rpartition(".")[2] for module, loaded in list(sys.modules.items())
            if module.startswith("kernels.") for name, value in vars(loaded).items()
            if hasattr(value, "arg_names") and value.fn.__module__ == module}


def _group(kernel: str, ours: dict[str, str]) -> str:
    known = ours.get(kernel) or next((file for name, file in ours.items() if kernel.startswith(name)), None)
    return known or next((group for group, names in GROUPS if re.search(names, kernel, re.I)), "other")


# --- rows -----------------------------------------------------------------------------------------


def take_turns(contenders: list[Contender], rounds: int, steps: int, store: Callable[[list[dict]], None]) -> None:
    """Run the sets one after the other, `rounds` times over; store(rows) after every round."""
    for done in range(1, rounds + 1):
        for contender in contenders:
            for _ in range(steps):
                contender.step()
        store([train_row(c, contenders, steps) for c in contenders])
        print(f"round {done} of {rounds}: " + "  ".join(
            f"{c.name} {1e3 * statistics.median(c.seconds[-steps:]):,.1f} ms" for c in contenders), flush=True)


def train_row(contender: Contender, contenders: list[Contender], steps: int) -> dict:
    """Return the numbers of a set so far; ratios are medians over rounds of a round's medians."""
    work, config = contender.work, contender.work.model.config
    median, mad = harness.median_and_mad(contender.seconds)
    speed = work.n_tokens / median
    rate = peak(work.device, "bf16")
    flops = {name: work.model.estimate_flops(causal) for name, causal in CONVENTIONS.items()}
    base = next((c for c in contenders if c.name == "compile"), None)
    return {
        "key": f"train/d{config.n_layer}/{contender.name}", "set": contender.name, "depth": config.n_layer,
        "tokens_per_step": work.n_tokens, "micro_batch": contender.micro_batch, "context": config.sequence_len,
        "compiled": contender.compiled, "graph_breaks": contender.graph_breaks,
        "kernels": dict(contender.kernels.names),
        "median_s": median, "mad_s": mad, "steps": len(contender.seconds), "tokens_per_s": speed,
        **{name: rate and 100 * count * speed / rate for name, count in flops.items()}, "peak_flops": rate,
        "vs_compile": base and paired_ratio(base.seconds, contender.seconds, steps), "peak_bytes": contender.peak,
        "ms": {name: statistics.median(ms) for name, ms in contender.parts.items()},
        "kernel_ms": contender.by_kernel, "optimizer_ms": contender.by_phase,
    }


def paired_ratio(base: list[float], own: list[float], steps: int) -> dict[str, float]:
    """Return median, least and most over the rounds of base / own, both as a round's median."""
    rounds = [statistics.median(base[i:i + steps]) / statistics.median(own[i:i + steps])
              for i in range(0, min(len(base), len(own)), steps)]
    return {"median": statistics.median(rounds), "least": min(rounds), "most": max(rounds)}


def describe(row: dict) -> str:
    def percent(name: str) -> str:
        return "n/a" if row[name] is None else f"{row[name]:.1f} %"

    memory = "n/a" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"])
    ratio = "n/a" if row["vs_compile"] is None else f"{row['vs_compile']['median']:.3f}x"
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row["ms"].items())
    return (f"{row['key']:<20} {1e3 * row['median_s']:>9.1f} ms +- {1e3 * row['mad_s']:.1f}  "
            f"{row['tokens_per_s']:>11,.0f} tok/s  MFU {percent('mfu')} nanochat's count, {percent('mfu_causal')} "
            f"causal  {ratio} of compile  peak {memory}  micro-batch {row['micro_batch']}  ms: {parts}")


# --- the program ----------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=positive_int, default=12)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["eager", "compile", "best", "best+fp8"])
    parser.add_argument("--best-from", type=Path, help="results to take `best` from, in place of kernels/best.json")
    parser.add_argument("--rounds", type=positive_int, default=4, help="turns of each set")
    parser.add_argument("--steps", type=positive_int, default=3, help="timed steps of a turn")
    parser.add_argument("--tokens", type=positive_int, default=131_072, help="per step")
    parser.add_argument("--micro-batch", type=positive_int, default=32, help="most rows at once; halved where too many")
    parser.add_argument("--sequence-len", type=positive_int, default=2048)
    parser.add_argument("--vocab-size", type=positive_int, default=65_536)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="torch.compile in the sets that have it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rows", type=Path, help="a JSON file that gets the rows after every round")
    parser.add_argument("--baselines", type=Path, default=results.BASELINES, help="folder of the baselines")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    rows = results.Results(args.rows, harness.environment(device))
    work = workload(args.depth, device, args.tokens, args.micro_batch, args.sequence_len, args.vocab_size)
    if args.best_from:
        use_best_of(args.best_from, device)
    contenders = []
    for name in args.sets:
        contender = enter(name, work, args, rows)
        contenders += [contender] if contender else []
    if not contenders:
        raise UserError(f"none of {', '.join(args.sets)} runs on this {device.type}")

    def store(found: list[dict]) -> None:
        for row in found:
            rows.add({**row, **harness.clocks(device)})

    take_turns(contenders, args.rounds, args.steps, store)
    own = [rows.rows[f"train/d{args.depth}/{contender.name}"] for contender in contenders]
    print(*map(describe, own), sep="\n")
    base = results.baseline_rows(rows.environment["gpu"], args.baselines) or {}
    faults = [fault for row in own if (fault := results.slowdown(row, base.get(row["key"])))]
    faults += [f"{name} was left out" for name in args.sets if name not in {c.name for c in contenders}]
    if faults:
        raise UserError("; ".join(faults))


def use_best_of(path: Path, device: torch.device) -> None:
    """Let the preset `best` mean what was fastest in these results, for this process."""
    gpu = device_name(device) if device.type == "cuda" else device.type
    table = Path(tempfile.mkdtemp(prefix="nanochat-bench-")) / "best.json"
    table.write_text(json.dumps({gpu: results.best_backends(results.load(path)["rows"])}), encoding="utf-8")
    registry.BEST_TABLE = table


def workload(depth: int, device: torch.device, tokens=131_072, micro_batch=32, sequence_len=2048,
             vocab_size=65_536) -> Workload:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = GPTConfig.from_depth(depth, vocab_size, sequence_len)
    return Workload(config, tokens, micro_batch, device, dtype)


def enter(name: str, work: Workload, args: argparse.Namespace, rows: results.Results) -> Contender | None:
    """Compile and warm up a set; one that cannot run here, or breaks, is noted and left out."""
    text, compiled = SETS[name]
    start = time.perf_counter()
    try:
        contender = Contender(name, work, text, compiled and args.compile)
        contender.warm()
    except Exception as error:  # of any kind, from a compiler or a GPU: the other sets keep their rows
        why = f"d{work.model.config.n_layer} {name} was left out: {type(error).__name__}: {str(error)[:500]}"
        print(why, flush=True)
        rows.note(why)
        return None
    print(f"d{work.model.config.n_layer} {name}: {contender.kernels.describe()}\n"
          f"ready after {time.perf_counter() - start:.0f} s", flush=True)
    return contender


@pytest.fixture(scope="module", params=DEPTHS, ids="d{}".format)
def shared_work(request, device):
    if harness.timer_for(device) is None:
        pytest.skip(f"device times need a CUDA GPU, this is {device.type}")
    return workload(request.param, device)


@pytest.mark.benchmark(timer=harness.CLOCK.read)
@pytest.mark.parametrize("kernel_set", SETS)
def bench_train_step(shared_work, kernel_set, benchmark, keep):
    text, compiled = SETS[kernel_set]
    try:
        contender = Contender(kernel_set, shared_work, text, compiled)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    contender.warm()

    def timed(_) -> float:
        contender.step()
        return contender.seconds[-1]

    benchmark.pedantic(harness.CLOCK.timed, args=(timed, None), rounds=10)
    keep(train_row(contender, [contender], 1))
    harness.free_memory()


if __name__ == "__main__":
    run_script(parse_args, main)
