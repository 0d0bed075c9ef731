"""Options, rows and the summary of `pytest bench/`; the run fails where a row is slower than this GPU's baseline."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from bench import harness, results
from kernels.registry import OPS
from nanochat.common import UserError

ROWS = pytest.StashKey[results.Results]()


def pytest_addoption(parser):
    group = parser.getgroup("benches")
    group.addoption("--op", action="append", default=[], choices=list(OPS), help="only this op (may be repeated)")
    group.addoption("--size", action="append", default=[],
                    help=f"only cases whose name starts so (may be repeated); default: {', '.join(harness.SIZES)}")
    group.addoption("--provider", action="append", default=[],
                    help="only this backend, or compile for torch.compile of the eager one (may be repeated)")
    group.addoption("--rows", type=Path, help="a JSON file that gets every row at once; its earlier rows are kept")
    group.addoption("--baselines", type=Path, default=results.BASELINES, help="folder of the baselines per GPU name")
    group.addoption("--update-baseline", action="store_true", help="make this run's rows the baseline of this GPU")


def pytest_configure(config):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config.stash[ROWS] = results.Results(config.getoption("--rows"), harness.environment(device))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def keep(request, benchmark, device):
    """Return what files a row: into the JSON, into pytest-benchmark's, and against the baseline."""
    rows, options = request.config.stash[ROWS], request.config.option

    def file(row: dict) -> None:
        row = {**row, **harness.clocks(device)}
        if row["key"].startswith("kernel/"):
            row.update(harness.against(row, {**rows.rows, row["key"]: row}))
        rows.add(row)
        benchmark.extra_info.update(rows.rows[row["key"]])
        if options.update_baseline:
            return
        base = results.baseline_rows(rows.environment["gpu"], options.baselines) or {}
        fault = results.slowdown(row, base.get(row["key"]))
        if fault:
            pytest.fail(fault, pytrace=False)

    return file


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(config.stash[ROWS].environment)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    say = terminalreporter.write_line
    measured = [row for row in rows.rows.values() if row["key"].startswith("kernel/")]
    if measured:
        terminalreporter.section(f"kernels on {rows.environment['gpu']}")
        for line in kernel_table(measured):
            say(line)
        say(baseline_line(rows, config.option))
    skipped = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", ()):
        if isinstance(report.longrepr, tuple):
            skipped[report.longrepr[2].removeprefix("Skipped: ")].append(report.nodeid.partition("[")[2].rstrip("]"))
    for reason, ids in skipped.items():
        names = dict.fromkeys("=".join(name.split("-")[:2]) for name in ids)
        say(f"skipped {len(ids)} rows: {reason} ({', '.join(names)})")
    for report in terminalreporter.stats.get("passed", ()):
        if "compiled" in dict(report.user_properties):
            terminalreporter.section("kernels compiled for GPUs that are not here")
            say(dict(report.user_properties)["compiled"])


def pytest_sessionfinish(session):
    config = session.config
    rows = config.stash[ROWS]
    if config.option.update_baseline and rows.rows:
        results.update_baseline(rows, config.option.baselines)


def baseline_line(rows: results.Results, options) -> str:
    path = results.baseline_path(rows.environment["gpu"], options.baselines)
    if options.update_baseline:
        return f"these rows are the baseline now: {path}"
    if not path.exists():
        return f"no baseline for {rows.environment['gpu']}: nothing was compared (--update-baseline makes one)"
    return f"compared with {path}"


def kernel_table(rows: list[dict]) -> list[str]:
    """Return the rows as lines of text; n/a where a figure does not exist."""
    lines = [f"{'op':<16} {'provider':<8} {'case':<14} {'pass':<16} {'ms':>9} {'MAD':>7} {'GB/s':>6} {'TFLOP/s':>7} "
             f"{'roof':>6} {'peak MiB':>8} {'/eager':>7} {'/compile':>8}"]
    for row in rows:
        numbers = [f"{row[name]:.3g}" if row[name] else "n/a" for name in ("gb_per_s", "tflop_per_s")]
        ratios = [f"{row[name]:.2f}x" if row[name] else "n/a" for name in ("vs_eager", "vs_compile")]
        roof = "n/a" if row["percent_of_roof"] is None else f"{row['percent_of_roof']:.0f} %"
        memory = "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(f"{row['op']:<16} {row['provider']:<8} {row['case']:<14} {row['passes']:<16} "
                     f"{1e3 * row['median_s']:>9.4f} {1e3 * row['mad_s']:>7.4f} {numbers[0]:>6} {numbers[1]:>7} "
                     f"{roof:>6} {memory:>8} {ratios[0]:>7} {ratios[1]:>8}")
    return lines
