"""Files over HTTP, whatever happens on the way: verified, resumed, atomic, and told in a manifest.

A file has its final name only when its size and checksum are those that the server announced; until then it is
.<name>.part, locked by who writes it and continued by the next. huggingface_hub asks for size and checksum and sends
tokens, but the transfer is ours: its own checks the size alone and goes on without end while bytes trickle in.
"""

import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import get_hf_file_metadata, get_session
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from nanochat.common import UserError, atomic_write, base_dir, file_lock, fsync_folder, human_bytes

FORMAT = 1
MANIFEST = "manifest.json"
ATTEMPTS = 5
BACKOFF_S, MAX_PAUSE_S = 1.0, 300.0  # the hub counts its rate limits over five minutes
SILENCE_S = 30.0  # an answer must begin, and go on, within this
SLOWEST = 1024  # bytes per second over SILENCE_S
DEADLINE_S = 3600.0  # of one file with all its attempts
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}

T = TypeVar("T")


class Damaged(Exception):
    """What came is not what was announced; another attempt may bring it."""


class _Interrupted(Exception):
    """Not all came; what came is kept and another attempt may bring the rest."""


class _Stopped(Exception):
    """The user stopped the program."""


@dataclass(frozen=True)
class _Remote:
    size: int
    checksum: str  # sha256 or git's sha1 of a blob, by its length; "" where the server tells none
    commit: str | None


@dataclass(frozen=True)
class File:
    """A file to fetch; `check` looks at the whole file and returns facts for the manifest, or raises Damaged."""

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


class _Transfers:
    """What the threads of one call share: a stop flag, and a progress bar or, where that is no terminal, lines."""

    def __init__(self, stop: threading.Event, n_files: int, n_bytes: int, progress: bool):
        self.stop, self._lock = stop, threading.Lock()
        self._n_files, self.n_done = n_files, 0
        self._bar = tqdm(desc=f"fetching {n_files} files", total=n_bytes, unit="B", unit_scale=True, unit_divisor=1024,
                        disable=None if progress else True)
        self._lines = progress and self._bar.disable and n_files > 1

    def count(self, n_bytes: int) -> None:
        with self._lock:
            self._bar.update(n_bytes)

    def close(self) -> None:
        self._bar.close()

    def done(self, file: File) -> None:
        with self._lock:
            self.n_done += 1
            if self._lines:
                print(f"fetched {file.path}, {self.n_done} of {self._n_files} files", file=sys.stderr, flush=True)


# --- the manifest -----------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return what is known of the fetched files below `folder`: path -> bytes, sha256, commit, revision, and of
    parquet files rows and row_groups. Empty where there is no manifest of this version: then files are looked at anew.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest["files"] if isinstance(manifest, dict) and manifest.get("format") == FORMAT else {}


def enter(folder: Path, entries: dict[str, dict]) -> None:
    """Put entries, path -> facts, into the folder's manifest in place of what it knew; several processes may."""
    with file_lock(folder / f".{MANIFEST}.lock"):
        files = read_manifest(folder) | entries
        text = json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1)
        atomic_write(folder / MANIFEST, text + "\n")


def is_here(file: File, manifest: dict[str, dict]) -> bool:
    entry = manifest.get(file.path)
    return (entry is not None and entry["revision"] == file.revision and file.target.is_file()
            and file.target.stat().st_size == entry["bytes"])


# --- many files -------------------------------------------------------------------------------------


def download(files: list[File], *, workers: int = 8, progress: bool = True) -> None:
    """Bring the files, `workers` at once, each to its final name and into its folder's manifest.

    When one fails, those under way are finished and no other is begun; UserError names it.
    """
    stop = threading.Event()
    remotes = _in_parallel(partial(_look_up, stop=stop), files, workers, stop)
    _check_space(files, remotes)
    with closing(_Transfers(stop, len(files), sum(remote.size for remote in remotes), progress)) as shared:
        try:
            pairs = list(zip(files, remotes, strict=True))
            _in_parallel(lambda pair: _download_one(*pair, shared), pairs, workers, stop)
        except UserError as error:
            if len(files) == 1:
                raise
            raise UserError(f"{error}; {shared.n_done} of {len(files)} files came, the same command goes on from "
                            "there") from error


def _check_space(files: list[File], remotes: list[_Remote]) -> None:
    begun = sum(file.part.stat().st_size for file in files if file.part.is_file())
    needed, free = sum(remote.size for remote in remotes) - begun, shutil.disk_usage(base_dir()).free
    if needed > free:
        raise UserError(f"downloading {len(files)} files needs {human_bytes(needed)} in {files[0].folder}, "
                        f"{human_bytes(free)} are free")


def _in_parallel(action: Callable[[T], object], items: list[T], workers: int, stop: threading.Event) -> list:
    """Run `action` on each item; after a failure begin no other, let those under way end, then raise it."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
        except BaseException:  # Ctrl-C: those under way stop too, and their parts stay
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, UserError)):  # a bug of ours first
        if len(errors) > 1 and isinstance(error, UserError):
            raise UserError(f"{error} (and {len(errors) - 1} more failed)") from error
        raise error
    return [future.result() for future in futures]


# --- one file ---------------------------------------------------------------------------------------


def _look_up(file: File, stop: threading.Event) -> _Remote:
    """Ask for the file's size and checksum."""
    def ask() -> _Remote:
        metadata = get_hf_file_metadata(file.url, token=None if file.from_hub else False, timeout=SILENCE_S)
        if metadata.size is None or (file.from_hub and not (metadata.commit_hash and metadata.etag)):
            raise Damaged("the answer is not one of a hub, it lacks a size, a commit or an ETag")
        known = re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", metadata.etag or "")
        return _Remote(metadata.size, known[0] if known else "", metadata.commit_hash)

    return _persist(ask, file, stop, time.monotonic() + DEADLINE_S)


