"""Mistakes made on purpose in the shipped kernels: the parity check that the real ones pass must find each."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutant_worker import ROOT, load_mutants

from kernels.registry import BACKENDS

MUTANTS = load_mutants()
WORKER = Path(__file__).with_name("mutant_worker.py")


def attempt(indices):
    """Return what killed each mutant, by index; None where nothing did."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER, *map(str, indices)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {index: (killed_by, done.stderr) for index, killed_by in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def results(request):
    """All selected mutants in one go: starting Python and torch takes longer than most of them."""
    chosen = [item.callspec.params["index"] for item in request.session.items
              if item.path == Path(__file__) and "index" in getattr(item, "fixturenames", ())]
    return attempt(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[f"{m[4]}: {m[3]}" for m in MUTANTS])
def test_parity_finds_the_mistake(index, results, record_property):
    file, old, _, wrong, _ = MUTANTS[index]
    occurrences = (ROOT / file).read_text(encoding="utf-8").count(old)
    assert occurrences == 1, f"{file} must hold this text once, it does {occurrences} times: {old}"
    killed_by, stderr = results[index]
    record_property("killed_by", killed_by)
    assert killed_by, f"{file}: {wrong}: parity passes"
    assert killed_by != "error", f"{file}: {wrong}: neither passes nor fails\n{stderr[-2000:]}"


def test_unchanged_source_passes(monkeypatch, tmp_path):
    """The harness finds nothing wrong where nothing is."""
    copy = tmp_path / "tests"
    copy.mkdir()
    (copy / "mutants_rms_norm.py").write_text('MUTANTS = [("kernels/rms_norm.py", "EPS", "EPS", "nothing")]')
    (copy / WORKER.name).write_text(WORKER.read_text(encoding="utf-8").replace(
        "ROOT = Path(__file__).resolve().parent.parent", f"ROOT = Path({str(ROOT)!r})"), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "WORKER", copy / WORKER.name)
    assert attempt([0])[0][0] is None


def test_the_list_in_docs_is_of_these_mutants():
    listed = (ROOT / "docs/mutants.md").read_text(encoding="utf-8")
    assert not [m[3] for m in MUTANTS if f"| {m[4]} | {m[3]} |" not in listed]


def test_every_op_in_triton_has_its_mutants():
    count = Counter(mutant[4] for mutant in MUTANTS)
    for op, backends in BACKENDS.items():
        if any("triton" in b.needs for b in backends.values()):
            assert count[op] >= 4, f"{op} has {count[op]} mutants"
