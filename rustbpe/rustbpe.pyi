"""Byte-pair encoding: exact training, encoding, decoding, files.

Ids are 0..255 for the bytes, 256.. for the merges in the order learned, then the special tokens. A mistake in a value
is a ValueError, in a type a TypeError, each with one sentence that names the item; files that cannot be written or read
are an OSError. Text must be free of lone surrogates. Everything heavy runs with the GIL released; no thread outlives a
call.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np

PATTERN: str
"""nanochat's split pattern: cl100k's with digits in ones and twos."""
GPT4_PATTERN: str
"""The same with digits in up to threes."""
MAX_FILE_BYTES: int
"""A larger tokenizer file is refused."""
__build__: dict[str, str]
"""version, profile ("release" or "debug") and unicode (the version of the tables of the splitter)."""

def split(text: str, pattern: str = ...) -> list[str]:
    """Return the pieces that `pattern` cuts `text` into; joined they are `text`.

    PATTERN, GPT4_PATTERN and their like with {1} digit are cut by hand, in linear time whatever the text. Any other
    pattern is run by the crate fancy-regex; what no match covers is a piece of its own, and where the engine gives up
    (its limits on backtracking) a ValueError says so.
    """

class Tokenizer:
    """A vocabulary. Immutable but for `train_from_iterator`; safe to share between threads, after fork, and to pickle.

    Tokenizers are equal when their fingerprints are. `Tokenizer()` has the 256 bytes, GPT4_PATTERN, no special tokens.
    """

    def __init__(self) -> None: ...
    @staticmethod
    def train(
        texts: Iterable[Any], vocab_size: int, specials: Sequence[str] = ..., *, pattern: str = ...,
        num_threads: int | None = None, memory_limit: int | None = None, spill_dir: str | PathLike[str] | None = None,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` ids, those of `specials` included.

        texts: an iterable of str or of Arrow string arrays, or one object with __arrow_c_stream__ or __arrow_c_array__
        (utf8, large_utf8, string_view; nulls are refused). The most frequent adjacent pair is merged, ties by smaller
        left, then smaller right id; the result depends neither on order, threads, memory_limit nor Arrow or str. Fewer
        merges than asked for, because no pair is left, are a UserWarning. Ctrl-C stops the training.

        num_threads: default all processors of the process; 1 starts none.
        memory_limit: bytes for the tables that count pieces. Beyond it they are written, sorted, to files without a
        name in spill_dir (default: the system's temporary directory), which are merged at the end. Not bounded by it: a
        batch of texts (16 MiB, or one Arrow array), a single piece beyond 4 KiB, and the merging, which holds about 40
        bytes for each byte of the different pieces.
        progress(phase, done, total) hears of "count" in bytes (total 0 while unknown), then of "merge" in merges, at
        most ten times a second; what it raises ends the training.
        """
    def train_from_iterator(
        self, iterator: Iterable[str], vocab_size: int, buffer_size: int = 8192, pattern: str | None = None
    ) -> None:
        """As rustbpe 0.1.0: learn anew and become the result. Default pattern: GPT4_PATTERN; buffer_size is ignored."""
    @property
    def report(self) -> dict[str, Any] | None:
        """What the training did; None if not trained but loaded.

        documents, bytes, unique_pieces, merges, asked_merges, spilled_runs, and seconds, of the wall clock:
        read (the iterable, UTF-8 checks), split and count (one interval, in which every thread does both in turn,
        divided as the threads' own time was; count includes adding up the threads' tables and merging runs), init
        (laying out the pieces, counting pairs), merge.
        """
    @staticmethod
    def from_bytes(data: bytes) -> Tokenizer:
        """Read what `to_bytes` wrote; anything else is a ValueError, found within bounds of time and memory."""
    def to_bytes(self) -> bytes:
        """Return the content of the tokenizer's file: text with a checksum, format version 1."""
    @property
    def fingerprint(self) -> str:
        """The sha256 of vocabulary, pattern and special tokens, in hexadecimal."""
    @property
    def vocab_size(self) -> int:
        """All ids, those of special tokens included."""
    @property
    def specials(self) -> list[str]:
        """The special tokens, in the order of their ids, which are the last ones."""
    @property
    def merges(self) -> list[tuple[int, int]]:
        """The merges in the order learned: merge i makes id 256 + i."""
    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into pieces."""
    def get_pattern(self) -> str:
        """As rustbpe 0.1.0: `pattern`."""
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """As rustbpe 0.1.0: the bytes and the id of every ordinary token."""
    def encode(
        self, text: str, *, allowed_special: Literal["all"] | Collection[str] = (),
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        """Return the ids of `text`, with tiktoken's rules for special tokens.

        Text that holds one of disallowed_special ("all": every special token that is not allowed) is a ValueError.
        Those of allowed_special become their ids, the leftmost first, of several that begin there the longest. The
        rest is ordinary text.
        """
    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of `text`, never a special one."""
    def encode_to_numpy(self, text: str, dtype: str = "uint32") -> np.ndarray:
        """Return the ordinary ids as uint32 or uint16 (n,); uint16 is refused if an id of the vocabulary is beyond."""
    def encode_batch(self, texts: Iterable[Any], *, num_threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the ordinary ids of many texts, uint32 (total,), and offsets, int64 (texts + 1,).

        Text i has ids[offsets[i]:offsets[i + 1]]. `texts` as for `train`. Threads share the work by bytes; long texts
        are cut between them where that changes nothing.
        """
    def batch_encode(self, texts: Iterable[Any]) -> list[list[int]]:
        """As rustbpe 0.1.0: the ordinary ids of many texts."""
    def encode_into(
        self, row: Any, text: str, *, start: int = 0, prepend: Iterable[int] = (), append: Iterable[int] = ()
    ) -> int:
        """Write prepend, the ordinary ids of `text` and append to row[start:]; return where they end.

        row: a writable contiguous 1-D buffer of uint16, uint32, int32 or int64. If they do not fit, a ValueError, and
        nothing is written.
        """
    def count(self, text: str) -> int:
        """Return how many ordinary ids `text` has."""
    def encode_bytes(self, data: bytes) -> list[int]:
        """Return ordinary ids of any bytes, which `decode_bytes` gives back: valid UTF-8 is cut as text, each invalid
        sequence is a piece of its own."""
    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of ids: a list, an array of integers, a tensor, any iterable; `errors` as bytes.decode."""
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; a special token gives its name."""
    def decode_batch(self, batch: Any, errors: str = "replace", num_threads: int | None = None) -> list[str]:
        """Return the texts of an iterable of id lists or arrays, or of a tuple (ids, offsets) as of `encode_batch`."""
    def decode_single_token_bytes(self, id: int) -> bytes:
        """Return the bytes of one id."""
    def token_bytes(self) -> np.ndarray:
        """Return int32 (vocab_size,): the bytes of text each id stands for, 0 for special tokens."""
    def to_tiktoken(self, name: str = "rustbpe") -> dict[str, Any]:
        """Return the keyword arguments of tiktoken.Encoding."""
    def to_tiktoken_file(self) -> bytes:
        """Return a .tiktoken file: a line with the bytes in base64 and the id of every ordinary token."""
    def to_huggingface(self) -> str:
        """Return a tokenizer.json for the library tokenizers, which finds special tokens in any text."""
    def __reduce__(self) -> tuple[Any, tuple[bytes]]: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

class StreamDecoder:
    """Ids -> text, one at a time: a character comes out when its last byte is in."""

    def __init__(self, tokenizer: Tokenizer, errors: str = "replace") -> None: ...
    def push(self, id: int) -> str:
        """Return the text that `id` completes; "" for a special token."""
    def flush(self) -> str:
        """Return what is left at the end, by `errors`: a character that never became whole."""
