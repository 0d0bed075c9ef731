"""Conversations of your own from a JSONL file, written json:PATH in a mixture.

A line is a conversation: a list of messages {"role": ..., "content": ...}, or {"messages": [...]} around it.
"""

import json
from pathlib import Path

from nanochat.common import UserError
from nanochat.tasks.smoltalk import Dialogues
from nanochat.tokenizer import check_conversation

PREFIX = "json:"


class Conversations(Dialogues):
    """A file's conversations in its order, at most the first `size`; blank lines are skipped.

    The file has no splits: it is the same conversations for training and for validation.
    """

    def __init__(self, path: str, size: int | None = None):
        self.name = PREFIX + path
        try:
            lines = Path(path).expanduser().read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{path} must be a readable file of conversations ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            try:
                _parse(line)
            except (UserError, ValueError) as error:
                raise UserError(f"{path} line {number}: {error}") from error
        self._lines = [line for line in lines if line.strip()][:size]
        if not self._lines:
            raise UserError(f"{path} must have at least one conversation, it has none")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, no {index}")
        return _parse(self._lines[index])


def _parse(line: bytes) -> dict | None:
    if not line.strip():
        return None
    value = json.loads(line)
    conversation = check_conversation({"messages": value} if isinstance(value, list) else value)
    if conversation["messages"][-1]["role"] != "assistant":
        raise UserError("a conversation to train on must end with the assistant, "
                        f"this one ends with the {conversation['messages'][-1]['role']}")
    return conversation
