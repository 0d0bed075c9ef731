"""Checkpoints that survive a kill at any moment and never load damaged bytes.

    folder/step_000123/model.safetensors            rank 0
                       optim_rank0of2.safetensors   every rank (groups named optim... and rng...)
                       state.json                   everything that is not a tensor
                       MANIFEST.json                bytes and sha256 of the files above; written last

Everything is written under a temporary name and fsynced; one rename makes it a checkpoint. A parser alone is no
protection: of 300 single bit flips safetensors loaded 297 silently, so every file that is read is hashed first
(1.6 GB/s a core). safetensors and JSON only: loading a checkpoint can run no code.

Saving a step that exists keeps the old one as step_000123.old until the new one is in place; readers know that
name. What a killed save left (.tmp-*, .trash-*) is removed by the next one: a writer holds the folder's lock, so
whatever else is there belongs to the dead.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat.checkpoint_format import (
    MANIFEST,
    PER_RANK,
    STATE,
    STATE_KEYS,
    check_hash,
    damaged,
    group_file,
    manifest_text,
    parse_step,
    problem,
    read_json,
    read_manifest,
    state_text,
    step_name,
    write_tensors,
    write_text,
)
from nanochat.common import UserError, fsync_folder, human_bytes, print0

LOCK = ".lock"


class SaveError(UserError):
    """A checkpoint could not be written; whatever was there before is intact."""


# --- saving ---------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, *,
                    rank: int = 0, world_size: int = 1, keep: int = 2) -> Path:
    """Write `folder/step_{step:06d}` whole or not at all, then drop all but the newest `keep` checkpoints.

    tensors: group name -> tensor name -> tensor of any shape and device; views of one storage are written out
    each. Groups named optim... or rng... are this rank's own, the others are written by rank 0. Every rank calls
    this with the same step. state: JSON values with STATE_KEYS; floats come back bit for bit.
    Returns the checkpoint's path. Raises SaveError when the disk refuses, ValueError on what a file cannot hold.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, as the newest may be the damaged one, got {keep}")
    _check_ranks(rank, world_size)
    folder = Path(folder)
    final = folder / step_name(step)
    need = _sum_over_ranks(sum(tensor.numel() * tensor.element_size() for group, members in tensors.items()
                               if _is_mine(group, rank) for tensor in members.values()))
    nonce = _sum_over_ranks(secrets.randbits(62) if rank == 0 else 0)
    temp = folder / f".tmp-{final.name}-{nonce:016x}"
    lock = None
    try:
        with _on_all_ranks(final):
            if rank == 0:
                text = state_text(state, step)
                folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(folder)
                _sweep(folder)
                _check_space(folder, need)
                temp.mkdir()
        with _on_all_ranks(final):
            entries = {}
            for group, members in tensors.items():
                if _is_mine(group, rank):
                    name = group_file(group, rank, world_size)
                    entries[name] = write_tensors(temp / name, members)
            if rank == 0:
                entries[STATE] = write_text(temp / STATE, text)
            else:
                write_text(temp / f"entries_{rank}.json", json.dumps(entries))
        with _on_all_ranks(final):
            if rank == 0:
                for other in range(1, world_size):
                    entries |= _take_json(temp / f"entries_{other}.json")
                write_text(temp / MANIFEST, manifest_text(step, world_size, state, entries))
                fsync_folder(temp)
                _publish(temp, final)
                _drop_old(folder, keep, newest=final)
    except OSError as error:
        raise SaveError(_refusal(folder, step, need, error)) from error
    finally:
        if lock is not None:
            shutil.rmtree(temp, ignore_errors=True)
            os.close(lock)
    return final


def _is_mine(group: str, rank: int) -> bool:
    return rank == 0 or group.startswith(PER_RANK)


def _check_ranks(rank: int, world_size: int) -> None:
    actual = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if (rank, world_size) != actual:
        raise ValueError(f"rank {rank} of {world_size} was passed, the process group has "
                         f"rank {actual[0]} of {actual[1]} here")


def _sum_over_ranks(value: int) -> int:
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


@contextmanager
def _on_all_ranks(final: Path):
    """Run the body, wait for the other ranks' bodies, and fail on every rank when one of them failed."""
    failed = 1
    try:
        yield
        failed = 0
    finally:
        failures = _sum_over_ranks(failed)
    if failures:
        raise SaveError(f"{final} was not saved: another rank failed; the older checkpoints are intact")


