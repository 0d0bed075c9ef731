"""Where training documents come from: this Python's own standard library, or a folder of the user's files.

A source has a `name` (the dataset's folder), an `identity()` (what the prepared shards are valid for, JSON-able) and
`documents(max_chars)`, an iterator of (split, text) with split "train" or "val", that ends with the document that
reaches `max_chars` characters. Reading is deterministic and repeatable.
"""

import ast
import gc
import hashlib
import json
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat.common import UserError

VAL_FRACTION = 0.05  # of a folder's documents: 1 % of a thousand would be ten, too few to measure anything
VAL_MAX_CHARS = 50_000_000  # about 10M tokens, as many as one validation of the largest preset reads


def capped(items: Iterable, max_chars: int | None, length: Callable = len) -> Iterator:
    """Yield items until their lengths sum to `max_chars`; all of them for None."""
    chars = 0
    for item in items:
        yield item
        chars += length(item)
        if max_chars is not None and chars >= max_chars:
            return


# --- builtin: the standard library ------------------------------------------------------------------

# Tests, vendored wheels and generated tables (codec maps, grammars, build paths) are not prose, and the last
# differ between machines with the same Python.
_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "lib-dynload", "lib2to3", "msilib",
    "pydoc_data", "site-packages", "test", "tests",
}
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")
_BUILTIN_RECIPE = 1  # raise when the text below changes: prepared data of another recipe is prepared again
# A row keeps only the start of a longer document, so documents are cut at paragraphs to fit the smallest preset's
# rows of 256 tokens with some to spare. At its 3.6 characters a token the loader crops 7 % of the text with 400
# characters, 14 % with 600, 28 % with 800 and 37 % with 1,600.
_DOCUMENT_CHARS = 600
# Python 3.11: docstrings 1.9M characters, the language reference in pydoc_data 0.4M, code without docstrings 8M.
# A small model learns more English from the first two, so code is thinned to one section in twelve, 0.7M. What is
# left after cropping, about 0.7M tokens, is more than the 250 steps of 2,048 that the smallest preset reads.
_CODE_STRIDE = 12
_VAL_FILES = 20  # one file in this many


class BuiltinSource:
    """The running Python's documentation and source; other Python versions give other text."""

    name = "builtin"
    skipped_kind = "files that are not Python of this version"

    def __init__(self, root: Path | None = None):
        self.root = Path(root or sysconfig.get_path("stdlib"))
        self.skipped = 0  # counted by documents()

    def identity(self) -> dict:
        return {"kind": "builtin", "python": platform.python_version(), "recipe": _BUILTIN_RECIPE}

    def documents(self, max_chars: int | None = None) -> Iterator[tuple[str, str]]:
        """Yield (split, text) in an order that mixes modules; a file's text is all in one split."""
        files = self._files()
        if not files:
            raise UserError(f"builtin data needs the source files of Python's standard library, "
                            f"found none in {self.root}")
        with _collector_off():
            documents = self._read(files)
        documents.sort(key=lambda document: _hash64(document[1]))
        yield from capped(documents, max_chars, lambda document: len(document[1]))

    def _read(self, files: list[Path]) -> list[tuple[str, str]]:
        self.skipped = 0
        seen: set[str] = set()
        documents = [("train", text) for text in _sections(_topics(self.root), seen)]
        for file in tqdm(files, desc="reading the standard library", unit="file", disable=None):
            relative = file.relative_to(self.root).as_posix()
            split = "val" if _hash64(relative) % _VAL_FILES == 0 else "train"
            try:
                documents += [(split, text) for text in _module_documents(file, seen)]
            except (SyntaxError, UnicodeDecodeError):  # a distribution's own addition, say in Python 2
                self.skipped += 1
        return documents

    def _files(self) -> list[Path]:
        found = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]  # prunes the walk
            found += [Path(folder, name) for name in names
                      if name.endswith(".py") and not _SKIPPED_FILES.fullmatch(name)]
        return sorted(found, key=Path.as_posix)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Syntax trees have no cycles, and looking for some in millions of new nodes doubles the time (4.4 s to 2.3)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _topics(root: Path) -> list[str]:
    """Return the language reference as paragraphs; it ships with `help()` as one dict literal."""
    file = root / "pydoc_data" / "topics.py"
    if not file.is_file():
        return []
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
            return [part for name in sorted(topics) for part in _paragraphs(topics[name])]
    return []


