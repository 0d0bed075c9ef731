"""Arithmetic solved with the calculator: the model writes the expression, the tool computes it, the model
repeats the result.

    user       What is 37 plus 85?
    assistant  <|python_start|>37+85<|python_end|><|output_start|>122<|output_end|>The answer is 122.

The format is compact (about 30 tokens) and asks a small model for copying only. The split pattern cuts digits
into ones and twos from a number's first digit, and never joins them with the space, sign or bracket around
them: 345 is 34|5 in "plus 345?", in "+ 345." and in "12+345". So the tokens of a number in the expression are
those of the question, whatever merges the vocabulary holds, and the expression can do without spaces.
"""

import random
import re

from nanochat.calculator import calculate
from nanochat.tasks.common import Answer, GeneratedTask, exchange, reference_text

_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_QUESTIONS = ("What is {}?", "How much is {}?", "Compute {}.", "Calculate {}.")
# Only for two operands: forms that name the operation before the numbers.
_PAIR_QUESTIONS = {
    "+": ("Add {} and {}.", "What is the sum of {} and {}?"),
    "-": ("What is the difference of {} and {}?",),
    "*": ("Multiply {} by {}.", "What is the product of {} and {}?"),
}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Arithmetic(GeneratedTask):
    """Sums, differences and products of `terms` operands with up to `digits` digits.

    Problems with the same operands, in any order and with any operators, belong to the same split.
    """

    name = "arithmetic"
    kind = "generative"

    def __init__(self, split: str, size: int, seed: int = 0, *, terms: int = 2, digits: int = 3, operators="+-*"):
        super().__init__(split, size, seed)
        self.terms, self.digits, self.operators = terms, digits, operators

    def draw(self, rng: random.Random) -> tuple[list[int], list[str]]:
        """(operands, the operators between them)"""
        operands = [self._operand(rng) for _ in range(self.terms)]
        return operands, [rng.choice(self.operators) for _ in range(self.terms - 1)]

    def _operand(self, rng: random.Random) -> int:
        # Longer numbers are drawn more often, 1 : 2 : ... : digits, since there are more of them; uniform
        # lengths would make one problem in nine a pair of single digits, of which only 55 exist.
        length = rng.choices(range(1, self.digits + 1), weights=range(1, self.digits + 1))[0]
        return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)

    def key(self, problem) -> str:
        return ",".join(map(str, sorted(problem[0])))

    def render(self, problem, rng: random.Random) -> dict:
        operands, operators = problem
        expression = str(operands[0]) + "".join(f"{op}{n}" for op, n in zip(operators, operands[1:], strict=True))
        result = calculate(expression)
        parts = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"The answer is {result}."},
        ]
        return exchange(_question(operands, operators, rng), parts)

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the last number of the text is the result."""
        return last_number(answer.text) == last_number(reference_text(conversation))

    def expression_ok(self, conversation: dict, answer: Answer) -> bool:
        """Whether the first tool call computes the question's own operands and operators, in order."""
        expected = next(p["text"] for p in conversation["messages"][-1]["content"] if p["type"] == "python")
        return bool(answer.tool_calls) and answer.tool_calls[0][0].replace(" ", "") == expected


class Sums(Arithmetic):
    """Sums alone, of the same splits as Arithmetic: the figure that the tiny preset is judged by."""

    name, family = "sums", Arithmetic.name

    def __init__(self, split: str, size: int, seed: int = 0, *, terms: int = 2, digits: int = 3, operators="+"):
        super().__init__(split, size, seed, terms=terms, digits=digits, operators=operators)


class HardArithmetic(Arithmetic):
    """Three operands, for reinforcement learning: supervised training shows few of these, so there is room to
    improve."""

    name, family = "arithmetic-hard", Arithmetic.name

    def __init__(self, split: str, size: int, seed: int = 0, *, terms: int = 3, digits: int = 3, operators="+-*"):
        super().__init__(split, size, seed, terms=terms, digits=digits, operators=operators)


def _question(operands: list[int], operators: list[str], rng: random.Random) -> str:
    forms = _QUESTIONS + (_PAIR_QUESTIONS[operators[0]] if len(operators) == 1 else ())
    form = rng.choice(forms)
    if form in _QUESTIONS:
        symbols = [_WORDS[op] for op in operators] if rng.random() < 0.5 else operators
        return form.format(str(operands[0]) + "".join(f" {s} {n}" for s, n in zip(symbols, operands[1:], strict=True)))
    return form.format(*operands)


def last_number(text: str) -> str | None:
    """The last number in a text, as written; None when there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
