"""Time one op honestly on a GPU: device events, L2 cold, parity first, figures beside what the hardware could do.

A `Bench` is one provider of one op at one size, forward or forward+backward. Providers are the registered backends and
`compile`, torch.compile of the eager reference, which is the baseline that matters. Rates count the least work and
traffic: `Op.flops` and `Op.bytes` forward; backward twice the forward's FLOPs (2.5 times for attention, whose scores
are computed again) and each input and incoming gradient read once, each gradient written once.
"""

import contextlib
import functools
import gc
import hashlib
import importlib.util
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from kernels import KernelConfig, resolve
from kernels.check import assert_parity
from kernels.device import device_name, peak
from kernels.registry import BACKENDS, OPS, Op, why_not
from nanochat.environment import ROOT, git

SIZES = ("d12", "d20", "d26")
BACKWARD_FLOPS = {"attention": 2.5}  # times the forward's; 2 for everything else
BATCH_KEYS = ("B", "M", "rows", "N", "banks")  # a case's dimension that may shrink without changing what is computed
COLD_BYTES = 512 * 2**20  # several times an L2 (60 MB on an H200); clearing it also outlasts the launches that follow
SECONDS_PER_ROW, FEWEST, MOST = 0.5, 15, 100


@dataclass(frozen=True)
class Bench:
    """One row to measure."""

    op: str
    provider: str
    case: str
    backward: bool

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def key(self) -> str:
        return f"kernel/{self.op}/{self.provider}/{self.case}/{self.passes}"


def benches(ops: Sequence[str] = (), sizes: Sequence[str] = SIZES, providers: Sequence[str] = ()) -> list[Bench]:
    """Return a row per op, size, pass and provider, eager and compile first; empty filters let everything through."""
    return [Bench(op.name, provider, case, backward) for op in OPS.values() if op.name in (ops or OPS)
            for case in op.cases if case.startswith(tuple(sizes))
            for backward in ((False, True) if op.grad_inputs else (False,))
            for provider in dict.fromkeys(("eager", "compile", *BACKENDS[op.name]))
            if provider in (providers or (provider,))]


# --- time -----------------------------------------------------------------------------------------


class DeviceTimer:
    """Calls a function once and returns the seconds that the GPU took, from events around it, with a cold L2."""

    def __init__(self, device: torch.device):
        self.cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cold.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Clock:
    """The clock that pytest-benchmark reads: it stands still except for the device time that `timed` adds."""

    def __init__(self):
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def timed(self, timer: Callable, call: Callable) -> None:
        self.now += timer(call)


CLOCK = Clock()


@functools.cache
def timer_for(device: torch.device) -> Callable[[Callable], float] | None:
    """Return what times a call on `device`, None where there are no device events."""
    return DeviceTimer(device) if device.type == "cuda" else None


def rounds_for(seconds: float) -> int:
    return min(MOST, max(FEWEST, int(SECONDS_PER_ROW / seconds)))


def median_and_mad(samples: Sequence[float]) -> tuple[float, float]:
    """Return the median and the median absolute deviation from it."""
    median = statistics.median(samples)
    return median, statistics.median(abs(s - median) for s in samples)


# --- what is timed --------------------------------------------------------------------------------


def compute_dtype(op: Op) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]


def why_skipped(bench: Bench, device: torch.device) -> str | None:
    """Return why this row cannot be measured here, None when it can."""
    op = OPS[bench.op]
    backend = BACKENDS[bench.op].get(bench.provider)
    reason = backend and why_not(backend, device, compute_dtype(op))
    if reason or timer_for(device):
        return reason
    return f"device times need a CUDA GPU, this is {device.type}"


class Call:
    """A row ready to run: `self()` does the work once. Ops that the provider uses are those that `auto` takes."""

    def __init__(self, bench: Bench, device: torch.device):
        self.bench, self.op = bench, OPS[bench.op]
        dtype = compute_dtype(self.op)
        self.itemsize = dtype.itemsize
        backend = "eager" if bench.provider == "compile" else bench.provider
        config = "eager" if backend == "eager" else f"auto,{bench.op}={backend}"
        kernels = resolve(KernelConfig.parse(config), device, dtype)
        self.kernels = {op: kernels.names[op] for op in (bench.op, *BACKENDS[bench.op][backend].uses)}
        self.fn = getattr(kernels, bench.op)
        if bench.provider == "compile":
            torch.compiler.reset()
            self.fn = torch.compile(_plain(self.fn))
        with device:  # a generator on the GPU draws 800M numbers in milliseconds
            generator = torch.Generator(device).manual_seed(0)
            self.inputs = self.op.make_inputs(self.op.cases[bench.case], dtype, device, generator)
        self.cotangents = self._cotangents() if bench.backward else []

    def _outputs(self) -> list[torch.Tensor]:
        result = self.fn(**self.inputs)
        return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)

    def _cotangents(self) -> list[torch.Tensor]:
        for name in self.op.grad_inputs:
            self.inputs[name].requires_grad_()
        return [torch.randn_like(output) for output in self._outputs()]

    def __call__(self) -> None:
        if self.bench.backward:
            torch.autograd.grad(self._outputs(), [self.inputs[n] for n in self.op.grad_inputs], self.cotangents)
            return
        with torch.no_grad():
            self._outputs()

    def flops(self) -> float | None:
        if self.op.flops is None:
            return None
        backward = BACKWARD_FLOPS.get(self.op.name, 2.0) if self.bench.backward else 0.0
        return (1 + backward) * self.op.flops(self.op.cases[self.bench.case])

    def bytes(self) -> float | None:
        if self.op.bytes is None:
            return None
        forward = self.op.bytes(self.op.cases[self.bench.case], self.itemsize)
        if not self.bench.backward:
            return forward
        gradients = [self.inputs[name] for name in self.op.grad_inputs]
        return forward + sum(t.nbytes for t in [*self.cotangents, *gradients, *gradients])


