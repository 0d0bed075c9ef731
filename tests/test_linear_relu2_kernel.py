"""linear_relu2 in Triton beyond parity: both ways of addressing, what is kept for backward, what is refused."""

import pytest
import torch

from kernels import KernelError, linear_relu2
from kernels.check import assert_parity, small_cases
from kernels.linear_relu2 import OP, TILES, linear_relu2_triton
from kernels.registry import callable_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
CPU = torch.device("cpu")


def inputs(M: int = 9, C: int = 24, N: int = 40) -> dict:
    return OP.make_inputs(dict(M=M, C=C, N=N), torch.float32, CPU, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", small_cases(OP))
@pytest.mark.parametrize("dtype", OP.dtypes)
def test_pointers_do_what_descriptors_do(case, dtype, monkeypatch):
    """sm80 has no TMA; its path must not depend on what only TMA checks."""
    monkeypatch.setitem(TILES, (0,), {**TILES[0,], "TMA": False})
    assert_parity("linear_relu2", "triton", case, dtype, CPU)


def test_only_post_and_the_inputs_are_kept_for_backward():
    values, kept = inputs(), []
    for name in OP.grad_inputs:
        values[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        linear_relu2_triton(**values)
    assert sorted(kept) == sorted([(9, 24), (40, 24), (24, 40), (9, 40)])


def test_rows_that_begin_off_a_multiple_of_16_bytes_are_moved():
    values = inputs()
    expected = linear_relu2_triton(**values)
    shifted = torch.zeros(values["x"].numel() + 1)[1:].view_as(values["x"]).copy_(values["x"])
    assert shifted.data_ptr() % 16
    assert torch.equal(linear_relu2_triton(shifted, values["fc"], values["proj"]), expected)


def test_leading_dimensions_stay_and_nan_is_not_lost():
    values = inputs()
    x = values["x"][:8].view(2, 4, 24).clone()
    x[1, 2, 0] = torch.nan
    y = linear_relu2_triton(x, values["fc"], values["proj"])
    assert y.shape == (2, 4, 24) and y[1, 2].isnan().all() and y.isnan().sum() == 24


@pytest.mark.parametrize("sizes, sentence", [
    (dict(C=22), r"linear_relu2\[triton\]: C must be a multiple of 4, got 22 \(x is \(9, 22\), torch.float32\)"),
    (dict(N=42), r"linear_relu2\[triton\]: N must be a multiple of 4, got 42 \(x is \(9, 24\), torch.float32\)"),
])
def test_sizes_that_tma_cannot_address_are_refused(sizes, sentence):
    with pytest.raises(KernelError, match=sentence):
        linear_relu2_triton(**inputs(**sizes))


def test_fp8_codes_are_refused_not_ignored():
    values = inputs()
    codes = callable_of("fp8_cast", "eager")(values["fc"])
    with pytest.raises(KernelError, match="linear_relu2.triton.: weights must be given without fp8 codes"):
        linear_relu2_triton(**values, fc_codes=codes)


def test_backward_is_as_exact_as_eagers_though_it_sees_post_alone():
    """sqrt(post) in bf16 has a relative error of 2^-10, eager's stored relu(pre) one of 2^-9: rms of dpre decides."""
    values = OP.make_inputs(dict(M=64, C=32, N=64), torch.bfloat16, CPU, torch.Generator().manual_seed(4))
    x, fc, proj = values["x"], values["fc"].bfloat16(), values["proj"].bfloat16()
    dy = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    pre = x.double() @ fc.double().t()
    exact = dy.double() @ proj.double() * 2 * pre.clamp(min=0)
    _, post = linear_relu2._linear_relu2_fwd(x, fc, proj)
    dpre = torch.empty_like(post)
    linear_relu2._launch(dy, proj, post, dpre, backward=True)
    eager = ((dy @ proj) * 2 * (x @ fc.t()).relu()).double()
    assert (dpre.double() - exact).norm() <= (eager - exact).norm()
