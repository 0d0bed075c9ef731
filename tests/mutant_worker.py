"""Try mutants of kernels/ one by one: python tests/mutant_worker.py 0 3 7 ..., a line of JSON [index, killed by] each;
--table writes docs/mutants.md from all of them.

A mutant may write anywhere in memory, so each gets a process of its own, forked from this one, where everything is
imported. All op files are imported afresh around the changed one, their operators in a namespace of
their own; then the op's Triton backends must fail parity in fp32 at one of its small cases.
"""

import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINERY = {"registry", "device", "check", "interpreter", "compile_table"}
SECONDS = 300  # a mutant may loop for ever


def load_mutants() -> list[tuple[str, str, str, str, str]]:
    """Return (file, old text, new text, what is wrong, op) of every tests/mutants_*.py; op is by default the file's."""
    found = []
    for path in sorted(Path(__file__).parent.glob("mutants_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [(*mutant[:4], mutant[4] if len(mutant) > 4 else Path(mutant[0]).stem) for mutant in module.MUTANTS]
    return found


def import_with(file: str, source: str, folder: Path) -> None:
    """Import every op file afresh, `file` with another source."""
    from kernels import registry
    registry.NAMESPACE = "mutant"
    registry.BACKENDS.clear()
    registry.OPS.clear()
    names = [n for n in sys.modules if n.startswith("kernels.") and n.split(".")[1] not in MACHINERY]
    for name in names:
        del sys.modules[name]
    changed = folder / Path(file).name  # a real file: Triton reads the source of what it decorates
    changed.write_text(source, encoding="utf-8")
    for name in sorted(names, key=lambda n: n != f"kernels.{Path(file).stem}"):  # the changed one first: others use it
        if name not in sys.modules:  # not yet imported by another op file
            path = changed if name == f"kernels.{Path(file).stem}" else ROOT / (name.replace(".", "/") + ".py")
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)


def failing_case(op: str) -> str | None:
    """Return the first small case at which a Triton backend of `op` fails parity, or None."""
    import torch

    from kernels.check import assert_parity, small_cases
    from kernels.registry import BACKENDS, OPS
    for backend in [name for name, b in BACKENDS[op].items() if "triton" in b.needs]:
        for case in small_cases(OPS[op]):
            try:
                assert_parity(op, backend, case, torch.float32, torch.device("cpu"))
            except AssertionError:
                return f"{op}={backend} {case}"
    return None


def attempt(file: str, old: str, new: str, op: str, results) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        import_with(file, source.replace(old, new), Path(folder))
        results.send(failing_case(op))
    os._exit(0)


def attempts(indices: list[int]) -> Iterator[tuple[int, str | None]]:
    """Yield (index, what killed the mutant or None) one by one."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    torch.set_num_threads(1)  # a forked child must not wait for threads that it does not have
    import kernels  # noqa: F401
    from kernels import interpreter
    interpreter.install()
    failing_case("rms_norm")  # what is imported at first use is imported once, before the forks: 2 s per mutant
    mutants, fork = load_mutants(), multiprocessing.get_context("fork")
    for index in indices:
        file, old, new, _, op = mutants[index]
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=attempt, args=(file, old, new, op, there))
        child.start()
        there.close()
        killed_by = "it ran too long"
        if here.poll(SECONDS):
            try:
                killed_by = here.recv()
            except EOFError:
                child.join()
                killed_by = f"it died of signal {-child.exitcode}" if child.exitcode < 0 else "error"
        child.kill()
        yield index, killed_by


def write_table(path: Path) -> None:
    """Write every mutant and the parity case that finds it."""
    mutants = load_mutants()
    rows = [f"| {mutants[i][4]} | {mutants[i][3]} | {killed_by} |" for i, killed_by in attempts(range(len(mutants)))]
    head = ["# Mutants of the kernels", "",
            "Mistakes made on purpose in the shipped sources, and the first parity case in fp32 that finds each. By",
            "`python tests/mutant_worker.py --table`; `tests/test_kernel_mutants.py` demands that all are found.", "",
            "| op | mistake | found by |", "|---|---|---|"]
    path.write_text("\n".join([*head, *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1:] == ["--table"]:
        write_table(ROOT / "docs/mutants.md")
    else:
        for result in attempts([int(word) for word in sys.argv[1:]]):
            print(json.dumps(result), flush=True)
