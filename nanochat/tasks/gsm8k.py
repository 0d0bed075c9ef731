"""GSM8K: grade-school word problems with worked solutions. Hub: openai/gsm8k (MIT).

A solution marks its arithmetic, "48/2 = <<48/2=24>>24 clips", and ends in "#### 72". A mark becomes a call of the
calculator with its result, which is how the model learns to use the tool:

    assistant  48/2 = <|python_start|>48/2<|python_end|><|output_start|>24<|output_end|>24 clips ... #### 72
"""

import re

from nanochat.common import UserError
from nanochat.tasks.common import Answer, exchange, reference_text
from nanochat.tasks.stored import StoredTask

_MARK = re.compile(r"<<([^>]+)>>")
_FINAL = re.compile(r"#### (-?[0-9.,]+)")


class GSM8K(StoredTask):
    """7,473 problems for training, 1,319 as test; the test file is also what validation reads, there is no third."""

    name = "GSM8K"
    repo = "openai/gsm8k"
    files = {"train": ("main/train-00000-of-00001.parquet",),
             **dict.fromkeys(("val", "test"), ("main/test-00000-of-00001.parquet",))}
    columns = {"question": "text", "answer": "text"}

    def conversation(self, row: dict) -> dict:
        if final_answer(row["answer"]) is None:
            raise UserError("a solution must end in #### and a number, this one has none")
        return exchange(row["question"], solution_parts(row["answer"]))

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the text's number after #### is the reference's, compared as text without thousands commas."""
        return final_answer(answer.text) == final_answer(reference_text(conversation))


def solution_parts(solution: str) -> list[dict]:
    """Cut a solution into parts of text, python and python_output; "<<a=b=c>>" has c as its result."""
    parts = []
    for number, piece in enumerate(_MARK.split(solution)):
        if number % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        else:
            expression, equals, result = piece.rpartition("=")
            parts += [{"type": "python", "text": expression if equals else piece},
                      {"type": "python_output", "text": result if equals else ""}]
    return parts


def final_answer(text: str) -> str | None:
    """The number after the first "#### ", without thousands commas; None when there is none."""
    found = _FINAL.search(text)
    return found[1].replace(",", "") if found else None
