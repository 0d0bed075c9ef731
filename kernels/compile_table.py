"""Compile every Triton kernel for GPUs that are not here and say what it needs: python -m kernels.compile_table

Each op's Triton backend runs forward and backward on meta tensors of its cases d12, d20, d26; Triton's own launch
path specializes and compiles each kernel for the wanted capability and stops before the launch. ptxas comes with
triton, so no GPU is needed. A row counts registers and spilled bytes per thread, shared memory, and the instructions
that make a kernel fast: wgmma (tensor cores of sm90), TMA copies, 16-byte global loads.

bench/baselines/compile.json holds the accepted figures per Triton version. --check fails on a change for the worse, on
a spill, on tensor cores left unused and on a TILES entry that no case reaches; --write accepts what is there now.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels  # noqa: F401  registers every op
from kernels import device
from kernels.check import small_cases
from kernels.registry import BACKENDS, OPS, Op, callable_of

BASELINE = Path(__file__).resolve().parent.parent / "bench/baselines/compile.json"
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes per block, of A100 and H100
NEED_WGMMA = ("attention", "newton_schulz", "linear_relu2")  # ops whose matrix products are in Triton
LESS_IS_BETTER = ("registers", "spilled_bytes", "shared_bytes")
MORE_IS_BETTER = ("wgmma", "tma", "loads_16_bytes")


@dataclass(frozen=True)
class Row:
    """One kernel, compiled: where it comes from and what it takes."""

    op: str
    kernel: str
    sm: int
    signature: str  # argument types and constants: tells two compilations apart
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    tma: int
    loads_16_bytes: int

    @property
    def key(self) -> str:
        return f"{self.kernel} sm{self.sm} {self.signature}"


class _NoGPU(DriverBase):
    """Answers what Triton's launch path asks of a driver, for a GPU of capability `sm` that is not here."""

    def __init__(self, sm: int):
        self.target = GPUTarget("cuda", sm, 32)

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # compiled kernels are cached per device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs here")


def compile_op(op: Op, backend: str, sm: int, dtype: torch.dtype) -> list[Row]:
    """Compile what `backend` of `op` launches in its large cases; rows in order, duplicates dropped.

    Triton's driver stays the one that runs nothing: use a process of its own.
    """
    rows: dict[str, Row] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        row = _row(op.name, sm, compiled)
        rows.setdefault(row.key, row)
        return compiled

    JITFunction.run, device.META_SM = compile_only, sm
    driver.set_active(_NoGPU(sm))
    try:
        for name, case in op.cases.items():
            if name not in small_cases(op) and (sm >= 89 or not case.get("fp8")):
                _trace(op, backend, case, dtype)
    finally:
        JITFunction.run, device.META_SM = run, None
    return list(rows.values())


