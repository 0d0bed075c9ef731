"""What isolation costs: sandboxed programs against a bare interpreter, and HumanEval verdicts per second.

    python -m bench.bench_sandbox                                  # overhead alone, half a minute
    python -m bench.bench_sandbox --humaneval test-00000-of-00001.parquet
    python -m pytest bench/bench_sandbox.py -s

Rounds of every row take turns. Overhead is the median of the differences to the bare interpreter's run of the same
round; it wants an idle machine. With HumanEval's file, every
canonical solution and every stub (`pass`) is judged by us and by running program and test in one interpreter; a
disagreement, or a canonical solution that fails, ends the run. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

from nanochat import sandbox
from nanochat.common import UserError, run_script
from nanochat.launcher import interpreter
from nanochat.sandbox import Limits
from nanochat.verdict import passes

TARGET_MS = 10.0  # over the bare interpreter
PROGRAM = "print('done')"
DISABLED = ("", "userns", "landlock", "landlock,seccomp,userns")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="rounds of one program per row")
    parser.add_argument("--humaneval", type=Path, help="HumanEval's parquet file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="verdicts at once")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict:
    result = {"bench": "sandbox", "probe": sandbox.probe(), "overhead": _overhead(args.rounds)}
    if args.humaneval:
        result["humaneval"] = _humaneval(args.humaneval, args.workers)
    print(json.dumps(result))
    return result


# --- one program ------------------------------------------------------------------------------------


def _overhead(rounds: int) -> list[dict]:
    means = {disabled: sandbox._tried(disabled)[0] for disabled in DISABLED}  # which starts the launcher
    work = {"bare interpreter": _bare}
    for disabled, found in means.items():
        work[f"level {found.level}, without {disabled or 'nothing'}"] = lambda found=found: _sandboxed(found)
    figures = {name: [] for name in work}
    for _ in range(rounds):
        for name, run_one in work.items():
            figures[name].append(_timed(run_one))
    rows = []
    print(f"{'':<44} median ms  p95 ms  over bare ms")
    for name, taken in figures.items():
        over = [here - bare for here, bare in zip(taken, figures["bare interpreter"], strict=True)]
        row = {"row": name, "median_ms": statistics.median(taken), "p95_ms": statistics.quantiles(taken, n=20)[-1],
               "over_bare_ms": statistics.median(over)}
        rows.append(row)
        print(f"{name:<44} {row['median_ms']:>9.1f} {row['p95_ms']:>7.1f} {row['over_bare_ms']:>13.1f}")
    reached = rows[1]["over_bare_ms"] <= TARGET_MS
    print(f"target: at most {TARGET_MS:g} ms over the bare interpreter: {'met' if reached else 'NOT MET'}")
    return rows


def _timed(work) -> float:
    """Return milliseconds."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def _bare(program: str = PROGRAM) -> int:
    done = subprocess.run([interpreter(), "-I", "-S", "-X", "utf8", "-c", program], env={}, cwd="/",
                          capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode


def _sandboxed(means: sandbox.Means) -> None:
    with sandbox.Child(PROGRAM, means=means) as child:
        assert child.wait().stdout == "done\n"


# --- HumanEval --------------------------------------------------------------------------------------


def _humaneval(path: Path, workers: int) -> dict:
    try:
        problems = pq.read_table(path).to_pylist()
    except OSError as error:
        raise UserError(f"--humaneval must be HumanEval's parquet file, got {path} ({error})") from error
    result = {"problems": len(problems), "workers": workers}
    with ThreadPoolExecutor(workers) as pool:
        for kind, body in (("canonical", None), ("stub", "    pass\n")):
            started = time.perf_counter()
            verdicts = list(pool.map(lambda problem, body=body: _judged(problem, body), problems))
            seconds = time.perf_counter() - started
            plain = list(pool.map(lambda problem, body=body: _plainly(problem, body), problems))
            passed, agreed = sum(v.passed for v in verdicts), sum(v.passed == p for v, p in zip(verdicts, plain))
            result[kind] = {"passed": passed, "agree": agreed, "forgeable": sum(v.forgeable for v in verdicts),
                            "seconds": seconds}
            print(f"{kind}: {passed} of {len(problems)} pass, {agreed} as run plainly, "
                  f"{result[kind]['forgeable']} forgeable; {seconds:.1f} s with {workers} workers, "
                  f"{1e3 * seconds * workers / len(problems):.0f} ms each")
            for problem, verdict, plainly in zip(problems, verdicts, plain, strict=True):
                if verdict.passed != plainly:
                    print(f"  {problem['task_id']}: {verdict.reason}, plainly {'passes' if plainly else 'fails'}")
            assert agreed == len(problems) and passed == (0 if body else len(problems)), "see above"
    return result


def _judged(problem: dict, body: str | None):
    return passes(problem["prompt"], problem["prompt"] + (body or problem["canonical_solution"]), problem["test"],
                  problem["entry_point"], limits=Limits(seconds=20, cpu_seconds=20))


def _plainly(problem: dict, body: str | None) -> bool:
    program = problem["prompt"] + (body or problem["canonical_solution"])
    return _bare(f"{program}\n{problem['test']}\ncheck({problem['entry_point']})\n") == 0


def bench_sandbox():
    """For `pytest bench/`: the overhead, held to the target."""
    assert main(parse_args([]))["overhead"][1]["over_bare_ms"] <= TARGET_MS, "see the table"


if __name__ == "__main__":
    run_script(parse_args, main)
