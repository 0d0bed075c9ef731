"""MMLU: exam questions on 57 subjects, four choices each. Hub: cais/mmlu (MIT).

Mid-training reads `auxiliary_train`, questions of other multiple-choice exams, whose columns sit inside one
struct column named `train`. Validation reads the test file, of which nanochat (Nov 2025) takes the first 5,200.
"""

from nanochat.common import UserError
from nanochat.tasks.choice import LETTERS, LetterTask, multiple_choice
from nanochat.tasks.stored import StoredTask

_QUESTION = {"question": "text", "choices": ["text"], "answer": "integer"}


class MMLU(LetterTask, StoredTask):
    """99,842 auxiliary questions for training, 14,042 as test."""

    name = "MMLU"
    repo = "cais/mmlu"
    files = {"train": ("auxiliary_train/train-00000-of-00001.parquet",),
             **dict.fromkeys(("val", "test"), ("all/test-00000-of-00001.parquet",))}

    def __init__(self, split: str, size: int | None = None):
        self.columns = {"train": _QUESTION} if split == "train" else _QUESTION
        super().__init__(split, size)

    def conversation(self, row: dict) -> dict:
        row = row.get("train", row)
        if row["answer"] not in range(len(LETTERS)):
            raise UserError(f"the answer of a problem must be from 0 to {len(LETTERS) - 1}, got {row['answer']}")
        return multiple_choice(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
