"""What every program shares: where artifacts live, user errors, the process group, atomic files.

The base directory is $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. A program is a script with
`parse_args` and `main`; `run_script` turns a user's mistake into one sentence and exit code 2.
"""

import argparse
import fcntl
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kernels import KernelError
from nanochat.roll_call import RollCall, agree_on_attempt, first_sentence

SEED = 42


class UserError(Exception):
    """A mistake the user can repair. The message is one sentence: the thing, the rule, the value."""


def run_script(parse_args: Callable[[], argparse.Namespace], main: Callable) -> None:
    """Run `main(parse_args())`; a UserError or KernelError becomes `error: ...` on stderr and exit code 2.

    So does, in a job of several ranks, the loss of another rank, which is named.
    """
    args = parse_args()
    try:
        main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError | KernelError) else None
        if _roll_call is not None:
            sentence = _roll_call.explain(error, sentence)
        if sentence is None:
            raise
        print(f"error: {sentence}\n", end="", file=sys.stderr, flush=True)  # in one write: ranks share the terminal
        raise SystemExit(2) from None


def base_dir() -> Path:
    """Return the folder of all artifacts, created on first use."""
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"NANOCHAT_BASE_DIR must be a folder that can be written, got {folder} "
                        f"({error.strerror})") from error
    return folder


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `path` so that a reader, or a run after a power loss, sees the old or the new content whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode("utf-8") if isinstance(data, str) else data
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private; these are ordinary artifacts
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; killed in between, neither is there and `new` has to be built again."""
    old = new.with_name(f"{new.name}-old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Let one process at a time, and one thread, into the block; the others wait."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- the run: device, ranks, seeds ----------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where this process computes and which of the world's ranks it is."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int:
        """Peak memory of this process in bytes: the allocator's on a GPU, resident memory on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce `tensor` in place over all ranks ("sum" or "max"); a no-op alone."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return tensor


def pick_device(name: str) -> torch.device:
    """Return the torch device for "auto", "cpu", "cuda" or "cuda:N"; GPU N is this thread's current one then."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} needs a CUDA GPU that torch can see, found none")
    if device.index is not None and device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name} must be one of the GPUs that torch can see, cuda:0 to "
                            f"cuda:{torch.cuda.device_count() - 1}")
        torch.cuda.set_device(device)  # Triton launches kernels on the current GPU, wherever their tensors lie
    return device


def init_runtime(device: str = "auto", *, seed: int = SEED) -> Runtime:
    """Seed, pick the device and join torchrun's process group when there is one.

    Ranks on GPUs talk over NCCL, ranks on CPU over gloo; a rank that is not there, or keeps the others waiting, ends
    the job after NANOCHAT_TIMEOUT seconds (default 600). Raises UserError where ranks cannot join or share no folder.
    """
    picked = pick_device(device)
    torch.manual_seed(seed)
    if picked.type == "cuda":
        torch.set_float32_matmul_precision("high")
    world_size = _world_size()
    if world_size == 1:
        return Runtime(picked)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size} needs torchrun's variables, {', '.join(missing)} not set")
    rank, local_rank = _from_environment("RANK"), _from_environment("LOCAL_RANK")
    if picked.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"a node needs a GPU per rank, local rank {local_rank} of {socket.gethostname()} has none: "
                            f"torch sees {torch.cuda.device_count()}")
        picked = torch.device("cuda", local_rank)
        torch.cuda.set_device(picked)
    runtime = Runtime(picked, rank, world_size)
    if not dist.is_initialized():
        _join(runtime)
    return runtime


def _world_size() -> int:
    return _from_environment("WORLD_SIZE", "1", 1)


def _from_environment(name: str, default: str = "0", least: int = 0, kind: str = "a whole number") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} must be {kind} from {least}, got {text!r}")
    return int(text)


def _join(runtime: Runtime) -> None:
    """Join the process group of this attempt and remember its store, through which lost ranks will be named."""
    global _roll_call
    close_runtime()  # of an earlier job in this process
    seconds = _from_environment("NANOCHAT_TIMEOUT", "600", 1, "whole seconds")
    timeout = timedelta(seconds=seconds)
    try:
        store, _, _ = next(dist.rendezvous("env://", runtime.rank, runtime.world_size, timeout=timeout))
        attempt = agree_on_attempt(store, runtime.rank, runtime.world_size, timeout)
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group("nccl" if runtime.device.type == "cuda" else "gloo", timeout=timeout,
                                store=dist.PrefixStore("group", store), rank=runtime.rank,
                                world_size=runtime.world_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"rank {runtime.rank} of {runtime.world_size} on {socket.gethostname()} must meet the others "
                        f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {seconds} s, it did not "
                        f"({first_sentence(error)})") from error
    _roll_call = RollCall(dist.PrefixStore("roll call", store), runtime.rank, runtime.world_size)
    if _from_environment("LOCAL_WORLD_SIZE", str(runtime.world_size), 1) < runtime.world_size:
        _check_shared_folder(runtime, dist.PrefixStore("shared folder", store))


def _check_shared_folder(runtime: Runtime, store: dist.Store) -> None:
    """Raise UserError when a node has a base directory of its own: every rank writes its part of a checkpoint."""
    if runtime.is_main:
        marker = base_dir() / f".shared-{secrets.token_hex(8)}"
        marker.touch()
        store.set("name", marker.name)
    seen = (base_dir() / store.get("name").decode()).exists()
    blind = int(runtime.all_reduce(torch.tensor(float(not seen), device=runtime.device)))
    if runtime.is_main:
        marker.unlink()
    if blind:
        raise UserError(f"NANOCHAT_BASE_DIR must be one folder that all nodes share, {blind} of {runtime.world_size} "
                        f"ranks do not see what rank 0 wrote; {base_dir()} on {socket.gethostname()} "
                        + ("is rank 0's" if seen else "is another"))


_roll_call: RollCall | None = None  # of the process group, while there is one


def close_runtime() -> None:
    """Leave the process group, if this process joined one."""
    global _roll_call
    if _roll_call is not None:
        _roll_call.left.set()
        _roll_call.join()
        _roll_call = None
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*values, **kwargs) -> None:
    """Print on rank 0 only, flushed so that a log file shows progress; a RANK counts only beside a WORLD_SIZE."""
    if _world_size() == 1 or _from_environment("RANK") == 0:
        print(*values, flush=True, **kwargs)


def human_bytes(n: float) -> str:
    """Return n bytes as "1.5 GiB", "12 MiB" and so on."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit in ("B", "KiB") else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def duration(seconds: float) -> str:
    """Return seconds as "3h 51m", "4m 07s" or "12s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
