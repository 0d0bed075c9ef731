"""ARC: grade-school science questions in an easy and a hard set, mostly of four choices. Hub: allenai/ai2_arc
(CC-BY-SA-4.0). A few problems have three or five choices or number them; they keep their own labels as letters.
"""

from nanochat.tasks.choice import LetterTask, multiple_choice
from nanochat.tasks.stored import StoredTask


def _files(folder: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"{folder}/{file}-00000-of-00001.parquet",)
            for split, file in (("train", "train"), ("val", "validation"), ("test", "test"))}


class ARCEasy(LetterTask, StoredTask):
    """2,251 questions for training, 570 for validation, 2,376 as test."""

    name = "ARC-Easy"
    repo = "allenai/ai2_arc"
    files = _files("ARC-Easy")
    columns = {"question": "text", "choices": {"text": ["text"], "label": ["text"]}, "answerKey": "text"}

    def conversation(self, row: dict) -> dict:
        return multiple_choice(row["question"], row["choices"]["label"], row["choices"]["text"], row["answerKey"])


class ARCChallenge(ARCEasy):
    """Questions that word statistics answer wrongly: 1,119 for training, 299 for validation, 1,172 as test."""

    name = "ARC-Challenge"
    files = _files("ARC-Challenge")
