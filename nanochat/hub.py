"""Files of the Hugging Face hub and the evaluation bundle, fetched by exact name: verified, resumed, atomic.

    base_dir()/hub/<owner>/<name>/<path>  manifest.json      base_dir()/eval_bundle/...  manifest.json

huggingface_hub turns names into addresses, sends tokens, follows HF_ENDPOINT and tells size and checksum. The transfer
is ours because its own checks the size alone and goes on without end while bytes trickle in. A file has its final
name only when its checksum is right; until then it is .<name>.part, locked by who writes it and continued by the next.
"""

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from nanochat.common import (
    UserError,
    atomic_write,
    base_dir,
    file_lock,
    fsync_folder,
    human_bytes,
    replace_folder,
)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_BUNDLE_BYTES = 4 << 30  # unpacked; the published one has 162 MB packed

FORMAT = 1
MANIFEST = "manifest.json"
ATTEMPTS = 5
BACKOFF_S, MAX_PAUSE_S = 1.0, 300.0  # the hub counts its rate limits over five minutes
SILENCE_S = 30.0  # an answer must begin, and go on, within this
SLOWEST = 1024  # bytes per second over SILENCE_S
DEADLINE_S = 3600.0  # of one file with all its attempts
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}

T = TypeVar("T")


class _Damaged(Exception):
    """What came is not what was announced; another attempt may bring it."""


class _Interrupted(Exception):
    """Not all came; what came is kept and another attempt may bring the rest."""


class _Stopped(Exception):
    """Another file failed or the user stopped the program."""


@dataclass(frozen=True)
class _Remote:
    size: int
    checksum: str  # sha256 or git's sha1 of a blob, by its length; "" where the server tells none
    commit: str | None


@dataclass(frozen=True)
class _File:
    """A file to fetch; `check` looks at the whole file and returns facts for the manifest, or raises _Damaged."""

    url: str
    folder: Path  # holds the manifest
    path: str  # below `folder`
    revision: str
    check: Callable[[Path], dict]
    from_hub: bool = True

    @property
    def target(self) -> Path:
        return self.folder / self.path

    @property
    def part(self) -> Path:
        return self.target.with_name(f".{self.target.name}.part")

    @property
    def headers(self) -> dict:
        return build_hf_headers(token=None if self.from_hub else False) | {"Accept-Encoding": "identity"}


@dataclass
class _Transfers:
    """What the threads of one call share: a stop flag and the progress bar."""

    bar: tqdm | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, n_bytes: int) -> None:
        with self.lock:
            if self.bar is not None:
                self.bar.update(n_bytes)


# --- files of a data set ----------------------------------------------------------------------------


def fetch(repo: str, path: str, *, revision: str = "main") -> Path:
    """Return the file `path` of the hub's data set `repo` ("owner/name"), downloaded unless it is here already.

    Raises UserError when it cannot be had: no such file, no access, no room, or five attempts failed.
    """
    return fetch_all([(repo, path)], revision=revision, progress=False)[0]


def fetch_all(files: Iterable[tuple[str, str]], *, revision: str = "main", workers: int = 8,
              progress: bool = True, repo_type: str = "dataset") -> list[Path]:
    """Return the (repo, path) files, in this order, after downloading those that are missing, `workers` at once.

    When one fails, those under way are finished and no other is begun; UserError names the failed ones.
    """
    wanted = [_hub_file(repo, path, revision, repo_type) for repo, path in files]
    manifests = {file.folder: read_manifest(file.folder) for file in wanted}
    missing = [file for file in dict.fromkeys(wanted) if not _is_here(file, manifests[file.folder])]
    if missing:
        _fetch_missing(missing, workers, progress)
    return [file.target for file in wanted]


def repo_folder(repo: str, repo_type: str = "dataset") -> Path:
    """Return where the files of a repository, "dataset" or "model", are kept."""
    return base_dir() / "hub" / ("" if repo_type == "dataset" else f"{repo_type}s") / repo


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return what is known of the fetched files below `folder`: path -> bytes, sha256, commit, revision, and of
    parquet files rows and row_groups. Empty where there is no manifest of this version: then files are looked at anew.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest["files"] if isinstance(manifest, dict) and manifest.get("format") == FORMAT else {}


def _hub_file(repo: str, path: str, revision: str, repo_type: str) -> _File:
    url = hf_hub_url(repo, path, repo_type=repo_type, revision=revision, endpoint=os.environ.get("HF_ENDPOINT") or None)
    return _File(url, repo_folder(repo, repo_type), path, revision,
                 _parquet_facts if path.endswith(".parquet") else lambda _: {})