def _download_one(file: File, remote: _Remote, shared: _Transfers) -> None:
    """Give the file its final name and its entry in the manifest, once its bytes are all there and right."""
    deadline = time.monotonic() + DEADLINE_S
    file.target.parent.mkdir(parents=True, exist_ok=True)
    with _locked_part(file.part) as part:
        if is_here(file, read_manifest(file.folder)):  # another process was faster
            file.part.unlink()
            return shared.done(file)
        try:
            facts = _verified(file, remote, file.target)  # there, but not in the manifest: a kill came in between
            file.part.unlink()
        except (FileNotFoundError, Damaged):
            facts = _persist(partial(_attempt, file, remote, part, shared, deadline), file, shared.stop, deadline)
            os.fsync(part.fileno())
            os.replace(file.part, file.target)
            fsync_folder(file.target.parent)
        enter(file.folder, {file.path: facts})
        shared.done(file)


@contextmanager
def _locked_part(path: Path) -> Iterator[FileIO]:
    """Open the part for appending when nobody else has it; whoever had it may have renamed it or taken it away."""
    while True:
        with open(path, "ab", buffering=0) as part:  # so that nothing is left to write when the disk is full
            fcntl.flock(part, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(part.fileno()), path.stat())
            except FileNotFoundError:
                current = False
            if current:
                yield part
                return


def _attempt(file: File, remote: _Remote, part: FileIO, shared: _Transfers, deadline: float) -> dict:
    """Receive what the part lacks and verify the whole; what is damaged is dropped, what was only cut short stays."""
    try:
        _receive(file, remote, part, shared, deadline)
        return _verified(file, remote, file.part)
    except Damaged:
        _empty(part, shared)
        raise


def _receive(file: File, remote: _Remote, part: FileIO, shared: _Transfers, deadline: float) -> None:
    if part.tell() > remote.size or not remote.checksum:  # nothing else tells parts of two versions apart
        _empty(part, shared)
    start = part.tell()
    if start == remote.size:
        return
    resume = {"Range": f"bytes={start}-"} if start else {}
    with get_session().stream("GET", file.url, headers=file.headers | resume, timeout=SILENCE_S) as response:
        if response.status_code == 416:  # another attempt asks for no range
            raise Damaged("the server has less of it than it said")
        response.raise_for_status()
        missing = remote.size - start if response.status_code == 206 else remote.size
        announced = response.headers.get("Content-Length")
        if announced not in (None, str(missing)):  # another page; what is here is kept
            raise _Interrupted(f"the server sends {announced} bytes instead of {missing}")
        if response.status_code != 206:  # it ignored the range and sends the whole
            _empty(part, shared)
        last, received = time.monotonic(), 0
        for chunk in response.iter_raw():
            _write_all(part, chunk)
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
    if part.tell() < remote.size:
        raise _Interrupted(f"{part.tell()} of {remote.size} bytes came")


def _write_all(part: FileIO, chunk: bytes) -> None:
    while chunk:
        chunk = chunk[part.write(chunk):]


def _empty(part: FileIO, shared: _Transfers) -> None:
    shared.count(-part.tell())
    part.truncate(0)
    part.seek(0)


def _verified(file: File, remote: _Remote, path: Path) -> dict:
    """Return the manifest's entry for the content of `path`; Damaged when it is not what the server announced."""
    size = path.stat().st_size
    if size != remote.size:
        raise Damaged(f"it must have {remote.size} bytes, it has {size}")
    digest = sha256(path)
    found = digest if len(remote.checksum) != 40 else _git_sha1(path)
    if remote.checksum not in ("", found):
        raise Damaged(f"its checksum must be {remote.checksum}, it is {found}")
    return {"bytes": size, "sha256": digest, "revision": file.revision, "commit": remote.commit, **file.check(path)}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    """Return git's name of a blob with this content, the hub's ETag for small files."""
    header = f"blob {path.stat().st_size}\0".encode()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(header)).hexdigest()


# --- attempts ---------------------------------------------------------------------------------------


def _persist(action: Callable[[], T], file: File, stop: threading.Event, deadline: float) -> T:
    """Return action(), tried up to ATTEMPTS times with growing, jittered pauses; UserError says why it failed."""
    for attempt in itertools.count(1):
        try:
            return action()
        except (httpx2.HTTPError, httpx2.InvalidURL, Damaged, _Interrupted) as error:
            pause = _pause_after(error, attempt)
            if pause is None or attempt == ATTEMPTS or time.monotonic() + pause > deadline:
                tried = "" if pause is None else f" after {attempt} attempts"
                raise UserError(f"{file.url} could not be downloaded{tried}: {_reason(error)}") from error
        except OSError as error:  # the disk, or HF_HUB_OFFLINE
            raise UserError(f"{file.target} could not be downloaded: {error.strerror or error}") from error
        if stop.wait(pause):
            raise _Stopped


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
