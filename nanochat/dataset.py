"""Prepared text: parquet shards with a `text` column, a pinned validation shard and a manifest.

    base_dir()/base_data/<name>/shard_00000.parquet ... val.parquet manifest.json

`prepare` writes them once from a source of `nanochat.text_sources` into a temporary folder and renames it, the
manifest last; `open_dataset` finds them again. Pages carry checksums: without them a flipped bit changed the text
unnoticed in 38 of 150 zstd shards, with them in none. FineWeb-EDU comes as shards, which stay where `nanochat.hub`
puts them.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import fineweb
from nanochat.common import UserError, atomic_write, base_dir, file_lock, human_bytes, print0, replace_folder
from nanochat.text_sources import BuiltinSource, FolderSource, capped, open_parquet, read_row_group

FORMAT = 1
ROW_GROUP_ROWS = 1024
SHARD_CHARS = 250_000_000
VAL_FILE = "val.parquet"
MANIFEST = "manifest.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Dataset:
    """Prepared shards of one source.

    `manifest["files"]` has, per shard, its bytes, sha256, rows and the rows of each row group.
    """

    name: str
    folder: Path
    manifest: dict

    @property
    def train(self) -> list[Path]:
        return [self.folder / name for name in sorted(self.manifest["files"]) if name != self.val.name]

    @property
    def val(self) -> Path:
        return self.folder / self.manifest.get("val", VAL_FILE)

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' names and contents; where they came from is no part of it."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    def shards(self, split: str) -> list[Path]:
        if split not in SPLITS:
            raise UserError(f"split must be train or val, got {split!r}")
        return self.train if split == "train" else [self.val]


def find_source(source: str | Path, *, skip_corrupt: bool = False) -> BuiltinSource | FolderSource:
    """Return the source that `--data` names: "builtin" or a folder."""
    if str(source) == "builtin":
        return BuiltinSource()
    if not str(source):
        raise UserError("data must be builtin, fineweb-edu or a folder, got an empty name")
    return FolderSource(source, skip_corrupt=skip_corrupt)


def prepare(source: str | Path, *, max_chars: int | None = None, shards: int | None = None, workers: int = 8,
            skip_corrupt: bool = False) -> Dataset:
    """Make the shards of `source` ("builtin", "fineweb-edu" or a folder) unless they are there; return the dataset.

    Of builtin text and folders documents are taken in the source's order until they have `max_chars` characters, and
    the old shards stay in place until the new ones are whole. Of FineWeb-EDU the first `shards` training shards are
    downloaded, `workers` at once. `skip_corrupt` passes over row groups that cannot be read, and counts them. Raises
    UserError for a source that gives no text for both splits.
    """
    if max_chars is not None and max_chars < 1:
        raise UserError(f"max-chars must be at least 1, got {max_chars}")
    if str(source) == fineweb.NAME:
        if max_chars is not None:
            raise UserError(f"data {fineweb.NAME} is counted in shards, not in characters, got max-chars {max_chars}")
        dataset = Dataset(fineweb.NAME, fineweb.folder(),
                          fineweb.prepare(shards, workers=workers, skip_corrupt=skip_corrupt))
        _print_summary(dataset)
        return dataset
    found = find_source(source, skip_corrupt=skip_corrupt)
    _refuse_shards(source, shards)
    identity = found.identity() | {"max_chars": max_chars}
    folder = base_dir() / "base_data" / found.name
    folder.parent.mkdir(exist_ok=True)
    with file_lock(folder.with_name(f".{folder.name}.lock")):  # those who wait then find it done
        manifest = _read_manifest(folder)
        if manifest and manifest["source"] == identity and not _damage(folder, manifest):
            return Dataset(found.name, folder, manifest)
        manifest = _build(folder, found, identity, max_chars)
    dataset = Dataset(found.name, folder, manifest)
    _print_summary(dataset, found)
    return dataset


def open_dataset(source: str | Path, *, shards: int | None = None) -> Dataset:
    """Return the dataset that `prepare(source)` made; UserError when it is missing or a shard has another size.

    Of FineWeb-EDU it is the first `shards` training shards, which must be here whatever else is, or, for None, as many
    as are here: a run that must be resumed with the same data names their number.
    """
    if str(source) == fineweb.NAME:
        dataset = Dataset(fineweb.NAME, fineweb.folder(), fineweb.opened(shards))
    else:
        _refuse_shards(source, shards)
        name = find_source(source).name
        folder = base_dir() / "base_data" / name
        manifest = _read_manifest(folder)
        if manifest is None:
            raise UserError(f"data {source} is not prepared, run python -m scripts.dataset --data {source}")
        dataset = Dataset(name, folder, manifest)
    damage = _damage(dataset.folder, dataset.manifest)
    if damage:
        raise UserError(f"{damage}, run python -m scripts.dataset --data {source}")
    return dataset


def _refuse_shards(source: str | Path, shards: int | None) -> None:
    if shards is not None:
        raise UserError(f"--shards counts the shards of {fineweb.NAME}, data {source} has none to choose from")


def verify(dataset: Dataset) -> None:
    """Compare every shard's sha256 with the manifest; UserError names the first that differs."""
    for name, entry in dataset.manifest["files"].items():
        if _sha256(dataset.folder / name) != entry["sha256"]:
            raise UserError(f"{dataset.folder / name} must have the sha256 of its manifest, it has another: "
                            "delete it and prepare the data again")


