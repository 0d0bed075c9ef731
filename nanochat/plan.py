"""What a run will take, before anything is rented: tokens, FLOPs, shards, memory, hours and dollars per stage.

Plain arithmetic on the standard library alone, so that it runs before anything is installed. The model's numbers are
exact (a test compares them with the model); memory, hours and dollars are projections from the assumptions below, but
for the pretraining rate where a bench has measured one on that GPU.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIERS = (12, 20, 26, 32)  # depths of speedrun.sh's presets
VOCAB, CONTEXT, BATCH_TOKENS = 65536, 2048, 524288
SFT_BATCH_ROWS, SFT_DEVICE_ROWS, RL_BATCH_PROBLEMS = 32, 4, 16
# Learning rates are for nanochat's batches, so a number of GPUs may move them only so far.
BATCH_TOLERANCE, SFT_TOLERANCE = 1 / 20, 1 / 8
TOKENS_PER_PARAMETER = 20
GIB = 2**30

# --- assumptions, each printed beside what follows from it ---

CHARS_PER_TOKEN = 4.8  # of FineWeb-EDU with 65,536 tokens, nanochat (Nov 2025)
CROPPED = 0.23  # of the tokens, by rows of 2,048 that begin with a document: bench_packing, on drawn lengths
SHARD_CHARS, SHARD_BYTES = 250e6, 100e6
MFU = 0.45  # pretraining; nanochat's published d32 run on 8x H100 had 0.509
FINETUNE_MFU = 0.20  # SFT and RL: small batches of ragged rows
EVALUATION_MFU = 0.10
DOWNLOAD_BYTES_PER_S = 200e6
TOKENIZER_HOURS = 0.1
MID_ROWS, SFT_ROWS, ROW_TOKENS = 568_000, 21_400, 700
RL_STEPS, RL_SAMPLES, RL_TOKENS = 467, 16 * 16, 256
RL_EVAL_EVERY, RL_EVAL_SAMPLES = 60, 400 * 8  # pass@8 of 400 problems
VALIDATION_EVERY, VALIDATION_TOKENS = 250, 20 * 524288
ROLLOUT_TOKENS_PER_S = 10_000  # per GPU at d20; others in inverse proportion to the parameters
EVALUATION_TOKENS = {"base": 170e6, "chat": 10e6}  # CORE's 22 tasks and bits per byte; the five chat tasks
# Bytes per token, layer and channel that the backward pass keeps: 16 activations of 2 bytes (two norms' inputs and
# outputs, q, k, v, attention's output, and 4 channels each before and after the MLP's activation).
ACTIVATION_BYTES = 32
LOGIT_ROWS = 8192  # the fused cross-entropy's chunk: logits and their gradient in 2 bytes
USABLE = 0.9  # of a GPU's memory; the rest is CUDA's and the allocator's gaps


@dataclass(frozen=True)
class Shape:
    """A model of speedrun.sh: C = 64 depth, heads of 128, untied embedding and head."""

    depth: int
    vocab: int = VOCAB
    context: int = CONTEXT

    @property
    def width(self) -> int:
        return 64 * self.depth

    @property
    def embedding(self) -> int:
        return self.vocab * self.width

    @property
    def matrices(self) -> int:
        return 12 * self.depth * self.width**2

    @property
    def parameters(self) -> int:
        return self.matrices + 2 * self.embedding

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs as nanochat counts: 6 per matrix and head weight, and every (query, key) pair."""
        return 6 * (self.matrices + self.embedding) + 12 * self.depth * self.width * self.context

    @property
    def tokens(self) -> int:
        return round(TOKENS_PER_PARAMETER * self.parameters / BATCH_TOKENS) * BATCH_TOKENS

    @property
    def shards(self) -> int:
        """FineWeb-EDU shards that pretraining reads once, and the validation shard."""
        return math.ceil(self.tokens * CHARS_PER_TOKEN / (1 - CROPPED) / SHARD_CHARS) + 1


