"""muon_update beyond parity: whole steps on our kernels against unbatched eager, refusals, repeatability."""

import pytest
import torch

from kernels import KernelError
from kernels.muon_update import muon_update_eager, muon_update_triton
from kernels.newton_schulz import newton_schulz_eager, newton_schulz_triton

SHAPES = [(2, 48, 24), (3, 24, 48)]  # c_fc and c_proj: one batch, scaled by 2^0.5 and 1


def banks(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def scalars(dtype=torch.float32):
    return [torch.tensor(x, dtype=dtype) for x in (0.02, 0.95, 0.1)]


def clone(values):
    return [value.clone() for value in values]


@pytest.mark.parametrize("compute_dtype, far", [(torch.float32, 3e-5), (torch.bfloat16, 3e-2)])
def test_a_shared_batch_on_our_kernels_equals_every_matrix_alone_in_fp64(compute_dtype, far):
    params, grads, buffers = banks(), banks(), banks()
    start = clone(params)
    alone = [clone([x.double() for x in values]) for values in (params, grads, buffers)]
    muon_update_triton(params, grads, buffers, *scalars(), compute_dtype, newton_schulz=newton_schulz_triton)
    for bank in range(len(SHAPES)):
        for i in range(SHAPES[bank][0]):
            p, g, b = ([values[bank][i:i + 1]] for values in alone)
            muon_update_eager(p, g, b, *scalars(torch.float64), torch.float64, newton_schulz=newton_schulz_eager)
            torch.testing.assert_close(buffers[bank][i].double(), b[0][0], rtol=0, atol=1e-6)
            delta, exact = params[bank][i].double() - start[bank][i], p[0][0] - start[bank][i]
            assert (delta - exact).norm() <= far * exact.norm()


def test_ten_steps_go_where_eager_goes():
    ends = []
    generator = torch.Generator().manual_seed(5)
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(10)]
    start, buffers = banks(), [torch.zeros(shape) for shape in SHAPES]
    for update in (muon_update_eager, muon_update_triton):
        params, state = clone(start), clone(buffers)
        for step in grads:
            update(params, step, state, *scalars(), torch.bfloat16, newton_schulz=newton_schulz_eager)
        ends.append(torch.cat([(p - s).flatten() for p, s in zip(params, start, strict=True)]))
    eager, ours = ends
    assert torch.cosine_similarity(eager, ours, dim=0) >= 0.9999
    assert (ours - eager).norm() <= 1e-2 * eager.norm()


def test_a_step_repeats_itself_bit_for_bit():
    values = [banks() for _ in range(3)]
    ends = []
    for _ in range(2):
        params, grads, buffers = (clone(v) for v in values)
        muon_update_triton(params, grads, buffers, *scalars(), torch.bfloat16, newton_schulz=newton_schulz_eager)
        ends.append((*params, *buffers))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_newton_schulz_gets_one_batch_and_its_norms():
    seen = []

    def spy(batch, norm):
        seen.append((batch, norm))
        return batch

    muon_update_triton(banks(), banks(), banks(), *scalars(), torch.bfloat16, newton_schulz=spy)
    (batch, norm), = seen
    assert batch.shape == (5, 24, 48) and batch.dtype == torch.bfloat16
    torch.testing.assert_close(norm, batch.float().norm(dim=(1, 2)))


@pytest.mark.parametrize("spoil, got", [
    (lambda x: x.mT, r"strides \(1152, 1, 24\) \(\(2, 24, 48\), torch.float32\)"),
    (lambda x: x.bfloat16(), r"strides \(1152, 24, 1\) \(\(2, 48, 24\), torch.bfloat16\)"),
])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_banks_of_another_layout_or_dtype_are_refused(spoil, got, which):
    values = [banks(), banks(), banks()]
    values[which][0] = spoil(values[which][0])
    with pytest.raises(KernelError, match=rf"muon_update\[triton\]: banks must be contiguous fp32, got {got}"):
        muon_update_triton(*values, *scalars(), torch.float32, newton_schulz=newton_schulz_eager)
