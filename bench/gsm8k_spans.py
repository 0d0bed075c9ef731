"""Does the calculator give nanochat's result on every calculator span of GSM8K? Counts them and prints what differs.

    python -m bench.gsm8k_spans main/train-00000-of-00001.parquet main/test-00000-of-00001.parquet

The files are those of the hub's openai/gsm8k; without any they are fetched. nanochat (Nov 2025) dropped commas, refused
other characters than digits and "*+-/.() " and the power "**", and handed the rest to Python's eval.
"""

import argparse
import re
import warnings
from pathlib import Path

import pyarrow.parquet as pq

from nanochat.calculator import calculate
from nanochat.common import UserError, run_script
from nanochat.hub import fetch_all
from nanochat.tasks import STORED_TASKS
from nanochat.tasks.gsm8k import solution_parts

_ALPHABET = re.compile(r"[0-9*+\-/.() ]*")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="GSM8K's parquet files; default: from the hub")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    gsm8k = STORED_TASKS["GSM8K"]
    files = args.files or fetch_all([(gsm8k.repo, path) for split in ("train", "test") for path in gsm8k.files[split]])
    spans = [part["text"] for file in files for solution in pq.read_table(file)["answer"].to_pylist()
             for part in solution_parts(solution) if part["type"] == "python"]
    different = [(span, calculate(span), by_eval(span)) for span in spans if calculate(span) != by_eval(span)]
    refused = sum(calculate(span) is None for span in spans)
    print(f"{len(spans):,} spans, {len(set(spans)):,} different ones: {len(spans) - len(different):,} equal nanochat's "
          f"result, {refused:,} refused")
    if different:
        raise UserError(f"the calculator must give nanochat's result, {len(different)} spans differ: {different[:5]}")


def by_eval(expression: str) -> str | None:
    """nanochat's result as text, None where it refused or failed."""
    expression = expression.replace(",", "")
    if not _ALPHABET.fullmatch(expression) or "**" in expression:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return str(eval(expression, {"__builtins__": {}}))  # of a data set's own text, never of a model's
    except Exception:
        return None


if __name__ == "__main__":
    run_script(parse_args, main)
