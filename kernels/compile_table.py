"""Compile every Triton kernel for GPUs that are not here and say what it needs: python -m kernels.compile_table

Each op's Triton backend runs forward and backward on meta tensors of the d12, d20 and d26 cases; Triton's own launch
path specializes and compiles each kernel for the wanted capability and stops before the launch. ptxas comes with
triton, so no GPU is needed. A row counts registers and spilled bytes per thread, shared memory, and the instructions
that make a kernel fast: wgmma (tensor cores of sm90), TMA copies, 16-byte global loads.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels  # noqa: F401  registers every op
from kernels import device
from kernels.registry import BACKENDS, OPS, Op, callable_of

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes per block, of A100 and H100


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
    """Compile what `backend` of `op` launches in its d12, d20 and d26 cases; rows in order, duplicates dropped.

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
            if name.startswith(("d12", "d20", "d26")):
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
    registers, spilled = _resources(ptx, sm)
    source = compiled.src
    types = [t for t in source.signature.values() if t != "constexpr"]
    names = source.fn.arg_names
    constants = [f"{names[path[0]]}={value}" for path, value in source.constants.items()]
    return Row(op, compiled.metadata.name, sm, " ".join([*types, *constants, f"num_stages={metadata.num_stages}"]),
               metadata.num_warps, registers, spilled, metadata.shared, ptx.count("wgmma.mma_async"),
               ptx.count("cp.async.bulk.tensor"), len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg", ptx)))


def _resources(ptx: str, sm: int) -> tuple[int, int]:
    """Return registers and spilled bytes (stores) per thread, by ptxas' own words."""
    from triton.backends.nvidia.compiler import get_ptxas
    ptxas = get_ptxas(sm)
    path = ptxas.path if hasattr(ptxas, "path") else ptxas[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
        said = subprocess.run([path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"], capture_output=True,
                              text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


def compile_all(ops: list[str], sms: list[int], dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Compile every Triton backend of `ops` for every capability."""
    return [row for sm in sms for name in ops for backend, b in BACKENDS[name].items()
            if "triton" in b.needs and dtype in (b.dtypes or (dtype,))
            for row in compile_op(OPS[name], backend, sm, dtype)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be repeated)")
    parser.add_argument("--sm", type=int, choices=SHARED_LIMIT, action="append", help="only this capability")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args = parser.parse_args()
    rows = compile_all(args.op or list(OPS), args.sm or [90, 80])
    if args.json:
        print(json.dumps({"triton": triton.__version__, "rows": {row.key: asdict(row) for row in rows}}, indent=1))
        return
    print(f"triton {triton.__version__}; registers and spilled bytes per thread, shared bytes per block")
    print(f"{'kernel':<32} {'sm':>3} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>7} {'wgmma':>5} {'tma':>4} "
          f"{'16B':>4}  signature")
    for r in rows:
        print(f"{r.kernel:<32} {r.sm:>3} {r.warps:>5} {r.registers:>4} {r.spilled_bytes:>5} {r.shared_bytes:>7} "
              f"{r.wgmma:>5} {r.tma:>4} {r.loads_16_bytes:>4}  {r.signature}")


if __name__ == "__main__":
    if device.interpreter_on():
        print("error: compiling needs TRITON_INTERPRET unset, it is 1", file=sys.stderr)
        raise SystemExit(2)
    main()