def iter_texts(dataset: Dataset, split: str, *, max_chars: int | None = None,
               doc_cap: int | None = None) -> Iterator[str]:
    """Yield the split's documents in order, each cut to `doc_cap` characters, until they have `max_chars`."""
    documents = Documents(dataset, split)
    yield from capped((documents[index][:doc_cap] for index in range(len(documents))), max_chars)


class Documents:
    """Random access to a split's documents by their index in the split; one row group is in memory at a time."""

    def __init__(self, dataset: Dataset, split: str):
        self._dataset = dataset
        self._groups: list[tuple[Path, int]] = []
        self._starts: list[int] = []  # index of each row group's first document
        self._len = 0
        for path in dataset.shards(split):
            entry = dataset.manifest["files"][path.name]
            for group, rows in enumerate(entry["row_groups"]):
                if group in entry.get("corrupt", ()):
                    continue
                self._groups.append((path, group))
                self._starts.append(self._len)
                self._len += rows
        self._cached = -1
        self._texts: list[str] = []

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._len:
            raise IndexError(index)
        group = bisect_right(self._starts, index) - 1
        if group != self._cached:
            self._texts = self._read(group)
            self._cached = group
        return self._texts[index - self._starts[group]]

    def _read(self, position: int) -> list[str]:
        path, group = self._groups[position]
        entry = self._dataset.manifest["files"][path.name]
        damage = _file_damage(path, entry)
        if damage:
            raise UserError(f"{damage}, prepare the data again")
        try:
            with open_parquet(path) as parquet:
                texts = read_row_group(parquet, group, path)
        except UserError as error:
            raise UserError(f"{error}: delete it and prepare the data again") from error
        if len(texts) != entry["row_groups"][group]:
            raise UserError(f"{path} must have {entry['row_groups'][group]} rows in row group {group}, "
                            f"it has {len(texts)}")
        return [text or "" for text in texts]  # a shard that is not ours may hold nulls


# --- writing ----------------------------------------------------------------------------------------


