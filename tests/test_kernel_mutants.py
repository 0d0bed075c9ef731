"""Mistakes made on purpose in the shipped kernels: the parity check that the real ones pass must find each.

A mutant is one replacement in the source of a file of kernels/. All op files are imported afresh around the changed
one, their operators in a namespace of their own, and the op must then fail parity in fp32 at one of its small cases.
"""

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import kernels
from kernels import registry
from kernels.check import assert_parity, small_cases
from kernels.registry import BACKENDS, OPS

ROOT = Path(__file__).resolve().parent.parent
MACHINERY = {"registry", "device", "check", "interpreter", "compile_table"}


def load_mutants():
    """MUTANTS of every tests/mutants_*.py: (file, old text, new text, what is wrong[, op]); op is by default the
    file's name."""
    found = []
    for path in sorted(Path(__file__).parent.glob("mutants_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [(*mutant[:4], mutant[4] if len(mutant) > 4 else Path(mutant[0]).stem) for mutant in module.MUTANTS]
    return found


MUTANTS = load_mutants()


def op_modules():
    return {name: module for name, module in sys.modules.items()
            if name.startswith("kernels.") and name.split(".")[1] not in MACHINERY}


@pytest.fixture
def import_with(tmp_path, monkeypatch, request):
    """import_with(file, source): every op file afresh, `file` with another source; undone after the test."""
    real, saved = op_modules(), ({op: dict(backends) for op, backends in BACKENDS.items()}, dict(OPS))

    def import_all(file, source):
        monkeypatch.setattr(registry, "NAMESPACE", f"mutant_{abs(hash(request.node.nodeid))}")
        for name in real:
            del sys.modules[name]
        BACKENDS.clear()
        OPS.clear()
        changed = tmp_path / Path(file).name  # a real file: Triton reads the source of what it decorates
        changed.write_text(source, encoding="utf-8")
        for name in real:
            if name not in sys.modules:  # not yet imported by another op file
                load(name, changed if name == f"kernels.{Path(file).stem}" else None)

    def load(name, path):
        spec = importlib.util.spec_from_file_location(name, path) if path else importlib.util.find_spec(name)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    yield import_all
    sys.modules.update(real)
    for name, module in real.items():
        setattr(kernels, name.split(".")[1], module)
    for registered, before in zip((BACKENDS, OPS), saved, strict=True):
        registered.clear()
        registered.update(before)


def failing_case(op):
    """Return the first small case at which a Triton backend of `op` fails parity, or None."""
    for backend, b in BACKENDS[op].items():
        if "triton" not in b.needs:
            continue
        for case in small_cases(OPS[op]):
            try:
                assert_parity(op, backend, case, torch.float32, torch.device("cpu"))
            except AssertionError:
                return f"{op}={backend} {case}"
    return None


@pytest.mark.parametrize("file, old, new, wrong, op", MUTANTS, ids=[f"{m[4]}: {m[3]}" for m in MUTANTS])
def test_parity_finds_the_mistake(file, old, new, wrong, op, import_with, record_property):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file} must hold this text once, it does {source.count(old)} times: {old}"
    import_with(file, source.replace(old, new))
    killed_by = failing_case(op)
    record_property("killed_by", killed_by)
    assert killed_by, f"{file}: {wrong}: parity passes"


def test_the_unchanged_source_passes(import_with):
    """The harness itself finds nothing wrong where nothing is."""
    import_with("kernels/rms_norm.py", (ROOT / "kernels/rms_norm.py").read_text(encoding="utf-8"))
    assert BACKENDS["rms_norm"]["triton"].fn.__module__ == "kernels.rms_norm" and failing_case("rms_norm") is None


def test_every_op_in_triton_has_its_mutants():
    count = Counter(mutant[4] for mutant in MUTANTS)
    for op, backends in BACKENDS.items():
        if "triton" in backends:
            assert count[op] >= 4, f"{op} has {count[op]} mutants"
