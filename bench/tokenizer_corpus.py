"""Text for the tokenizer's tests and benches from what is on every machine that runs them: the .py, .md and .rst files
of the standard library and of the installed packages. No text twice: what two packages share counts once.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_CHARS = 10_000  # what the training recipe takes of one document


def roots() -> list[Path]:
    """Return the standard library's folder and those of installed packages, as this Python imports them."""
    packages = [Path(path) for path in sys.path if path.endswith("-packages")]
    return list(dict.fromkeys([Path(sysconfig.get_path("stdlib")), *packages]))


def documents(*suffixes: str, max_bytes: int | None = None) -> Iterator[str]:
    """Yield the first DOCUMENT_CHARS characters of every file with one of `suffixes` (default: .py, .md, .rst), by
    path, until `max_bytes` bytes have come; what is no UTF-8 and what came before is left out."""
    seen, size = set(), 0
    for path in (path for root in roots() for path in files(root, suffixes or (".py", ".md", ".rst"))):
        try:
            text = path.read_text(encoding="utf-8")[:DOCUMENT_CHARS]
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        yield text
        size += len(text.encode())
        if max_bytes is not None and size >= max_bytes:
            return


def files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below `root` in a fixed order; packages installed below it come with their own root."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.endswith("-packages"))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def sha256(texts: list[str]) -> str:
    """Return the digest of the texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
