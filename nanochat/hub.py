"""Files of the Hugging Face hub and the evaluation bundle, fetched by exact name.

    base_dir()/hub/<owner>/<name>/<path>  manifest.json      base_dir()/eval_bundle/...  manifest.json

HF_ENDPOINT says which hub. No repository is ever listed, and what is here already needs no network.
"""

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_url

from nanochat.common import UserError, atomic_write, base_dir, file_lock, human_bytes, replace_folder
from nanochat.download import FORMAT, MANIFEST, Damaged, File, download, is_here, read_manifest, sha256

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_BUNDLE_BYTES = 4 << 30  # unpacked; the published one has 162 MB packed


def fetch(repo: str, path: str, *, revision: str = "main") -> Path:
    """Return the file `path` of the hub's data set `repo` ("owner/name"), downloaded unless it is here already.

    Raises UserError when it cannot be had: no such file, no access, no room, or five attempts failed.
    """
    return fetch_all([(repo, path)], revision=revision, progress=False)[0]


def fetch_all(files: Iterable[tuple[str, str]], *, revision: str = "main", workers: int = 8,
              progress: bool = True, repo_type: str = "dataset") -> list[Path]:
    """Return the (repo, path) files, in this order, after downloading those that are missing, `workers` at once.

    When one fails, those under way are finished and no other is begun; UserError names it.
    """
    wanted = [_hub_file(repo, path, revision, repo_type) for repo, path in files]
    manifests = {file.folder: read_manifest(file.folder) for file in wanted}
    missing = [file for file in dict.fromkeys(wanted) if not is_here(file, manifests[file.folder])]
    if missing:
        download(missing, workers=workers, progress=progress)
    return [file.target for file in wanted]


def repo_folder(repo: str, repo_type: str = "dataset") -> Path:
    """Return where the files of a repository, "dataset" or "model", are kept."""
    return base_dir() / "hub" / ("" if repo_type == "dataset" else f"{repo_type}s") / repo


def _hub_file(repo: str, path: str, revision: str, repo_type: str) -> File:
    if _leaves(repo) or _leaves(path):
        raise UserError(f"a file of the hub must be named by owner/name and a path below it, got {repo} and {path}")
    url = hf_hub_url(repo, path, repo_type=repo_type, revision=revision, endpoint=os.environ.get("HF_ENDPOINT") or None)
    return File(url, repo_folder(repo, repo_type), path, revision,
                 _parquet_facts if path.endswith(".parquet") else lambda _: {})


def _parquet_facts(path: Path) -> dict:
    try:
        with pq.ParquetFile(path) as parquet:
            metadata = parquet.metadata
            return {"rows": metadata.num_rows,
                    "row_groups": [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]}
    except (pa.ArrowException, OSError) as error:
        raise Damaged("it is no whole parquet file") from error


# --- the evaluation bundle --------------------------------------------------------------------------


def fetch_bundle(url: str = BUNDLE_URL) -> Path:
    """Return base_dir()/eval_bundle, the unpacked bundle of `url` (a zip with a core.yaml), fetched unless it is here.

    Raises UserError for a zip that is no bundle, names files outside of it, or unpacks to more than MAX_BUNDLE_BYTES.
    """
    folder = base_dir() / "eval_bundle"
    with file_lock(folder.with_name(".eval_bundle.lock")):
        if _is_bundle_of(url, folder):
            return folder
        if folder.exists() and not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} must have been downloaded or not exist, it has no {MANIFEST}: move it away")
        file = File(url, base_dir() / "hub", "eval_bundle.zip", url, _check_zip, from_hub=False)
        if not is_here(file, read_manifest(file.folder)):
            download([file])
        for leftover in folder.parent.glob(".tmp-eval_bundle-*"):  # of a killed run: we have the lock
            shutil.rmtree(leftover)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-eval_bundle-"))
        try:
            manifest = {"format": FORMAT, "url": url, "files": _unpack(file.target, building)}
            atomic_write(building / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            os.chmod(building, 0o755)  # mkdtemp makes folders private
            replace_folder(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        file.target.unlink()
    return folder


def _is_bundle_of(url: str, folder: Path) -> bool:
    """Tell whether `folder` holds all files of the bundle that came from `url`, in their sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (manifest["format"] == FORMAT and manifest["url"] == url
                and all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_zip(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last for a password
        raise Damaged(f"it is no whole zip file ({error})") from error
    if damaged:
        raise Damaged(f"{damaged} in it is damaged")
    return {}


def _unpack(path: Path, folder: Path) -> dict[str, dict]:
    """Unpack what is beside or below the archive's core.yaml; return bytes and sha256 per file."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        size = sum(member.file_size for member in members)
        if size > min(MAX_BUNDLE_BYTES, shutil.disk_usage(folder).free):
            raise UserError(f"{path} must unpack to at most {human_bytes(MAX_BUNDLE_BYTES)} and the free space, it has "
                            f"{human_bytes(size)}")
        outside = [member.filename for member in members if _leaves(member.filename)]
        if outside:
            raise UserError(f"{path} must name files below its own folder, it names {outside[0]}")
        cores = [PurePosixPath(member.filename) for member in members
                 if PurePosixPath(member.filename).name == "core.yaml"]
        if not cores:
            raise UserError(f"{path} must hold a core.yaml to be an evaluation bundle, it has none")
        root = min(cores, key=lambda name: len(name.parts)).parent
        files = {}
        for member in members:
            name = PurePosixPath(member.filename)
            if not name.is_relative_to(root):
                continue
            target = folder / name.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
            files[str(name.relative_to(root))] = {"bytes": target.stat().st_size, "sha256": sha256(target)}
    return files


def _leaves(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts
