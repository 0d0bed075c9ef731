"""What the machine offers: Triton or its interpreter, compute capability, tiles for it, peak rates.

gpus.json has the vendors' dense rates without sparsity (data sheets of the SXM parts) in FLOP/s and bytes/s, the
memory, and the dollars per hour that nanochat (Nov 2025) counts with. An unknown GPU has none of these: callers print
"n/a" rather than a percentage of a guess.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch


class _Absent:
    """Stands in for triton where it is not installed: kernels can be decorated, and then nobody offers them."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args, **kwargs):
        return args[0] if args and callable(args[0]) else self


# Triton 3.10 turns the fusion of multiply and add off unless told otherwise; our figures are with it, on every version.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()
HAS_TRITON = not isinstance(triton, _Absent)

# The first whose name is part of the device's; null is what the vendor does not offer or publish.
GPUS: list[dict] = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))

# The capability that `meta` tensors stand for while kernels are compiled without a GPU (kernels/compile_table.py).
META_SM: int | None = None
PICKED: set[tuple] = set()  # (id of a TILES table, key) of every entry taken in this process


def sm(device: torch.device) -> int | None:
    """Return the compute capability as 10 * major + minor (90 on an H100), or None off CUDA."""
    if device.type == "meta":
        return META_SM
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def interpreter_on() -> bool:
    """Say whether Triton kernels decorated from now on run in Python on the CPU.

    Triton reads TRITON_INTERPRET when @triton.jit decorates, so the variable must be set before the op files
    are imported.
    """
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def sm_count(device: torch.device) -> int:
    """Return how many multiprocessors there are to fill: 132 for meta tensors (H100, H200), 4 for the interpreter."""
    if device.type != "cuda":
        return 132 if device.type == "meta" else 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def pick_tile(tiles: Mapping[tuple, dict], device: torch.device, *size_class) -> dict:
    """Return the entry of an op's TILES for this device, keyed (sm, *size_class).

    Without an entry for the very capability the next lower one is taken. sm 0 is the interpreter's: small blocks, so
    that tiny shapes already need several of them.
    """
    have = sm(device) or 0
    known = [key[0] for key in tiles if key[1:] == size_class and key[0] <= have]
    if not known:
        raise ValueError(f"no tile for sm{have} and {size_class}; there are {', '.join(map(str, tiles))}")
    key = (max(known), *size_class)
    PICKED.add((id(tiles), key))
    return tiles[key]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak(device: torch.device, what: str) -> float | None:
    """Return the peak rate of `device`: what is "bf16" or "fp8" (FLOP/s) or "memory" (bytes/s); None if unknown."""
    name = device_name(device)
    known = next((gpu for gpu in GPUS if gpu["name"] in name), {})
    return known.get("bytes_per_s" if what == "memory" else what)
