"""Rows of one machine in a JSON file, baselines per GPU name, and what counts as slower.

A results file and a baseline are the same thing: {"environment": {...}, "rows": {key: row}, "notes": [...]}. It is
written whole after every row, so that a run that is cut keeps what it had.
"""

import json
import re
from pathlib import Path

from kernels.registry import BACKENDS
from nanochat.common import UserError, atomic_write

BASELINES = Path(__file__).with_name("baselines")
LEAST_SLOWDOWN = 0.03  # of the baseline's median
MADS = 3.0
MARGIN = 1.05  # `best` takes our kernel only where it beats every other backend by this
UNMEASURED_CHOICE = ("linear",)  # its fp8 backend computes something else: never a matter of speed alone


class Results:
    """The rows of a run, in memory and, with a path, on disk; rows already in the file are kept."""

    def __init__(self, path: Path | None, environment: dict):
        self.path, self.environment, self.rows, self.notes = path, environment, {}, []
        if path is not None and path.exists():
            found = load(path)
            if found["environment"].get("gpu") != environment.get("gpu"):
                raise UserError(f"{path} holds rows of {found['environment'].get('gpu')}, "
                                f"this is {environment.get('gpu')}")
            self.rows, self.notes = found["rows"], found["notes"]

    def add(self, row: dict) -> None:
        """Keep the row, with the machine's description in it, and write the file."""
        self.rows[row["key"]] = {**row, **self.environment}
        self.save()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            content = {"environment": self.environment, "rows": self.rows, "notes": self.notes}
            atomic_write(self.path, json.dumps(content, indent=1) + "\n")


def load(path: Path) -> dict:
    """Read a results file; UserError when it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be a results file that can be read ({error})") from error
    if not isinstance(found, dict) or not {"environment", "rows", "notes"} <= found.keys():
        raise UserError(f"{path} must hold environment, rows and notes")
    return found


# --- baselines ------------------------------------------------------------------------------------


def baseline_path(gpu: str, folder: Path = BASELINES) -> Path:
    """Return the baseline's file for a GPU name as torch gives it: an H200 never meets an H100's."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def baseline_rows(gpu: str, folder: Path = BASELINES) -> dict | None:
    """Return the baseline's rows for this GPU name, None when there is none."""
    path = baseline_path(gpu, folder)
    if not path.exists():
        return None
    found = load(path)
    return found["rows"] if found["environment"]["gpu"] == gpu else None


def update_baseline(results: Results, folder: Path = BASELINES) -> Path:
    """Write the rows of this run over those of the same key in the GPU's baseline; each row keeps its own commit."""
    path = baseline_path(results.environment["gpu"], folder)
    merged = Results(path, results.environment)
    merged.rows.update(results.rows)
    merged.notes = results.notes
    merged.save()
    return path


def slowdown(row: dict, base: dict | None) -> str | None:
    """Return a sentence when the row is slower than the baseline's by more than max(3 %, 3 MAD), else None."""
    if base is None:
        return None
    allowed = max(LEAST_SLOWDOWN, MADS * base["mad_s"] / base["median_s"])
    slower = row["median_s"] / base["median_s"] - 1
    if slower <= allowed:
        return None
    return (f"{row['key']}: {1e3 * row['median_s']:.4f} ms is {100 * slower:.1f} % slower than the baseline's "
            f"{1e3 * base['median_s']:.4f} ms, at most {100 * allowed:.1f} % is allowed")


# --- what is best ---------------------------------------------------------------------------------


def best_backends(rows: dict) -> dict[str, str]:
    """Return op -> fastest backend over the d20 rows, forward+backward where the op has it.

    Compared are the backends that were measured at every d20 size of the op, windows aside, which no preset of a model
    uses. Our own kernel must win by MARGIN.
    """
    seconds: dict[str, dict[str, dict]] = {}
    for row in rows.values():
        if not row["key"].startswith("kernel/") or row["op"] in UNMEASURED_CHOICE:
            continue
        if row["case"].startswith("d20") and "window" not in row["case"] and row["provider"] in BACKENDS[row["op"]]:
            cases = seconds.setdefault(row["op"], {}).setdefault(row["provider"], {})
            cases.setdefault(row["passes"], {})[row["case"]] = row["median_s"]
    return {op: choice for op, found in seconds.items() if (choice := _fastest(op, found))}


def _fastest(op: str, found: dict[str, dict]) -> str | None:
    passes = "forward+backward" if any("forward+backward" in p for p in found.values()) else "forward"
    cases = {case for by_passes in found.values() for case in by_passes.get(passes, {})}
    total = {name: sum(p[passes].values()) for name, p in found.items() if p.get(passes, {}).keys() == cases}
    ours = {name: s for name, s in total.items() if "triton" in BACKENDS[op][name].needs}
    others = {name: s for name, s in total.items() if name not in ours}
    if not others or len(total) < 2:
        return None  # one backend alone is no comparison
    own, other = (min(names, key=names.get, default=None) for names in (ours, others))
    return own if own and ours[own] * MARGIN <= others[other] else other