def _parquet_facts(path: Path) -> dict:
    try:
        with pq.ParquetFile(path) as parquet:
            metadata = parquet.metadata
            return {"rows": metadata.num_rows,
                    "row_groups": [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]}
    except (pa.ArrowException, OSError) as error:
        raise _Damaged("it is no whole parquet file") from error


def _is_here(file: _File, manifest: dict[str, dict]) -> bool:
    entry = manifest.get(file.path)
    return (entry is not None and entry["revision"] == file.revision and file.target.is_file()
            and file.target.stat().st_size == entry["bytes"])


def _fetch_missing(files: list[_File], workers: int, progress: bool) -> None:
    shared = _Transfers()
    remotes = _in_parallel(partial(_look_up, shared=shared), files, workers, shared)
    sizes = [remote.size for remote in remotes]
    begun = [file.part.stat().st_size if file.part.is_file() else 0 for file in files]
    _check_space(files[0].folder, sum(max(0, size - n) for size, n in zip(sizes, begun, strict=True)), len(files))
    with tqdm(desc=f"fetching {len(files)} files", total=sum(sizes), unit="B", unit_scale=True, unit_divisor=1024,
              disable=None if progress else True) as shared.bar:
        _in_parallel(lambda pair: _download(*pair, shared), list(zip(files, remotes, strict=True)), workers, shared)


def _check_space(folder: Path, needed: int, n_files: int) -> None:
    free = shutil.disk_usage(base_dir()).free
    if needed > free:
        raise UserError(f"downloading {n_files} files needs {human_bytes(needed)} in {folder}, {human_bytes(free)} "
                        f"are free")


def _in_parallel(action: Callable[[T], object], items: list[T], workers: int, shared: _Transfers) -> list:
    """Run `action` on each item; after a failure begin no other, let those under way end, then raise one UserError."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
        except BaseException:  # Ctrl-C: those under way stop too, and their parts stay
            shared.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    unexpected = [error for error in errors if not isinstance(error, UserError)]
    if errors:
        if unexpected or len(items) == 1:
            raise (unexpected or errors)[0]
        n_done = sum(not future.cancelled() and not future.exception() for future in futures)
        more = f" (and {len(errors) - 1} more failed)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; {n_done} of {len(items)} files are done, the same command goes on from "
                        "there") from errors[0]
    return [future.result() for future in futures]


# --- one file ---------------------------------------------------------------------------------------


def _look_up(file: _File, shared: _Transfers) -> _Remote:
    """Ask for the file's size and checksum."""
    def ask() -> _Remote:
        metadata = get_hf_file_metadata(file.url, token=None if file.from_hub else False, timeout=SILENCE_S)
        if metadata.size is None or (file.from_hub and not (metadata.commit_hash and metadata.etag)):
            raise _Damaged("the answer is not one of a hub, it lacks a size, a commit or an ETag")
        known = re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", metadata.etag or "")
        return _Remote(metadata.size, known[0] if known else "", metadata.commit_hash)

    return _persist(ask, file, shared, time.monotonic() + DEADLINE_S)


def _download(file: _File, remote: _Remote, shared: _Transfers) -> None:
    """Give the file its final name and its entry in the manifest, once its bytes are all there and right."""
    deadline = time.monotonic() + DEADLINE_S
    file.target.parent.mkdir(parents=True, exist_ok=True)
    with _locked_part(file.part) as part:
        if _is_here(file, read_manifest(file.folder)):  # another process was faster
            file.part.unlink()
            return
        try:
            facts = _verified(file, remote, file.target)  # there, but not in the manifest: a kill came in between
            file.part.unlink()
        except (FileNotFoundError, _Damaged):
            facts = _persist(partial(_attempt, file, remote, part, shared, deadline), file, shared, deadline)
            os.fsync(part.fileno())
            os.replace(file.part, file.target)
            fsync_folder(file.target.parent)
        enter(file.folder, {file.path: facts})


