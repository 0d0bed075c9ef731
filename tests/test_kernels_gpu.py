"""On a GPU: every backend that runs there against eager, bit-equal from run to run, and in whole inductor graphs."""

import pytest
import torch

from kernels.check import assert_parity, run, small_cases
from kernels.registry import BACKENDS, OPS, callable_of, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKEND = [(op, name) for op in OPS for name in BACKENDS[op] if name != "eager"]
EVERY = [pytest.param(op, name, case, dtype, id=f"{op}-{name}-{case}-{str(dtype).removeprefix('torch.')}")
         for op, name in BACKEND for case in small_cases(OPS[op]) for dtype in DTYPES]
ids = "{0[0]}-{0[1]}".format


def skip_unless_it_runs(op, backend, dtype):
    reason = why_not(BACKENDS[op][backend], CUDA, dtype)
    if reason:
        pytest.skip(reason)


def inputs_of(op, dtype):
    return OPS[op].make_inputs(OPS[op].cases["tiny"], dtype, CUDA, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("op, backend, case, dtype", EVERY)
def test_backend_is_as_exact_as_eager_on_the_gpu(op, backend, case, dtype):
    skip_unless_it_runs(op, backend, dtype)
    assert_parity(op, backend, case, dtype, CUDA)


@pytest.mark.parametrize("op, backend", BACKEND, ids=map(ids, BACKEND))
def test_triton_repeats_itself_bit_for_bit(op, backend):
    if "triton" not in BACKENDS[op][backend].needs:
        pytest.skip("only our kernels promise it")
    skip_unless_it_runs(op, backend, torch.bfloat16)
    values, fn = inputs_of(op, torch.bfloat16), callable_of(op, backend)
    once, again = run(OPS[op], fn, values), run(OPS[op], fn, values)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("op, backend", BACKEND, ids=map(ids, BACKEND))
def test_backend_compiles_as_one_inductor_graph(op, backend):
    if not OPS[op].grad_inputs:
        pytest.skip("no part of a training graph")
    skip_unless_it_runs(op, backend, torch.bfloat16)
    torch._dynamo.reset()
    values, fn = inputs_of(op, torch.bfloat16), callable_of(op, backend)
    expected, got = run(OPS[op], fn, values), run(OPS[op], torch.compile(fn, fullgraph=True), values)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-2, atol=2e-2)