def _trace(op: Op, backend: str, case, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        inputs = op.make_inputs(case, dtype, torch.device("meta"), None)
        for name in op.grad_inputs:
            inputs[name].requires_grad_()
        result = callable_of(op.name, backend)(**inputs)
        if op.grad_inputs:
            outputs = [result] if isinstance(result, torch.Tensor) else list(result)
            torch.autograd.grad(outputs, [inputs[name] for name in op.grad_inputs], list(map(torch.ones_like, outputs)))


def _row(op: str, sm: int, compiled) -> Row:
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    registers, spilled = _resources(compiled.asm["cubin"])
    source = compiled.src
    types = [t for t in source.signature.values() if t != "constexpr"]
    names = source.fn.arg_names
    constants = [f"{names[path[0]]}={value}" for path, value in source.constants.items()]
    return Row(op, compiled.metadata.name, sm, " ".join([*types, *constants, f"num_stages={metadata.num_stages}"]),
               metadata.num_warps, registers, spilled, metadata.shared, ptx.count("wgmma.mma_async"),
               ptx.count("cp.async.bulk.tensor"), len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg", ptx)))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack per thread of the very binary that would be launched.

    Spilled registers are what stands on the stack.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", said)[1]), int(re.search(r"STACK:(\d+)", said)[1])


def compile_all(ops: list[str], sms: list[int], dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Compile every Triton backend of `ops` for every capability."""
    return [row for sm in sms for name in ops for backend, b in BACKENDS[name].items()
            if "triton" in b.needs and dtype in (b.dtypes or (dtype,)) and (sm >= 89 or "fp8" not in b.needs)
            for row in compile_op(OPS[name], backend, sm, dtype)]


# --- the gate -------------------------------------------------------------------------------------


def faults(rows: list[Row]) -> list[str]:
    """Return a sentence for every rule that a row breaks whatever the baseline says."""
    found = []
    for row in rows:
        if row.spilled_bytes:
            found.append(f"{row.key}: must not spill, {row.spilled_bytes} bytes do")
        if row.shared_bytes > SHARED_LIMIT[row.sm]:
            found.append(f"{row.key}: shared memory must be at most {SHARED_LIMIT[row.sm]} bytes, it is "
                         f"{row.shared_bytes}")
    for op in NEED_WGMMA:
        of_op = [row for row in rows if row.op == op and row.sm == 90]
        if of_op and not any(row.wgmma for row in of_op):
            found.append(f"{op}: must use wgmma on sm90, none of its kernels does")
    return found


def changes(rows: list[Row], before: dict[str, dict]) -> list[str]:
    """Return a sentence for every row that is worse than `before` (key -> figures), new, or gone."""
    found = [f"{key}: is gone" for key in before.keys() - {row.key for row in rows}]
    for row in rows:
        if row.key not in before:
            found.append(f"{row.key}: is new")
            continue
        was = before[row.key]
        found += [f"{row.key}: {name} was {was[name]}, is {getattr(row, name)}"
                  for name in LESS_IS_BETTER + MORE_IS_BETTER
                  if (getattr(row, name) > was[name] if name in LESS_IS_BETTER else getattr(row, name) < was[name])]
    return found


def unused_tiles() -> list[str]:
    """Return a sentence for every TILES entry of a GPU that nothing compiled in this process has taken."""
    modules = {sys.modules[b.fn.__module__] for backends in BACKENDS.values() for b in backends.values()}
    return [f"{module.__name__}: no case reaches {name}[{key}]" for module in modules
            for name, tiles in vars(module).items() if name.startswith("TILES") for key in tiles
            if key[0] and (id(tiles), key) not in device.PICKED]


def check(rows: list[Row], path: Path) -> list[str]:
    """Return everything wrong with the whole table; figures of another Triton version are not compared."""
    known = json.loads(path.read_text(encoding="utf-8"))
    found = faults(rows) + unused_tiles()
    if triton.__version__ in known:
        return found + changes(rows, known[triton.__version__])
    print(f"note: {path.name} has figures of triton {', '.join(known)}, this is {triton.__version__}: not compared")
    return found


def write(rows: list[Row], path: Path) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[triton.__version__] = {row.key: asdict(row) for row in rows}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def show(rows: list[Row]) -> None:
    print(f"triton {triton.__version__}; registers and spilled bytes per thread, shared bytes per block")
    print(f"{'kernel':<32} {'sm':>3} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>7} {'wgmma':>5} {'tma':>4} "
          f"{'16B':>4}  signature")
    for r in rows:
        print(f"{r.kernel:<32} {r.sm:>3} {r.warps:>5} {r.registers:>4} {r.spilled_bytes:>5} {r.shared_bytes:>7} "
              f"{r.wgmma:>5} {r.tma:>4} {r.loads_16_bytes:>4}  {r.signature}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be repeated)")
    parser.add_argument("--sm", type=int, choices=SHARED_LIMIT, action="append", help="only this capability")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="compare with the accepted figures; exit 1 when worse")
    parser.add_argument("--write", action="store_true", help="accept the figures of this Triton version")
    args = parser.parse_args()
    if (args.check or args.write) and (args.op or args.sm):
        parser.error("--check and --write take the whole table, without --op and --sm")
    rows = compile_all(args.op or list(OPS), args.sm or [90, 80])
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(rows)
    if args.write:
        write(rows, BASELINE)
    if args.check:
        wrong = check(rows, BASELINE)
        print(*wrong, sep="\n", file=sys.stderr)
        raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    if device.interpreter_on():
        print("error: compiling needs TRITON_INTERPRET unset, it is 1", file=sys.stderr)
        raise SystemExit(2)
    main()
