"""Spelling: a word's letters one by one.

    user       Spell the word garden.
    assistant  g a r d e n

A model sees tokens, not letters, so it has to learn which letters each token holds. Half of the words are
made up of syllables: their tokens return in many words, which is what carries over to words never spelled
before. Letters are separated by spaces, because " a" is one chunk of the split pattern and nearly always one
token.
"""

import random

from nanochat.tasks.common import Answer, GeneratedTask, exchange, reference_text
from nanochat.tasks.words import COMMON, made_up

_QUESTIONS = ("Spell the word {}.", "How do you spell {}?", "Spell {}.", "Which letters are in the word {}?")


class Spelling(GeneratedTask):
    """Spell one word; a word belongs to one split whatever the phrasing."""

    name = "spelling"
    kind = "generative"

    def draw(self, rng: random.Random) -> str:
        return rng.choice(COMMON) if rng.random() < 0.5 else made_up(rng)

    def key(self, problem: str) -> str:
        return problem

    def render(self, problem: str, rng: random.Random) -> dict:
        return exchange(rng.choice(_QUESTIONS).format(problem), " ".join(problem))

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the text is exactly the letters in order; case and surrounding whitespace do not count."""
        return answer.text.strip().lower() == reference_text(conversation)
