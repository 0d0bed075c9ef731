"""Every op x backend x {d12, d20, d26} on the GPU; without one, what the kernels compile to.

    .venv/bin/python -m pytest bench/bench_kernels.py
    .venv/bin/python -m pytest bench/bench_kernels.py --op attention --size d20 --rows attention.json
    .venv/bin/python -m pytest bench/bench_kernels.py --update-baseline

The rows come from the registry, so a new backend is measured with no edit here. A backend that is less exact than
kernels/check.py allows is not timed, and its row fails.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch

from bench import harness
from kernels.device import HAS_TRITON
from kernels.registry import BACKENDS
from nanochat.environment import ROOT

PAUSE_S = 0.3  # between rows: heat of the one before must not slow the next


def pytest_generate_tests(metafunc):
    if "bench" in metafunc.fixturenames:
        option = metafunc.config.option
        rows = harness.benches(option.op, option.size or harness.SIZES, option.provider)
        metafunc.parametrize("bench", rows, ids=lambda b: f"{b.op}-{b.provider}-{b.case}-{b.passes}")


@pytest.mark.benchmark(timer=harness.CLOCK.read)
def bench_kernel(bench, benchmark, keep, device):
    reason = harness.why_skipped(bench, device)
    if reason:
        pytest.skip(reason)
    compared = "is the reference" if bench.provider == "eager" else "inductor's, not compared"
    if bench.provider in BACKENDS[bench.op] and bench.provider != "eager":
        fault, compared = harness.parity_fault(bench.op, bench.provider, bench.case, device)
        if fault:
            pytest.fail(f"not timed, it fails parity: {fault}", pytrace=False)
    out_of_memory = None
    try:
        row = measure(bench, benchmark, device)
    except torch.OutOfMemoryError as error:
        out_of_memory = str(error).split(". ")[0]
    harness.free_memory()
    if out_of_memory:
        pytest.skip(f"out of memory: {out_of_memory}")
    keep({**row, "parity": compared})


def measure(bench, benchmark, device) -> dict:
    """Warm up, time, and return the row."""
    timer = harness.timer_for(device)
    call = harness.Call(bench, device)
    timer(call)  # compiles
    used = harness.peak_bytes(call, device)
    rounds = harness.rounds_for(statistics.median(timer(call) for _ in range(3)))
    time.sleep(PAUSE_S if device.type == "cuda" else 0)
    benchmark.pedantic(harness.CLOCK.timed, args=(timer, call), rounds=rounds)
    return {**harness.figures(bench, call, benchmark.stats.stats.data, device), "peak_bytes": used}


def bench_compile_table(request, record_property, benchmark, device):
    """Without a GPU: registers, spills, shared memory and instructions of every kernel, for sm_90 and sm_80."""
    if device.type == "cuda":
        pytest.skip("there is a GPU: times say more (python -m kernels.compile_table prints the figures)")
    if not HAS_TRITON:
        pytest.skip("package triton is not importable")
    ops = [word for op in request.config.option.op for word in ("--op", op)]
    rows, table = benchmark.pedantic(compile_table, args=(ops,))
    assert rows, f"no op has a Triton kernel among {request.config.option.op}"
    benchmark.extra_info["compiled"] = rows
    record_property("compiled", table)


def compile_table(arguments: list[str]) -> tuple[list[dict], str]:
    """Run kernels.compile_table in a process without the interpreter; return its rows, and a shorter table of them."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_table", "--json", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    return rows, format_compiled(rows)


def format_compiled(rows: list[dict]) -> str:
    """Return one line per kernel and capability: the worst of its compilations."""
    kernels: dict[tuple, list[dict]] = {}
    for row in rows:
        kernels.setdefault((row["op"], row["kernel"], row["sm"]), []).append(row)
    lines = ["registers and spilled bytes per thread, shared bytes per block: the worst over all sizes",
             f"{'kernel':<34} {'sm':>3} {'sizes':>5} {'regs':>4} {'spill':>5} {'shared':>7} {'wgmma':>5} {'tma':>4} "
             f"{'16B':>4}  op"]
    for (op, kernel, sm), rows in kernels.items():
        most = {name: max(row[name] for row in rows) for name in ("registers", "spilled_bytes", "shared_bytes")}
        least = {name: min(row[name] for row in rows) for name in ("wgmma", "tma", "loads_16_bytes")}
        lines.append(f"{kernel:<34} {sm:>3} {len(rows):>5} {most['registers']:>4} {most['spilled_bytes']:>5} "
                     f"{most['shared_bytes']:>7} {least['wgmma']:>5} {least['tma']:>4} "
                     f"{least['loads_16_bytes']:>4}  {op}")
    return "\n".join(lines)
