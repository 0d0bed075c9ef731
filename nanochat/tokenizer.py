"""Text <-> ids: byte-pair encoding by our Rust extension, special tokens, chat rendering.

Ids are 0..255 for the bytes, then the merges in the order learned, then the nine special tokens. Content is always
encoded as ordinary text and special ids are placed by this file alone, so no user, tool or model text can become one.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from nanochat.common import UserError, atomic_write, base_dir

try:
    import rustbpe
except ImportError:  # not built, and not run from the checkout's root
    rustbpe = None

SPECIAL_TOKENS = (
    "<|bos|>",  # every document and every conversation starts with it
    "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the assistant calls the tool
    "<|output_start|>", "<|output_end|>",  # the tool answers
)
FILE_NAME = "tokenizer.bpe"
# the special tokens around a part of an assistant message, and whether the model learns to write the part
PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def _extension():
    """Return our extension's class. Unbuilt, `rustbpe` is the source folder seen as an empty namespace package, and
    the package index has a rustbpe of another make; only ours has __build__."""
    if not hasattr(rustbpe, "__build__"):
        raise UserError("the tokenizer's Rust extension rustbpe must be built, "
                        f"found {getattr(rustbpe, '__file__', None) or 'nothing'}: run `bash scripts/setup.sh`")
    return rustbpe.Tokenizer


def _checked(call: Callable, *args, **kwargs):
    """Call into the extension; its ValueError sentences become UserErrors."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        raise UserError(str(error)) from error