def _module_documents(file: Path, seen: set[str]) -> Iterator[str]:
    with tokenize.open(file) as stream:  # honours a coding line
        source = stream.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in strings
        tree = ast.parse(source)
    prose: list[str] = []
    docstring_lines: set[int] = set()
    _collect_docstrings(tree, file.stem, prose, docstring_lines)
    yield from _sections(prose, seen)
    lines = source.splitlines()
    code = "\n".join(line for number, line in enumerate(lines, 1) if number not in docstring_lines)
    yield from list(_sections(_paragraphs(code), seen))[::_CODE_STRIDE]


def _collect_docstrings(node: ast.AST, heading: str, prose: list[str], lines: set[int]) -> None:
    """Append heading and docstring of `node` and of what it defines, in source order, as paragraphs."""
    docstring = ast.get_docstring(node)
    if docstring:
        prose.append(heading)
        prose.extend(_paragraphs(docstring))
        lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            _collect_docstrings(child, f"class {child.name}", prose, lines)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            _collect_docstrings(child, f"{child.name}({ast.unparse(child.args)})", prose, lines)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _sections(paragraphs: list[str], seen: set[str]) -> Iterator[str]:
    """Join paragraphs into documents of about `_DOCUMENT_CHARS` characters.

    A paragraph of more than a line met before is dropped: the reference's chapters contain each other, files
    share their licence, and no text may be in both splits.
    """
    section: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if len(paragraph) > 80:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        if section and size + len(paragraph) > _DOCUMENT_CHARS:
            yield "\n\n".join(section)
            section, size = [], 0
        section.append(paragraph)
        size += len(paragraph) + 2
    if section:
        yield "\n\n".join(section)


# --- a folder of the user's files -------------------------------------------------------------------


class FolderSource:
    """All .parquet (column `text`), .jsonl ({"text": ...} per line) and .txt (one document) files under a folder."""

    skipped_kind = "documents without text"

    def __init__(self, folder: Path | str, *, skip_corrupt: bool = False):
        self.folder = Path(folder).expanduser().resolve()
        self.skip_corrupt = skip_corrupt
        slug = re.sub(r"[^a-z0-9]+", "-", self.folder.name.lower()).strip("-") or "data"
        self.name = f"{slug[:40]}-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8]}"
        self.skipped = 0  # null or nothing but white space, counted by documents()
        self.corrupt: dict[str, list[int]] = {}  # file -> row groups passed over for skip_corrupt

    def files(self) -> list[Path]:
        """Return the readable files in order of their relative path; names starting with a dot are no data."""
        return [path for path in self._all_files() if path.suffix.lower() in _READERS]

    def ignored(self) -> Counter:
        """Count the files of other kinds by suffix."""
        others = (path.suffix.lower() for path in self._all_files())
        return Counter(suffix or "no suffix" for suffix in others if suffix not in _READERS)

    def _all_files(self) -> list[Path]:
        if not self.folder.exists():
            raise UserError(f"data folder {self.folder} does not exist")
        if not self.folder.is_dir():
            raise UserError(f"data must be a folder of .parquet, .jsonl or .txt files, {self.folder} is a file")
        relative = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
        return [self.folder / path for path in sorted(visible, key=Path.as_posix)]

    def identity(self) -> dict:
        digest = hashlib.sha256()
        for path in self.files():
            stat = path.stat()
            digest.update(os.fsencode(path.relative_to(self.folder)))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        rule = {"skip_corrupt": True} if self.skip_corrupt else {}
        return {"kind": "folder", "path": str(self.folder), "fingerprint": digest.hexdigest(), **rule}

    def documents(self, max_chars: int | None = None) -> Iterator[tuple[str, str]]:
        files = self.files()
        if not files:
            raise UserError(f"data folder {self.folder} has no .parquet, .jsonl or .txt file")
        self.skipped, self.corrupt = 0, {}
        yield from split_by_hash(capped(self._texts(files), max_chars))

    def _texts(self, files: list[Path]) -> Iterator[str]:
        for file in tqdm(files, desc=f"reading {self.folder.name}", unit="file", disable=None):
            try:
                for text in self._read(file):
                    if text is None or not text.strip():
                        self.skipped += 1
                    else:
                        yield text
            except OSError as error:
                raise UserError(f"{file} cannot be read ({error.strerror})") from error

    def _read(self, file: Path) -> Iterator[str | None]:
        if self.skip_corrupt and file.suffix.lower() == ".parquet":
            corrupt = corrupt_row_groups(file)
            if corrupt:
                self.corrupt[str(file)] = corrupt
            return _read_parquet(file, corrupt)
        return _READERS[file.suffix.lower()](file)