@contextmanager
def _locked_part(path: Path) -> Iterator[BinaryIO]:
    """Open the part for appending when nobody else has it; whoever had it may have renamed it or taken it away."""
    while True:
        with open(path, "ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(part.fileno()), path.stat())
            except FileNotFoundError:
                current = False
            if current:
                yield part
                return


def _attempt(file: _File, remote: _Remote, part: BinaryIO, shared: _Transfers, deadline: float) -> dict:
    """Receive what the part lacks and verify the whole; what is damaged is dropped, what was only cut short stays."""
    try:
        _receive(file, remote, part, shared, deadline)
        return _verified(file, remote, file.part)
    except _Damaged:
        _cut_back(part, 0, shared)
        raise


def _receive(file: _File, remote: _Remote, part: BinaryIO, shared: _Transfers, deadline: float) -> None:
    start = part.tell()
    if start > remote.size or not remote.checksum:  # without a checksum nothing tells parts of two versions apart
        start = _cut_back(part, 0, shared)
    if start == remote.size:
        return
    resume = {"Range": f"bytes={start}-"} if start else {}
    with get_session().stream("GET", file.url, headers=file.headers | resume, timeout=SILENCE_S) as response:
        if response.status_code == 416:
            raise _Damaged("the server has less of it than it said")
        response.raise_for_status()
        if response.status_code != 206:  # it ignored the range and sends the whole
            _cut_back(part, 0, shared)
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _Damaged("the server answered with another range")
        announced = response.headers.get("Content-Length", "")
        if announced and int(announced) != remote.size - part.tell():
            raise _Damaged(f"the server sends {announced} bytes where {remote.size - part.tell()} are missing")
        last, received = time.monotonic(), 0
        for chunk in response.iter_raw():
            part.write(chunk)
            shared.count(len(chunk))
            received += len(chunk)
            now = time.monotonic()
            if shared.stop.is_set():
                raise _Stopped
            if now > deadline:
                raise _Interrupted(f"it took longer than {DEADLINE_S:.0f} s")
            if now - last > SILENCE_S:
                if received < SLOWEST * SILENCE_S:
                    raise _Interrupted(f"it came at less than {SLOWEST} bytes per second")
                last, received = now, 0
    part.flush()
    if part.tell() < remote.size:
        raise _Interrupted(f"{part.tell()} of {remote.size} bytes came")


def _cut_back(part: BinaryIO, size: int, shared: _Transfers) -> int:
    shared.count(size - part.tell())
    part.truncate(size)
    return part.seek(size)


def _verified(file: _File, remote: _Remote, path: Path) -> dict:
    """Return the manifest's entry for the content of `path`; _Damaged when it is not what the server announced."""
    size = path.stat().st_size
    if size != remote.size:
        raise _Damaged(f"it must have {remote.size} bytes, it has {size}")
    digest = sha256(path)
    found = digest if len(remote.checksum) != 40 else _git_sha1(path)
    if remote.checksum not in ("", found):
        raise _Damaged(f"its checksum must be {remote.checksum}, it is {found}")
    return {"bytes": size, "sha256": digest, "revision": file.revision, "commit": remote.commit, **file.check(path)}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    """Return git's name of a blob with this content, the hub's ETag for small files."""
    header = f"blob {path.stat().st_size}\0".encode()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(header)).hexdigest()


def enter(folder: Path, entries: dict[str, dict]) -> None:
    """Put entries, path -> facts, into the folder's manifest in place of what it knew; several processes may."""
    with file_lock(folder / f".{MANIFEST}.lock"):
        files = read_manifest(folder) | entries
        text = json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1)
        atomic_write(folder / MANIFEST, text + "\n")


# --- attempts ---------------------------------------------------------------------------------------


def _persist(action: Callable[[], T], file: _File, shared: _Transfers, deadline: float) -> T:
    """Return action(), tried up to ATTEMPTS times with growing, jittered pauses; UserError says why it failed."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (httpx2.HTTPError, httpx2.InvalidURL, _Damaged, _Interrupted) as error:
            pause = _pause_after(error, attempt)
            if pause is None or attempt == ATTEMPTS or time.monotonic() + pause > deadline:
                tried = "" if pause is None else f" after {attempt} attempts"
                raise UserError(f"{file.url} could not be downloaded{tried}: {_reason(error)}") from error
        except OSError as error:  # the disk, or HF_HUB_OFFLINE
            raise UserError(f"{file.target} could not be downloaded: {error.strerror or error}") from error
        if shared.stop.wait(pause):
            raise _Stopped
    raise AssertionError("unreachable")


def _pause_after(error: Exception, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt; None when another would end the same."""
    if isinstance(error, httpx2.TooManyRedirects | httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return None
    response = getattr(error, "response", None)
    if response is not None and response.status_code not in RETRIED_STATUS:
        return None
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    backoff = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
    return min(MAX_PAUSE_S, max(backoff, float(asked) if asked.isdecimal() else 0))


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        meaning = {401: " (it needs access: set HF_TOKEN)", 403: " (it needs access: set HF_TOKEN)",
                   404: " (there is no such file)"}.get(response.status_code, "")
        return f"the server answered {response.status_code}{meaning}"
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {SILENCE_S:.0f} s"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


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
        file = _File(url, base_dir() / "hub", "eval_bundle.zip", url, _check_zip, from_hub=False)
        if not _is_here(file, read_manifest(file.folder)):
            _fetch_missing([file], 1, True)
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
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _Damaged(f"it is no whole zip file ({error})") from error
    if damaged:
        raise _Damaged(f"{damaged} in it is damaged")
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
