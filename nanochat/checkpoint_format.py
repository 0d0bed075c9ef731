"""The files of a checkpoint folder: writing them durably, and proving that they are what was written.

MANIFEST.json lists every other file with its bytes and sha256 and ends with a sha256 of itself. It is read only when
it equals, byte for byte, what this module would write for its content, so a flipped bit anywhere in it shows.
File names in it are plain names and files are plain files: neither "../x" nor a link leads out of the folder.
"""

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.environment import git

SCHEMA = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
STATE_KEYS = ("stage", "step", "model_config", "tokenizer_fingerprint", "kernels", "args")
PER_RANK = ("optim", "rng")  # groups that differ between ranks
MAX_JSON_BYTES = 64 << 20  # the manifest is read before anything vouches for it

_STEP_NAME = re.compile(r"step_(\d{6,})(\.old)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPE_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def parse_step(path: Path) -> int | None:
    """Return the step of a folder named step_N or step_N.old, None for any other name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match and match[1] == f"{int(match[1]):06d}" else None


def group_file(group: str, rank: int, world_size: int) -> str:
    """Return the file name of a tensor group; optim and rng groups have one file per rank."""
    if not _GROUP_NAME.fullmatch(group):
        raise ValueError(f"a tensor group is named with a-z, 0-9 and _, got {group!r}")
    suffix = f"_rank{rank}of{world_size}" if group.startswith(PER_RANK) else ""
    return f"{group}{suffix}.safetensors"


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """A new file that hashes what is written to it and is on the disk once it is closed without an error."""

    def __init__(self, path: Path):
        self.file = open(path, "xb")
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.bytes += len(data)

    def entry(self) -> dict:
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback) -> None:
        with self.file:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())


def write_text(path: Path, text: str) -> dict:
    """Write a new UTF-8 file; return its manifest entry {"bytes", "sha256"}."""
    with _Writer(path) as writer:
        writer.write(text.encode("utf-8"))
    return writer.entry()


def write_tensors(path: Path, members: dict[str, Tensor]) -> dict:
    """Write a new safetensors file; return its manifest entry {"bytes", "sha256"}.

    One tensor at a time goes to the CPU and out, so memory peaks at one tensor and not at a second model; the
    library's own writer holds a copy of all of them and refuses views of shared storage, which our parameters are.
    Format: 8 bytes little-endian header length, JSON header padded to 8 bytes, then the tensors without holes.
    Wide dtypes come first, which keeps every tensor aligned.
    """
    order = sorted(members, key=lambda name: (-members[name].element_size(), name))
    header, offset = {}, 0
    for name in order:
        tensor = members[name]
        if tensor.dtype not in _DTYPE_CODES or tensor.layout != torch.strided:
            raise ValueError(f"{path.name}: {name} must be a dense real tensor, "
                             f"it is {tensor.dtype}, {tensor.layout}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with _Writer(path) as writer:
        writer.write(len(text).to_bytes(8, "little"))
        writer.write(text)
        for name in order:
            flat = members[name].detach().reshape(-1).cpu().contiguous()
            writer.write(flat.view(torch.uint8).numpy().data)
    return writer.entry()


def canonical(value) -> str:
    """Return the one JSON text that we write for `value`: sorted keys, ASCII, floats in the shortest exact form."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def state_text(state: dict, step: int) -> str:
    """Return state.json's text; ValueError when the state lacks a key or would not come back as it went in."""
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise ValueError(f"a checkpoint's state carries {', '.join(STATE_KEYS)}; missing: {', '.join(missing)}")
    if state["step"] != step:
        raise ValueError(f"the state is of step {state['step']}, the checkpoint of step {step}")
    _check_json(state, "state")
    return canonical(state)


def _check_json(value, where: str) -> None:
    """Refuse what JSON cannot hold or would change: NaN, infinities, keys that are no strings, objects."""
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys are strings")
            _check_json(member, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            _check_json(member, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{where} is a {type(value).__name__}; a checkpoint's state holds JSON values")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; a checkpoint's state holds finite numbers")


def manifest_text(step: int, world_size: int, state: dict, entries: dict) -> str:
    """Return MANIFEST.json's text for the files in `entries` ({name: {"bytes", "sha256"}})."""
    body = {
        "schema": SCHEMA,
        "step": step,
        "world_size": world_size,
        "commit": git("rev-parse", "HEAD"),
        "torch": torch.__version__,
        "config_sha256": _sha256(canonical(state["model_config"])),
        "files": entries,
    }
    return canonical(body | {"sha256": _sha256(canonical(body))})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# --- reading --------------------------------------------------------------------------------------


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"checkpoint {path} is damaged: {what}")


def problem(path: Path, *, hashes: bool) -> str | None:
    """Return the sentence that says what is wrong with a checkpoint folder, None when it is whole.

    hashes=False looks at presence and sizes only, which costs no read of the tensors.
    """
    try:
        manifest = read_manifest(path)
        for name in manifest["files"] if hashes else ():
            check_hash(path, name, manifest)
    except UserError as error:
        return str(error)
    return None


def read_manifest(path: Path) -> dict:
    """Return the manifest, having checked it, the folder's name, and every file's presence, kind and size."""
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"a checkpoint is a folder and no link, {path} is not one")
    raw = _read_small(path, MANIFEST)
    try:
        manifest = _parse(raw)
        wrong = _manifest_problem(manifest)
        if wrong is None and raw != canonical(manifest).encode("utf-8"):
            wrong = "is not in the form in which it was written"
    except (ValueError, RecursionError) as error:
        wrong = f"is not valid JSON ({error})"
    if wrong is not None:
        raise damaged(path, f"{MANIFEST} {wrong}")
    if parse_step(path) not in (None, manifest["step"]):
        raise damaged(path, f"{MANIFEST} is of step {manifest['step']}")
    for name, entry in manifest["files"].items():
        size = _regular_size(path, name)
        if size != entry["bytes"]:
            raise damaged(path, f"{name} must have {entry['bytes']:,} bytes, it has {size:,}")
    extra = sorted(set(os.listdir(path)) - set(manifest["files"]) - {MANIFEST})
    if extra:
        raise damaged(path, f"{extra[0]} is not in {MANIFEST}")
    return manifest


def read_json(path: Path, name: str):
    """Return the content of a JSON file of the checkpoint `path`; UserError naming it when it is none."""
    try:
        return _parse(_read_small(path, name))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{name} is not valid JSON ({error})") from error


def _read_small(path: Path, name: str) -> bytes:
    size = _regular_size(path, name)
    if size > MAX_JSON_BYTES:
        raise damaged(path, f"{name} may have at most {MAX_JSON_BYTES:,} bytes, it has {size:,}")
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise damaged(path, f"{name} cannot be read ({error.strerror})") from error


def _parse(raw: bytes):
    return json.loads(raw, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def check_hash(path: Path, name: str, manifest: dict) -> None:
    """Raise UserError naming the file when its content is not the one that was written."""
    try:
        with open(path / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, f"{name} cannot be read ({error.strerror})") from error
    if digest != manifest["files"][name]["sha256"]:
        raise damaged(path, f"{name} does not match its sha256 in {MANIFEST}")


def _regular_size(path: Path, name: str) -> int:
    try:
        info = os.lstat(path / name)
    except FileNotFoundError as error:
        raise damaged(path, f"{name} is missing") from error
    except OSError as error:
        raise damaged(path, f"{name} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(info.st_mode):
        raise damaged(path, f"{name} must be a plain file, it is a link or a folder")
    return info.st_size


def _manifest_problem(manifest) -> str | None:
    """Return what is wrong with a parsed manifest in itself, None when it is sound."""
    if not isinstance(manifest, dict) or "schema" not in manifest:
        return "must be an object with a schema"
    if manifest["schema"] != SCHEMA:
        return f"has schema {manifest['schema']!r}, this program reads schema {SCHEMA}"
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _sha256(canonical(body)):
        return "does not match its own sha256"
    if type(body.get("step")) is not int or type(body.get("world_size")) is not int:
        return "must have an integer step and world_size"
    files = body.get("files")
    if not isinstance(files, dict) or STATE not in files:
        return f"must list {STATE} among its files"
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            return f"lists {name!r}, which is no plain file name"
        if (not isinstance(entry, dict) or type(entry.get("bytes")) is not int
                or not _SHA256.fullmatch(str(entry.get("sha256")))):
            return f"must give bytes and sha256 of {name}"
    return None
