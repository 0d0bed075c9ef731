"""Multiple choice by letter, in the prompt format of nanochat (Nov 2025): the letter stands after its choice.

Putting the letter last, with no space before it, makes the letter in the list the very token that the answer
has to be.
"""

import random
from collections.abc import Sequence

from nanochat.common import UserError
from nanochat.tasks.common import Answer, GeneratedTask, Task, exchange, reference_text
from nanochat.tasks.words import COMMON

LETTERS = ("A", "B", "C", "D")


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str], right: str) -> dict:
    """The conversation of a problem whose answer is the letter `right`; UserError when it has no such problem."""
    if len(letters) != len(choices) or right not in letters or not all(
            isinstance(text, str) for text in (question, *letters, *choices)):
        raise UserError(f"a problem must have a question, a letter for each choice and one of them as the answer, got "
                        f"{len(choices)} choices, letters {', '.join(map(str, letters))} and answer {right!r}")
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    prompt = f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
    return exchange(prompt, right) | {"letters": list(letters)}


class LetterTask(Task):
    """Problems whose answer is one letter of the conversation's "letters"."""

    kind = "categorical"
    baseline = 1 / len(LETTERS)

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the text is the right letter and nothing else."""
        return answer.text.strip() == reference_text(conversation)


class MultipleChoice(LetterTask, GeneratedTask):
    """Find a word in a list, the largest number, or the word with a given first letter."""

    name = "choice"

    def draw(self, rng: random.Random) -> tuple[str, list[str], str]:
        """(question, choices in order, the right choice)"""
        return rng.choice((_same_word, _largest, _first_letter))(rng)

    def key(self, problem) -> str:
        question, choices, _ = problem
        return f"{question}|{','.join(sorted(choices))}"

    def render(self, problem, rng: random.Random) -> dict:
        question, choices, right = problem
        return multiple_choice(question, LETTERS, choices, LETTERS[choices.index(right)])


def _same_word(rng: random.Random) -> tuple[str, list[str], str]:
    words = rng.sample(COMMON, len(LETTERS))
    right = rng.choice(words)
    return f"Which choice is the word {right}?", words, right


def _largest(rng: random.Random) -> tuple[str, list[str], str]:
    numbers = rng.sample(range(1000), len(LETTERS))
    return "Which number is the largest?", [str(n) for n in numbers], str(max(numbers))


def _first_letter(rng: random.Random) -> tuple[str, list[str], str]:
    right = rng.choice(COMMON)
    others = [word for word in COMMON if word[0] != right[0]]
    words = rng.sample(others, len(LETTERS) - 1) + [right]
    rng.shuffle(words)
    return f"Which word starts with the letter {right[0]}?", words, right