class ShardWriter:
    """Collects (split, text) and writes shards into `folder`; `finish()` returns the manifest's file table.

    Documents are shuffled within their shard with a fixed seed: a user's files come sorted by name, so neighbours
    are alike and a batch of neighbours is no sample of the text.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._pending: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._train_chars = 0
        self._n_train = 0
        self.files: dict[str, dict] = {}
        self.chars = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, text: str) -> None:
        self._pending[split].append(text)
        self.chars[split] += len(text)
        if split == "train":
            self._train_chars += len(text)
            if self._train_chars >= SHARD_CHARS:
                self._flush_train()

    def finish(self) -> dict[str, dict]:
        if self._pending["train"]:
            self._flush_train()
        if self._pending["val"]:
            self._write(VAL_FILE, self._pending["val"])
        return self.files

    def _flush_train(self) -> None:
        self._write(f"shard_{self._n_train:05d}.parquet", self._pending["train"])
        self._n_train += 1
        self._pending["train"] = []
        self._train_chars = 0

    def _write(self, name: str, texts: list[str]) -> None:
        random.Random(name).shuffle(texts)
        path = self._folder / name
        table = pa.table({"text": pa.array(texts, pa.large_string())})
        with open(path, "wb") as file:
            pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, compression="zstd", use_dictionary=False,
                           write_statistics=False, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        rows = len(texts)
        self.files[name] = {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "rows": rows,
            "row_groups": [min(ROW_GROUP_ROWS, rows - start) for start in range(0, rows, ROW_GROUP_ROWS)],
        }


def _build(folder: Path, source: BuiltinSource | FolderSource, identity: dict, max_chars: int | None) -> dict:
    prefix = f".tmp-{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed run: the lock says that nobody writes it
        shutil.rmtree(leftover)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        writer = ShardWriter(building)
        for split, text in source.documents(max_chars):
            writer.add(split, text)
        files = writer.finish()
        if not writer.chars["train"] or not writer.chars["val"]:
            rows = sum(entry["rows"] for entry in files.values())
            limit = "" if max_chars is None else f" within {max_chars} characters"
            raise UserError(f"data {source.name} must have at least two different documents to split into train "
                            f"and validation, it has {rows}{limit}")
        manifest = {"format": FORMAT, "name": folder.name, "source": identity, "skipped": source.skipped,
                    "chars": writer.chars, "files": files}
        if getattr(source, "corrupt", None):
            manifest["corrupt"] = source.corrupt
        atomic_write(building / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        os.chmod(building, 0o755)  # mkdtemp makes folders private
        replace_folder(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _read_manifest(folder: Path) -> dict | None:
    """Return the manifest, or None when there is none that this version can read: then data is prepared again."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _damage(folder: Path, manifest: dict) -> str | None:
    """Return what is wrong with the first shard that is missing or has another size than the manifest says."""
    return next(filter(None, (_file_damage(folder / name, entry) for name, entry in manifest["files"].items())), None)


def _file_damage(path: Path, entry: dict) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == entry["bytes"] else f"{path} must have {entry['bytes']} bytes, it has {size}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _print_summary(dataset: Dataset, source: BuiltinSource | FolderSource | None = None) -> None:
    parts = []
    for split in SPLITS:
        entries = [dataset.manifest["files"][path.name] for path in dataset.shards(split)]
        chars = f", {dataset.manifest['chars'][split]:,} characters" if "chars" in dataset.manifest else ""
        parts.append(f"{split} {sum(entry['rows'] for entry in entries):,} documents{chars}")
    size = sum(entry["bytes"] for entry in dataset.manifest["files"].values())
    print0(f"data {dataset.name}: {'; '.join(parts)}; {human_bytes(size)} on disk")
    entries = dataset.manifest["files"].items()
    corrupt = dataset.manifest.get("corrupt") or {name: entry["corrupt"] for name, entry in entries
                                                  if entry.get("corrupt")}
    for name, groups in corrupt.items():
        print0(f"skipped corrupt row groups of {name}: {', '.join(map(str, groups))}")
    if source and source.skipped:
        print0(f"skipped {source.skipped:,} {source.skipped_kind}")
    if isinstance(source, FolderSource) and (ignored := source.ignored()):
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(ignored.items()))
        print0(f"ignored {ignored.total():,} files of other kinds ({kinds})")
