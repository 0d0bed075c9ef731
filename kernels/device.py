"""What the machine offers: compute capability, Triton or its interpreter, peak rates.

Peak rates are the vendors' dense figures without sparsity (data sheets of the SXM parts). An unknown GPU has no
peak: callers print "n/a" rather than a percentage of a guess.
"""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

# name fragment -> dense bf16 FLOP/s, dense fp8 FLOP/s, memory bytes/s; first match wins
PEAKS = (
    ("H200", 989e12, 1979e12, 4.8e12),
    ("H100 PCIe", 756e12, 1513e12, 2.0e12),
    ("H100", 989e12, 1979e12, 3.35e12),
    ("B200", 2250e12, 4500e12, 8.0e12),
    ("A100", 312e12, None, 2.0e12),
    ("4090", 165.2e12, 330.3e12, 1.008e12),
)


def sm(device: torch.device) -> int | None:
    """Return the compute capability as 10 * major + minor (90 on an H100), or None off CUDA."""
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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak(device: torch.device, what: str) -> float | None:
    """Return the peak rate of `device`: what is "bf16" or "fp8" (FLOP/s) or "memory" (bytes/s); None if unknown."""
    column = {"bf16": 1, "fp8": 2, "memory": 3}[what]
    name = device_name(device)
    return next((row[column] for row in PEAKS if row[0] in name), None)
