"""What a run ran on: the checkout's commit, the machine, the versions, and what such a machine costs."""

import functools
import importlib.util
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from kernels.device import GPUS

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def git(*args: str) -> str | None:
    """Return the output of `git args` in this checkout; None without git or without a repository."""
    try:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def environment() -> dict[str, str]:
    """Return what a reader needs to judge a run's numbers, as texts in the order of the report."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "Generated": datetime.now().astimezone().isoformat(timespec="seconds"),
        "Commit": _commit(),
        "Platform": platform.platform(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "CPU": f"{_cpu_model()}, {cores} cores",
        "RAM": f"{ram:.0f} GiB",
        "GPU": _gpus(),
        "CUDA": str(torch.version.cuda) if torch.cuda.is_available() else "n/a",
    }


def gpus_here() -> tuple[int, str]:
    """Return (number, kind) of the GPUs that this process sees; (0, "") without any."""
    count = torch.cuda.device_count()
    return count, torch.cuda.get_device_name(0) if count else ""


def dollars_per_gpu_hour(name: str) -> float | None:
    """Return the price of one GPU of this name; None when it is unknown."""
    return next((gpu["dollars_per_hour"] for gpu in GPUS if gpu["name"] in name), None)


def _commit() -> str:
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    dirty = ", with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{commit} on {git('rev-parse', '--abbrev-ref', 'HEAD')}{dirty}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