@dataclass(frozen=True)
class Machine:
    """`gpus` of a kind; bf16 is its dense peak in FLOP/s. Unknown figures are None."""

    kind: str
    gpus: int
    memory_gib: float | None
    bf16: float | None
    dollars_per_hour: float | None  # per GPU

    @classmethod
    def of(cls, kind: str, gpus: int, memory_gib: float | None = None, dollars: float | None = None) -> "Machine":
        """Look a GPU up by a part of its name (h100, 4090, "NVIDIA A100-SXM4-80GB"); what is given overrides.

        A kind sold in two sizes is taken at the smaller of the table's memory and the one in its name; a GH200 480GB
        is named after its host's.
        """
        gpu = next((gpu for gpu in known_gpus() if gpu["name"].lower() in kind.lower()), {})
        sizes = [gpu.get("memory_gib"), *map(int, re.findall(r"(\d+) ?GB", kind, re.IGNORECASE))]
        memory_gib = memory_gib or min((size for size in sizes if size), default=None)
        return cls(gpu.get("name", kind), gpus, memory_gib, gpu.get("bf16"),
                   gpu.get("dollars_per_hour") if dollars is None else dollars)


@dataclass(frozen=True)
class Stage:
    name: str
    hours: float | None
    basis: str  # what the hours follow from


def known_gpus() -> list[dict]:
    return json.loads((ROOT / "kernels" / "gpus.json").read_text(encoding="utf-8"))


def memory_by_part(shape: Shape, gpus: int, micro_batch: int) -> dict[str, float]:
    """Return the bytes of one GPU in pretraining by part: weights and gradients whole, the optimizer's state shared."""
    kept = ACTIVATION_BYTES * shape.width * shape.depth  # per token
    moments = 4 * shape.matrices + 8 * 2 * shape.embedding  # Muon keeps one in fp32, AdamW two
    return {
        "weights (fp32)": 4 * shape.parameters,
        "gradients (fp32)": 4 * shape.parameters,
        f"optimizer (1/{gpus})": moments / gpus,
        "weights cast to bf16": 2 * (shape.parameters - shape.embedding),
        f"activations of {micro_batch} rows": kept * micro_batch * shape.context,
        "logits of a chunk": 4 * min(LOGIT_ROWS, micro_batch * shape.context) * shape.vocab,
    }


def micro_batch(shape: Shape, gpus: int, memory_gib: float | None) -> int:
    """Return the largest power of two up to 32 rows that fits a GPU; 1 where nothing does or its memory is unknown."""
    rows = 32
    while rows > 1 and (memory_gib is None
                        or sum(memory_by_part(shape, gpus, rows).values()) > USABLE * memory_gib * GIB):
        rows //= 2
    return rows


def nearest_batch(wanted: int, gpus: int, most: int, tolerance: float) -> tuple[int, int]:
    """Return (rows of a GPU at a time, rows of a step): the most at a time, up to `most`, with which a step is `wanted`
    rows give or take the fraction `tolerance`; where no number does it, the one that comes nearest."""
    most = min(most, max(1, round(wanted / gpus)))
    found = [(rows, rows * gpus * max(1, round(wanted / (rows * gpus)))) for rows in range(most, 0, -1)]
    near = [batch for batch in found if abs(batch[1] - wanted) <= tolerance * wanted]
    return near[0] if near else min(found, key=lambda batch: abs(batch[1] - wanted))


def pretraining_batch(shape: Shape, machine: Machine) -> tuple[int, int]:
    """Return (rows of a GPU at a time, rows of a step) of pretraining and mid-training; ValueError when GPUs are left
    without a row."""
    rows = BATCH_TOKENS // shape.context
    if machine.gpus > rows:
        raise ValueError(f"a step of {BATCH_TOKENS:,} tokens is {rows} rows of {shape.context:,}, so GPUs must be at "
                         f"most {rows}, got {machine.gpus}")
    return nearest_batch(rows, machine.gpus, micro_batch(shape, machine.gpus, machine.memory_gib), BATCH_TOLERANCE)


def steps_of(shape: Shape, step_rows: int) -> int:
    return round(TOKENS_PER_PARAMETER * shape.parameters / (step_rows * shape.context))


