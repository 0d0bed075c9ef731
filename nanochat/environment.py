"""What a run ran on: the checkout's commit, the machine, the versions."""

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def git(*args: str) -> str | None:
    """Return the output of `git args` in this checkout; None without git or without a repository."""
    try:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