def _lock(folder: Path) -> int:
    """Return an open descriptor that holds the folder's writer lock; the kernel frees it when we die."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SaveError(f"{folder} takes one writer at a time, another run is saving there now") from None
    return descriptor


def _sweep(folder: Path) -> None:
    """Remove what killed saves left behind. Called under the lock."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(path, ignore_errors=True)
        elif parse_step(path) is not None and path.suffix == ".old":
            plain = path.with_suffix("")
            if plain.exists():
                _discard(path if problem(plain, hashes=True) is None else plain)
            if not plain.exists():  # killed between the two renames of _publish
                os.rename(path, plain)


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + (1 << 20):  # 1 MiB for headers, state and directory blocks
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refusal(folder: Path, step: int, need: int, error: OSError) -> str:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    return (f"the checkpoint of step {step} was not saved: {folder} needs {need:,} bytes and has "
            f"{human_bytes(free)} free ({error.strerror or error}); the older checkpoints are intact")


def _take_json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return content


def _publish(temp: Path, final: Path) -> None:
    """Rename `temp` to `final`; at every moment the old or the new one is there under a name readers know."""
    old = final.with_suffix(".old")
    if final.exists():
        os.rename(final, old)
        fsync_folder(final.parent)
    os.rename(temp, final)
    fsync_folder(final.parent)
    if old.exists():
        _discard(old)


def _drop_old(folder: Path, keep: int, newest: Path) -> None:
    """Keep `newest` and the keep - 1 highest other steps; damaged ones are neither counted nor deleted."""
    others = [path for path in _candidates(folder) if path != newest and problem(path, hashes=False) is None]
    for path in others[keep - 1 :]:
        _discard(path)


def _discard(path: Path) -> None:
    """Delete a checkpoint; its name goes first, so that a kill in between leaves nothing plausible."""
    trash = path.with_name(f".trash-{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, trash)
    except OSError as error:  # the new checkpoint is safe by now; a leftover is not worth a dead run
        print0(f"could not delete {path}: {error.strerror}")
        return
    shutil.rmtree(trash, ignore_errors=True)


# --- loading --------------------------------------------------------------------------------------


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Return the newest whole checkpoint in `folder`, or the whole one of `step`; None when there is none.

    Whole means that every file's size and sha256 match. A newer damaged one is named in a printed line and
    passed over; asking for a step that is absent or damaged raises UserError.
    """
    folder = Path(folder)
    candidates = _candidates(folder)
    steps = sorted({parse_step(path) for path in candidates})
    if step is not None and step not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}, it has {', '.join(map(str, steps)) or 'none'}")
    wrong = None
    for path in candidates:
        if step in (None, parse_step(path)):
            wrong = problem(path, hashes=True)
            if wrong is None:
                return path
            if step is None:
                print0(f"passing over a damaged checkpoint: {wrong}")
    if step is not None:
        raise UserError(wrong)
    return None


def load_checkpoint(path: Path, *, groups: tuple[str, ...] = ("model",), rank: int = 0, world_size: int = 1,
                    device="cpu") -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Return ({group: {tensor name: tensor on `device`}}, state) of a checkpoint folder.

    Checks the presence and size of every file, and the sha256 of those that are read. Raises UserError naming
    the file, or both world sizes when an optim or rng group was saved by another number of ranks.
    """
    path = Path(path)
    manifest = read_manifest(path)
    saved = manifest["world_size"]
    tensors = {}
    for group in groups:
        if group.startswith(PER_RANK) and saved != world_size:
            raise UserError(f"checkpoint {path} was saved with world size {saved}, its {group} state cannot be "
                            f"loaded with world size {world_size}")
        name = group_file(group, rank, world_size)
        if name not in manifest["files"]:
            raise UserError(f"checkpoint {path} has no {name}, it has {', '.join(sorted(manifest['files']))}")
        check_hash(path, name, manifest)
        try:
            tensors[group] = load_file(path / name, device=str(device))
        except SafetensorError as error:
            raise damaged(path, f"{name} is no safetensors file ({error})") from error
    check_hash(path, STATE, manifest)
    state = read_json(path, STATE)
    if not isinstance(state, dict) or any(key not in state for key in STATE_KEYS):
        raise damaged(path, f"{STATE} must be an object with {', '.join(STATE_KEYS)}")
    return tensors, state


def weights_digest(path: Path) -> str:
    """Return 16 hexadecimal digits that tell the weights of this checkpoint from any others."""
    return read_manifest(Path(path))["files"][group_file("model", 0, 1)]["sha256"][:16]


def _candidates(folder: Path) -> list[Path]:
    """Return the folder's checkpoint folders, whole or not: newest first, step_N before step_N.old."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if parse_step(path) is not None]
    return sorted(named, key=lambda path: (-parse_step(path), path.name))


# --- random state ---------------------------------------------------------------------------------


def rng_state() -> dict[str, Tensor]:
    """Return torch's generator states as uint8 tensors: the tensor group "rng" of a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Set torch's generators to what `rng_state` returned; a GPU's state only matters where there is a GPU."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
