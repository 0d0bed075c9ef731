"""What evaluations have in common: the judgement of an accuracy, and the log of what a model answered."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from nanochat.common import Runtime, UserError


def is_near_chance(accuracy: float, baseline: float, n: int) -> bool:
    """Whether an accuracy over n problems is no further from the accuracy of guessing than two standard errors.

    The error is the larger of the two: measured accuracies of 0 and 1, and a baseline of 0, have none of their own.
    """
    variance = max(p * (1 - p) for p in (accuracy, baseline)) / n
    return abs(accuracy - baseline) <= 2 * math.sqrt(variance)


class ResponseLog:
    """A JSONL file with a line per problem, in the order of the tasks and of their problems, whatever the ranks did.

    Raises UserError when the file exists, or cannot be written.
    """

    def __init__(self, path: Path, runtime: Runtime):
        self.path, self.runtime = path, runtime
        if runtime.is_main:
            try:
                path.open("x", encoding="utf-8").close()
            except FileExistsError:
                raise UserError(f"--save-responses must name a new file, {path} exists") from None
            except OSError as error:
                raise UserError(f"--save-responses must name a file that can be written, got {path} "
                                f"({error.strerror})") from error

    def add(self, rows: Sequence[dict]) -> None:
        """Append what all ranks know of a task; every rank has to call. Rows are ordered by their "index"."""
        parts = [rows]
        if self.runtime.world_size > 1:
            parts = [None] * self.runtime.world_size if self.runtime.is_main else None
            dist.gather_object(list(rows), parts)
        if self.runtime.is_main:
            together = sorted((row for part in parts for row in part), key=lambda row: row["index"])
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in together)
