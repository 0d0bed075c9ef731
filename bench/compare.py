"""Compare two results files of one GPU name, or accept one: python -m bench.compare NEW.json [OLD.json] [--accept]

Without OLD.json the baseline of the GPU is taken. Exit code 1 when a row is slower by more than max(3 %, 3 MAD).
--accept makes the file the baseline, writes the GPU's entry of kernels/best.json, and README's speed table.
"""

import argparse
import json
from pathlib import Path

from bench import results
from kernels.registry import BEST_TABLE
from nanochat.common import UserError, atomic_write, run_script
from nanochat.environment import ROOT

BEGIN, END = "<!-- speed table: python -m bench.compare FILE --accept -->", "<!-- end of speed table -->"
NOT_MEASURED = "Not measured: no GPU has run `bash bench/qualify.sh` yet."


def speed_table(found: list[dict]) -> str:
    """Return README's table, training steps of every GPU that was measured; figures only from results files."""
    blocks = [_gpu_table(one) for one in found if any(key.startswith("train/") for key in one["rows"])]
    return "\n\n".join(blocks) if blocks else NOT_MEASURED


def _gpu_table(one: dict) -> str:
    rows = [row for row in one["rows"].values() if row["key"].startswith("train/")]
    about = rows[0]
    lines = [
        f"One {about['gpu']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}; "
        f"{about['tokens_per_step']:,} tokens per step, context {about['context']:,}. `compile` is eager ops, SDPA and "
        "torch.compile. MFU is of the dense bf16 peak, by nanochat's count of attention and by the causal one.", "",
        "| model | kernels | ms/step | tok/s | MFU | MFU causal | peak memory | against compile | commit |",
        "|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: r["depth"]):
        ratio = row["vs_compile"]
        against = "n/a" if ratio is None else f"{ratio['median']:.3f}x ({ratio['least']:.3f} to {ratio['most']:.3f})"
        memory = "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"
        cells = (f"d{row['depth']}", row["set"], f"{1e3 * row['median_s']:,.1f} ± {1e3 * row['mad_s']:.1f}",
                 f"{row['tokens_per_s']:,.0f}", _percent(row["mfu"]), _percent(row["mfu_causal"]), memory, against,
                 f"{row['commit'] or 'kernels ' + row['kernels_sha256']}{' + changes' if row['dirty'] else ''}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f} %"


def measured_gpus(folder: Path = results.BASELINES) -> list[dict]:
    """Return the baselines of all GPUs (compile.json beside them is another table)."""
    return [results.load(path) for path in sorted(folder.glob("*.json")) if path.name != "compile.json"]


def with_table(text: str, table: str) -> str:
    """Return `text` with what stands between the markers replaced; UserError without the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the text must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def summary(found: dict) -> str:
    """Return every row of a results file in a line, and its notes."""
    lines = [f"{key:<56} {1e3 * row['median_s']:>10.3f} ms +- {1e3 * row['mad_s']:.3f}"
             for key, row in found["rows"].items()]
    return "\n".join([*lines, *found["notes"]]) or "no rows"


def compare(new: dict, old: dict) -> tuple[list[str], list[str]]:
    """Return (a line per row that both have, a sentence per slowdown); UserError for different GPU names."""
    gpus = new["environment"]["gpu"], old["environment"]["gpu"]
    if gpus[0] != gpus[1]:
        raise UserError(f"rows of different GPUs are not compared: {gpus[0]} and {gpus[1]}")
    both = [(row, old["rows"][key]) for key, row in new["rows"].items() if key in old["rows"]]
    lines = [f"{row['key']:<56} {1e3 * base['median_s']:>10.3f} -> {1e3 * row['median_s']:>10.3f} ms "
             f"{100 * (row['median_s'] / base['median_s'] - 1):>+6.1f} %" for row, base in both]
    return lines, [fault for row, base in both if (fault := results.slowdown(row, base))]


def accept(new: dict, baselines: Path, best_table: Path, readme: Path) -> None:
    """Make `new` the baseline and derive from it what is kept in the tree."""
    run = results.Results(None, new["environment"])
    run.rows, run.notes = new["rows"], new["notes"]
    path = results.update_baseline(run, baselines)
    best = json.loads(best_table.read_text(encoding="utf-8"))
    best[new["environment"]["gpu"]] = results.best_backends(results.load(path)["rows"])
    atomic_write(best_table, json.dumps(best, indent=1, sort_keys=True) + "\n")
    atomic_write(readme, with_table(readme.read_text(encoding="utf-8"), speed_table(measured_gpus(baselines))))
    print(f"written: {path}, {best_table}, {readme}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?", help="default: the baseline of the GPU")
    parser.add_argument("--accept", action="store_true", help="keep the results in the tree instead of comparing")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    new = results.load(args.new)
    if args.accept:
        accept(new, results.BASELINES, BEST_TABLE, ROOT / "README.md")
        return
    old = args.old or results.baseline_path(new["environment"]["gpu"])
    if not old.exists():
        print(f"{summary(new)}\nno {old}: nothing was compared")
        return
    lines, slower = compare(new, results.load(old))
    print(*lines, *slower, sep="\n")
    if slower:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(parse_args, main)