def split_by_hash(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Assign each text to "train" or "val" by its own hash, so equal texts never land in both.

    The first text is train; of the others those with a hash in the lowest 5 % are val, up to VAL_MAX_CHARS, or,
    when there is none, the one with the lowest hash. Two different texts therefore always fill both splits.
    """
    first = lowest = None
    held: list[str] = []  # the texts with the lowest hash, until a validation text turns up
    val_keys: set[int] = set()
    val_chars = 0
    for text in texts:
        key = _hash64(text)
        first = key if first is None else first
        if key == first:
            yield "train", text
        elif key in val_keys or (key < VAL_FRACTION * 2**64 and val_chars < VAL_MAX_CHARS):
            val_keys.add(key)
            val_chars += len(text)
            yield "val", text
        elif val_keys or (lowest is not None and key > lowest):
            yield "train", text
        elif key == lowest:
            held.append(text)
        else:
            yield from (("train", other) for other in held)
            held, lowest = [text], key
    yield from (("train" if val_keys else "val", text) for text in held)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _read_txt(file: Path) -> Iterator[str]:
    text = _decode(file.read_bytes(), file)
    if "\0" in text:
        offset = len(text[: text.index("\0")].encode("utf-8"))
        raise UserError(f"{file} must be text, byte {offset} is NUL")
    yield text.removeprefix("\ufeff")


def _read_jsonl(file: Path) -> Iterator[str | None]:
    offset = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            text = _decode(line, file, offset).removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                yield _jsonl_text(text, f"{file}:{number}")


def _jsonl_text(line: str, where: str) -> str | None:
    rule = f'{where} must be a JSON object with a string "text"'
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{rule}, it is not JSON ({type(error).__name__})") from error
    if not isinstance(record, dict):
        raise UserError(f"{rule}, it is a {type(record).__name__}")
    if "text" not in record:
        raise UserError(f"{rule}, it has {', '.join(sorted(record)) or 'no keys'}")
    text = record["text"]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{rule}, its text is a {type(text).__name__}")
    if text is not None and not _is_encodable(text):
        raise UserError(f"{rule}, its text holds half of a surrogate pair")
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(data: bytes, file: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} must be UTF-8 text, byte {offset + error.start} is not "
                        f"(0x{data[error.start]:02x})") from error


def _read_parquet(file: Path, passed_over: Sequence[int] = ()) -> Iterator[str | None]:
    with open_parquet(file) as parquet:
        for group in range(parquet.num_row_groups):
            if group not in passed_over:
                yield from read_row_group(parquet, group, file)


@contextmanager
def open_parquet(file: Path) -> Iterator[pq.ParquetFile]:
    """Open a parquet file with strings in a column text; UserError for any other."""
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a whole parquet file ({_first_line(error)})") from error
    with parquet:
        schema = parquet.schema_arrow
        if "text" not in schema.names:
            raise UserError(f"{file} must have a column text, it has {', '.join(schema.names) or 'no columns'}")
        kind = schema.field("text").type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
            raise UserError(f"{file} must have strings in column text, it has {kind}")
        yield parquet


def read_row_group(parquet: pq.ParquetFile, group: int, file: Path) -> list[str | None]:
    """Return the texts of a row group; UserError names file and row group when they cannot be read."""
    try:
        return parquet.read_row_group(group, columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is corrupt in row group {group} ({_first_line(error)})") from error


def corrupt_row_groups(file: Path) -> list[int]:
    """Read the whole file and return the row groups that cannot be read."""
    corrupt = []
    with open_parquet(file) as parquet:
        for group in range(parquet.num_row_groups):
            try:
                read_row_group(parquet, group, file)
            except UserError:
                corrupt.append(group)
    return corrupt


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
