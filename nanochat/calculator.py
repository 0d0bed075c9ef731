"""The calculator behind the `<|python_start|> ... <|python_end|>` tool.

Model output is untrusted, so nothing is ever handed to `eval`: the text must consist of a small alphabet, is
parsed to a syntax tree, and the tree is walked by a whitelist. Sizes are checked before anything is computed,
so no expression can be slow: no timer, no signal, no global state, safe in any thread. (Only powers grow
fast: 512 characters of the other operators make at most 1,700 bits.)

Agrees with nanochat (Nov 2025) on all 27,998 calculator spans of GSM8K, commas and float text included;
powers, which nanochat refuses, occur in none.
"""

import ast
import math
import operator
import re

MAX_SOURCE_CHARS = 512
MAX_NODES = 200
MAX_DEPTH = 64
MAX_LITERAL = 10**64
MAX_STRING_CHARS = 256
MAX_BITS = 4096
MAX_EXPONENT = 64
MAX_RESULT_CHARS = 64


class _Refused(Exception):
    """The expression is outside what the calculator computes."""


def _power(base: int | float, exponent: int | float) -> int | float:
    if abs(exponent) > MAX_EXPONENT or (isinstance(base, int) and base.bit_length() * abs(exponent) > MAX_BITS):
        raise _Refused
    return base**exponent


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}

# ASCII digits only (int() and the parser take others), no backslash (escapes), no name but the method
# `count`.
_ALPHABET = re.compile(r"""(?:[0-9+\-*/.() ]|'[^'\\\r\n\0]*'|"[^"\\\r\n\0]*"|\.count\()+""")


def calculate(expression: str) -> str | None:
    """Value of an arithmetic expression as text, or None for anything refused or undefined. Never raises.

    Accepts + - * / // **, parentheses, thousands commas (dropped), and "text".count("part") on literals.
    Refuses % as nanochat does, for a model means percent by it and would get a remainder; and whatever passes a
    limit above: 512 characters, 200 nodes, depth 64, literals of 64 digits, exponents beyond 64, integers of
    4,096 bits, result text of 64 characters; also division by zero, infinities, NaN and complex results.
    """
    if len(expression) > MAX_SOURCE_CHARS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    expression = expression.strip()
    if not _ALPHABET.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression, mode="eval")
        value = _Walk().value(tree.body, MAX_DEPTH)
    # ValueError: lone surrogates; MemoryError and RecursionError: the parser's own nesting limits.
    except (_Refused, SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None
    if isinstance(value, str):
        return None
    text = str(value)
    return text if len(text) <= MAX_RESULT_CHARS else None


class _Walk:
    """Evaluates one tree; counts nodes."""

    def __init__(self):
        self.nodes = 0

    def value(self, node: ast.expr, depth: int) -> int | float | str:
        self.nodes += 1
        if depth == 0 or self.nodes > MAX_NODES:
            raise _Refused
        match node:
            case ast.Constant(value=literal):
                return _checked_literal(literal)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                number = _checked_operand(self.value(operand, depth - 1))
                return -number if isinstance(node.op, ast.USub) else +number
            case ast.BinOp(op=op) if type(op) in _OPERATORS:
                left = _checked_operand(self.value(node.left, depth - 1))
                right = _checked_operand(self.value(node.right, depth - 1))
                return _checked_operand(_OPERATORS[type(op)](left, right))
            case ast.Call(func=ast.Attribute(attr="count", value=text), args=[part], keywords=[]):
                haystack, needle = self.value(text, depth - 1), self.value(part, depth - 1)
                if isinstance(haystack, str) and isinstance(needle, str):
                    return haystack.count(needle)
        raise _Refused


def _checked_literal(literal: object) -> int | float | str:
    kind = type(literal)
    if kind is int and literal < MAX_LITERAL:
        return literal
    if kind is float and math.isfinite(literal):
        return literal
    if kind is str and len(literal) <= MAX_STRING_CHARS:
        return literal
    raise _Refused


def _checked_operand(value: int | float | str) -> int | float:
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _Refused