class Tokenizer:
    """A trained tokenizer; immutable, safe to share between threads.

    Attributes: vocab_size (special tokens included), bos_id, fingerprint (sha256 of vocabulary, split pattern and
    special tokens, in hexadecimal: equal exactly when every text gets equal ids).
    """

    def __init__(self, core: "rustbpe.Tokenizer"):
        if tuple(core.specials) != SPECIAL_TOKENS:
            raise UserError(f"a tokenizer must have the special tokens {' '.join(SPECIAL_TOKENS)}, "
                            f"this one has {' '.join(core.specials) or 'none'}: train it again")
        self._core = core
        self.vocab_size: int = core.vocab_size
        self.fingerprint: str = core.fingerprint
        first = self.vocab_size - len(SPECIAL_TOKENS)
        self._special_ids = {name: first + index for index, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id: int = self._special_ids["<|bos|>"]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: Callable[[str, int, int], None] | None = None,
              num_threads: int | None = None, memory_limit: int | None = None) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids, special tokens included, from an iterable of texts.

        `progress(phase, done, total)` hears of "count" (bytes, total 0 while unknown) and "merge" (merges), at most
        ten times a second. memory_limit: bytes for the counts of pieces, beyond which they go to temporary files; the
        vocabulary is the same. Warns when the texts have too few different pairs to fill the vocabulary.
        """
        return cls(_checked(_extension().train, texts, vocab_size, SPECIAL_TOKENS, num_threads=num_threads,
                            memory_limit=memory_limit, progress=progress))

    @classmethod
    def from_merges(cls, merges: Iterable[tuple[int, int]], pattern: str) -> "Tokenizer":
        """Build from merges, merge i joining two earlier ids to 256 + i, with our special tokens after them.

        UserError when training cannot have given them, or `pattern` is neither nanochat's nor GPT-4's: any other would
        be run by another engine of regular expressions than the one it was meant for.
        """
        extension = _extension()
        if pattern not in (rustbpe.PATTERN, rustbpe.GPT4_PATTERN):
            raise UserError(f"a tokenizer's split pattern must be nanochat's or GPT-4's, got {_short(pattern)}")
        lines = [f"{left} {right}" for left, right in merges]
        text = "\n".join(["rustbpe tokenizer 1", f"unicode {rustbpe.__build__['unicode']}", f"pattern {pattern}",
                          f"specials {len(SPECIAL_TOKENS)}", *SPECIAL_TOKENS, f"merges {len(lines)}", *lines, ""])
        checksum = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return cls(_checked(extension.from_bytes, f"{text}sha256 {checksum}\n".encode()))

    @property
    def training_report(self) -> dict | None:
        """Return documents, bytes, unique_pieces, merges, asked_merges, spilled_runs and seconds by phase of the
        training that made this object; None when it was read from a file."""
        return self._core.report

    @classmethod
    def load(cls, folder: Path | None = None) -> "Tokenizer":
        """Read `folder`/tokenizer.bpe (default folder: base_dir()/"tokenizer"); UserError names the file."""
        extension = _extension()
        path = _file(folder)
        try:
            with path.open("rb") as file:
                data = file.read(rustbpe.MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise UserError(f"there is no tokenizer at {path}: run `python -m scripts.tok_train` first") from None
        except OSError as error:
            raise UserError(f"{path} must be a readable file ({error.strerror})") from error
        try:
            return cls(extension.from_bytes(data))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, folder: Path | None = None) -> Path:
        """Write `folder`/tokenizer.bpe in one step and return its path."""
        path = _file(folder)
        atomic_write(path, self._core.to_bytes())
        return path

    def to_huggingface(self) -> str:
        """Return the text of a tokenizer.json, which `tokenizers` reads; special tokens in a text become their ids."""
        return self._core.to_huggingface()

    def to_tiktoken(self) -> dict:
        """Return the keyword arguments of tiktoken.Encoding; its encode_ordinary gives the ids of `encode`."""
        return self._core.to_tiktoken("nanochat")

    def to_tiktoken_file(self) -> bytes:
        """Return the ranks in tiktoken's text format, without special tokens."""
        return self._core.to_tiktoken_file()

    # --- ids ---------------------------------------------------------------------------------------

    def special_id(self, name: str) -> int:
        """Return the id of a special token."""
        if name not in self._special_ids:
            raise UserError(f"a special token must be one of {' '.join(SPECIAL_TOKENS)}, got {name!r}")
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; the names of special tokens in it are ordinary text."""
        return _checked(self._core.encode_ordinary, text)

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Encode many texts at once with the GIL released, on all processors unless `num_threads` says otherwise.

        Returns ids uint32 (total,) and offsets int64 (len(texts) + 1,): text i is ids[offsets[i]:offsets[i + 1]].
        """
        return _checked(self._core.encode_batch, texts, num_threads=num_threads)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids` (any iterable, array or tensor of ints); a special token gives its name."""
        return _checked(self._core.decode_bytes, ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return _checked(self._core.decode, ids)

    def token_bytes(self) -> np.ndarray:
        """Return int32 (vocab_size,): how many bytes of text each id stands for, 0 for special tokens."""
        return self._core.token_bytes()

    def stream_decoder(self) -> "StreamDecoder":
        """Return a decoder that turns ids into text one at a time."""
        return StreamDecoder(self)

    # --- conversations -----------------------------------------------------------------------------

    def render_conversation(self, conversation: dict, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """Return (ids, mask) of a whole conversation, cut to `max_tokens`; mask 1 marks what the model learns to write.

        {"messages": [{"role": ..., "content": ...}, ...]}: an optional system message, then user and assistant in
        turns. Content is a str; an assistant's may be a list of parts {"type": "text" | "python" | "python_output",
        "text": str}. The system message joins the first user message with a blank line between.
        """
        ids, mask = [self.bos_id], [0]

        def add(new: list[int], learned: int) -> None:
            ids.extend(new)
            mask.extend([learned] * len(new))

        for role, content in _turns(conversation):
            start, end = (self.special_id(f"<|{role}_{edge}|>") for edge in ("start", "end"))
            add([start], 0)
            for kind, text in content:
                opening, closing, learned = PARTS[kind]
                learned = learned if role == "assistant" else 0
                inner = self.encode(text)
                add(inner if opening is None else [self.special_id(opening), *inner, self.special_id(closing)], learned)
            add([end], int(role == "assistant"))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Return the ids that ask for the next assistant message; a last one that is already there is dropped."""
        messages = _messages(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({"messages": messages})
        return [*ids, self.special_id("<|assistant_start|>")]


class StreamDecoder:
    """Ids -> text, one at a time: a character comes out whole, when its last byte is in; special tokens give ""."""

    def __init__(self, tokenizer: Tokenizer):
        self._core = rustbpe.StreamDecoder(tokenizer._core)

    def push(self, id: int) -> str:
        """Return the text that `id` completes."""
        return _checked(self._core.push, id)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that never became whole, else ""."""
        return _checked(self._core.flush)


def _file(folder: Path | None) -> Path:
    return (Path(folder) if folder is not None else base_dir() / "tokenizer") / FILE_NAME


def check_conversation(conversation: dict) -> dict:
    """Return the conversation; UserError when it cannot be rendered."""
    for _ in _turns(conversation):
        pass
    return conversation


def _messages(conversation: dict) -> list[dict]:
    """Return the messages, each checked to be a dict with a known role."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation must be {"messages": [...]} with at least one message, '
                        f"got {_short(conversation)}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"message {index} must have the role user, assistant or system, got {_short(message)}")
    return messages


def _turns(conversation: dict) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """Yield (role, [(part type, text), ...]) of user and assistant in turns, the system message merged."""
    messages = _messages(conversation)
    system = ""
    first = 0
    if messages[0]["role"] == "system":
        first = 1
        system = _text(messages[0], 0) + "\n\n"
        if len(messages) == 1:
            raise UserError("a system message must be followed by a user message, the conversation ends there")
    for index, message in enumerate(messages[first:], start=first):
        role = "assistant" if (index - first) % 2 else "user"
        if message["role"] != role:
            raise UserError(f"message {index} must be from the {role} (user and assistant take turns, a system "
                            f"message comes first), got {message['role']}")
        if role == "user":
            yield role, [("text", system + _text(message, index))]
            system = ""
        else:
            yield role, _parts(message, index)


def _text(message: dict, index: int) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(f"the content of {message['role']} message {index} must be text, got {_short(content)}")
    return content


def _parts(message: dict, index: int) -> list[tuple[str, str]]:
    content = message.get("content")
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        raise UserError(f"the content of assistant message {index} must be text or a list of parts, "
                        f"got {_short(content)}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in [*PARTS] or not isinstance(part.get("text"), str):
            raise UserError(f"a part of assistant message {index} must be {{\"type\": {' | '.join(PARTS)}, "
                            f'"text": ...}}, got {_short(part)}')
    return [(part["type"], part["text"]) for part in content]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