def evaluations(steps: int, every: int) -> int:
    """Return how often a trainer evaluates: at step 0, after every `every` steps, and last."""
    return len(range(0, steps, every)) + 1


def measured_mfu(machine: Machine, depth: int) -> tuple[float, str] | None:
    """Return (MFU as a fraction, the baseline's file and row) that benches measured on this kind of GPU, or None."""
    found = []
    for path in sorted((ROOT / "bench" / "baselines").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if machine.kind.lower() not in str(content.get("environment", {}).get("gpu", "")).lower():
            continue
        found += [(row["mfu"] / 100, f"{path.name}, {key}") for key, row in content.get("rows", {}).items()
                  if key.startswith(f"train/d{depth}/") and row.get("mfu") and not key.endswith("fp8")]
    return max(found, default=None)


def stages(shape: Shape, machine: Machine) -> Iterator[Stage]:
    """Yield the stages of speedrun.sh in order; hours are None where the GPU's peak rate is unknown."""
    measured = measured_mfu(machine, shape.depth)
    mfu, source = measured or (MFU, "assumed")
    source = f"measured: {source}" if measured else source

    def train(tokens: float, rate: float) -> float | None:
        return machine.bf16 and tokens * shape.flops_per_token / (machine.gpus * machine.bf16 * rate) / 3600

    def evaluate(kind: str) -> Stage:
        tokens = EVALUATION_TOKENS[kind]
        return Stage(f"{kind} evaluation", train(tokens / 3, EVALUATION_MFU),  # a forward is a third of a training step
                     f"{tokens / 1e6:.0f}M tokens at {EVALUATION_MFU:.0%} MFU, assumed")

    rollout = RL_STEPS * RL_SAMPLES * RL_TOKENS
    passed = evaluations(RL_STEPS, RL_EVAL_EVERY) * RL_EVAL_SAMPLES * RL_TOKENS
    _, step_rows = pretraining_batch(shape, machine)
    validated = evaluations(steps_of(shape, step_rows), VALIDATION_EVERY) * VALIDATION_TOKENS
    per_s = machine.gpus * ROLLOUT_TOKENS_PER_S * Shape(20).parameters / shape.parameters
    yield Stage("first shards and tokenizer", TOKENIZER_HOURS, "assumed; the other shards arrive meanwhile")
    waiting = shape.shards * SHARD_BYTES / DOWNLOAD_BYTES_PER_S / 3600 - TOKENIZER_HOURS
    yield Stage("waiting for shards", max(0.0, waiting), f"{DOWNLOAD_BYTES_PER_S / 1e6:.0f} MB/s, assumed")
    yield Stage("pretraining", train(shape.tokens, mfu), f"{shape.tokens / 1e9:.2f}B tokens at {mfu:.0%} MFU, {source}")
    yield Stage("pretraining's validation", train(validated / 3, mfu),
                f"{validated / 1e6:,.0f}M tokens, a forward each, as fast")
    yield evaluate("base")
    yield Stage("mid-training", train(MID_ROWS * ROW_TOKENS, mfu),
                f"{MID_ROWS:,} rows of {ROW_TOKENS} tokens at {mfu:.0%} MFU, assumed")
    yield evaluate("chat")
    yield Stage("SFT", train(SFT_ROWS * ROW_TOKENS, FINETUNE_MFU),
                f"{SFT_ROWS:,} rows of {ROW_TOKENS} tokens at {FINETUNE_MFU:.0%} MFU, assumed")
    yield evaluate("chat")
    hours = train(rollout, FINETUNE_MFU)
    yield Stage("RL", hours and hours + (rollout + passed) / per_s / 3600,
                f"{rollout / 1e6:.0f}M sampled tokens and {passed / 1e6:.0f}M of pass@k, {per_s:,.0f} per second, "
                "assumed")
    yield evaluate("chat")


def total_hours(shape: Shape, machine: Machine) -> float | None:
    hours = [stage.hours for stage in stages(shape, machine)]
    return None if None in hours else sum(hours)
