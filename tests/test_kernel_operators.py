"""Every operator that a Triton backend launches, as torch sees it: schemas, fakes, whole compiled graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import interpreter
from kernels.check import run, small_cases
from kernels.registry import BACKENDS, OPS, callable_of

CPU = torch.device("cpu")
TRITON = [(op, name) for op in OPS for name, b in BACKENDS[op].items() if "triton" in b.needs]
DIFFERENTIABLE = [(op, name) for op in OPS for name, b in BACKENDS[op].items()
                  if OPS[op].grad_inputs and not set(b.needs) - {"triton"}]
ids = "{0[0]}-{0[1]}".format


def inputs_of(op):
    return OPS[op].make_inputs(OPS[op].cases["tiny"], torch.float32, CPU, torch.Generator().manual_seed(0))


class Recorder(TorchDispatchMode):
    """Keep each operator of ours with the arguments of its first call."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kernels" and func not in self.calls:
            self.calls[func] = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(),
                                                                 (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op, backend", TRITON, ids=map(ids, TRITON))
def test_operators_keep_torchs_contract(op, backend):
    """Schema (nothing mutated or aliased in secret) and fake (shapes, strides, dtypes) agree with what happens."""
    with Recorder() as recorded:
        run(OPS[op], callable_of(op, backend), inputs_of(op))
    assert recorded.calls
    for operator, (args, kwargs) in recorded.calls.items():
        torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op, backend", DIFFERENTIABLE, ids=map(ids, DIFFERENTIABLE))
def test_backend_compiles_as_one_graph(op, backend):
    torch._dynamo.reset()
    fn, values = callable_of(op, backend), inputs_of(op)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    expected, got = run(OPS[op], fn, values), run(OPS[op], compiled, values)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, backend", TRITON, ids=map(ids, TRITON))
def test_every_kernel_of_the_file_is_launched(op, backend):
    """No kernel is dead code, and none is passed over for the eager reference."""
    module = __import__(BACKENDS[op][backend].fn.__module__, fromlist=["x"])
    kernels = {name for name, value in vars(module).items()
               if name.endswith("_kernel") and type(value).__name__ in ("InterpretedFunction", "JITFunction")}
    with interpreter.launches() as names:
        for case in small_cases(OPS[op]):
            run(OPS[op], callable_of(op, backend),
                OPS[op].make_inputs(OPS[op].cases[case], torch.float32, CPU, torch.Generator().manual_seed(0)))
    assert kernels and kernels <= set(names)
