"""Ranges of command-line numbers as argparse types: a value outside ends the program with the rule and the value."""

import argparse
import math
from collections.abc import Callable


def _ranged(kind: type, rule: str, accept: Callable) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


positive_int = _ranged(int, "a whole number of at least 1", lambda n: n >= 1)
positive_int_or_off = _ranged(int, "a whole number of at least 1, or -1", lambda n: n >= 1 or n == -1)
count = _ranged(int, "a whole number of at least 0", lambda n: n >= 0)
seed = _ranged(int, "a whole number from 0 to 2^32 - 1", lambda n: 0 <= n < 2**32)  # numpy's RandomState takes 32 bits
positive_float = _ranged(float, "a number above 0", lambda x: x > 0)
rate = _ranged(float, "a number of at least 0", lambda x: x >= 0)
fraction = _ranged(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