def _plain(fn: Callable) -> Callable:
    """Return a function for torch.compile: some ops are functools.partial objects."""
    return lambda **inputs: fn(**inputs)


@functools.cache
def parity_fault(op_name: str, backend: str, case: str, device: torch.device) -> tuple[str | None, str]:
    """Return (what is wrong with `backend` on this case or None, what was compared: "whole" or the cut batch).

    The reference in fp64 takes four times the memory of bf16; where it does not fit, the batch is halved until it does.
    """
    op, compared = OPS[op_name], "whole"
    values = dict(op.cases[case])
    while True:
        try:
            with _only_case(op, values):
                assert_parity(op_name, backend, "bench", compute_dtype(op), device)
            return None, compared
        except AssertionError as error:
            return str(error).split("\n")[0], compared
        except torch.OutOfMemoryError:
            compared = _halve_batch(values)
            if compared is None:
                return "the fp64 reference does not fit this GPU's memory", "nothing"
        free_memory()  # outside the handler: the exception's frames hold tensors


@contextlib.contextmanager
def _only_case(op: Op, values: Mapping):
    OPS[op.name] = replace(op, cases={"bench": values})
    try:
        yield
    finally:
        OPS[op.name] = op


def _halve_batch(values: dict) -> str | None:
    """Halve the case's batch in place; return its new value as a text, None when it cannot shrink further."""
    name = next((key for key in BATCH_KEYS if key in values), None)
    if name == "banks":
        values[name] = tuple((max(1, n // 2), rows, cols) for n, rows, cols in values[name])
        return None if all(n == 1 for n, _, _ in values[name]) else f"banks={values[name]}"
    if name is None or values[name] < 2:
        return None
    values[name] //= 2
    return f"{name}={values[name]}"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(call: Callable, device: torch.device) -> int | None:
    """Return the most memory that one call takes beyond what is allocated before it; None off CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# --- figures --------------------------------------------------------------------------------------


def figures(bench: Bench, call: Call, samples: Sequence[float], device: torch.device) -> dict:
    """Return a row: median, spread, rates, and the share of the time that the hardware's peaks would allow."""
    median, mad = median_and_mad(samples)
    flops, moved = call.flops(), call.bytes()
    rates = {"compute": peak(device, "fp8" if bench.provider == "fp8" else "bf16"), "memory": peak(device, "memory")}
    floors = {what: work / rates[what] for what, work in (("compute", flops), ("memory", moved))
              if work and rates[what]}
    roof = max(floors, key=floors.get) if len(floors) == sum(w is not None for w in (flops, moved)) and floors else None
    low, high = quantiles(samples)
    return {
        "key": bench.key, "op": bench.op, "provider": bench.provider, "case": bench.case, "passes": bench.passes,
        "median_s": median, "mad_s": mad, "p20_s": low, "p80_s": high, "rounds": len(samples),
        "gb_per_s": moved and moved / median / 1e9, "tflop_per_s": flops and flops / median / 1e12,
        "roof": roof, "percent_of_roof": roof and 100 * floors[roof] / median, "kernels": call.kernels,
    }


def against(row: dict, rows: Mapping[str, dict]) -> dict[str, float | None]:
    """Return how many times faster the row is than eager and compile of the same run, None where they are missing."""
    found = {}
    for base in ("eager", "compile"):
        other = rows.get(row["key"].replace(f"/{row['provider']}/", f"/{base}/"))
        found[f"vs_{base}"] = other and other["median_s"] / row["median_s"]
    return found


def quantiles(samples: Sequence[float]) -> tuple[float, float]:
    """Return the 20th and 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def environment(device: torch.device) -> dict:
    """Return what a row's numbers depend on: GPU, driver, versions, commit, whether the tree had changes, sources.

    The sources' digest is for machines that got the tree without its repository.
    """
    commit = git("rev-parse", "--short=12", "HEAD")
    return {
        "gpu": device_name(device), "driver": smi(device, "driver_version"), "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda, "commit": commit,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "kernels_sha256": source_digest(ROOT / "kernels"),
    }


def source_digest(folder: Path) -> str:
    """Return the first 12 hex digits of the sha256 over a folder's Python files and their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def clocks(device: torch.device) -> dict:
    """Return the clocks in MHz and the power in W right now, None where nvidia-smi does not tell."""
    fields = {"sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem", "watts": "power.draw"}
    answer = (smi(device, ",".join(fields.values())) or "").split(", ")
    values = dict(zip(fields, answer, strict=False))
    return {name: _number(values.get(name)) for name in fields}


def smi(device: torch.device, fields: str) -> str | None:
    """Return nvidia-smi's answer about this GPU, None where there is none."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"--id=GPU-{uuid}" if uuid else f"--id={torch.cuda.current_device()}"
    command = ["nvidia-smi", which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None  # "[N/A]" on some machines
