"""qk_norm_rope in Triton beyond parity: layouts, what it keeps for backward, what it refuses."""

import pytest
import torch

from kernels import KernelError
from kernels.check import assert_parity, small_cases
from kernels.qk_norm_rope import qk_norm_rope_triton, rotary_table
from kernels.registry import BACKENDS, OPS, why_not

CPU = torch.device("cpu")


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("case", small_cases(OPS["qk_norm_rope"]))
def test_fp16_is_as_exact_as_eager(case):
    assert_parity("qk_norm_rope", "triton", case, torch.float16, CPU)


def test_flat_rows_of_decode_have_the_bits_of_training():
    q, k, (cos, sin) = draw(1, 7, 3, 64), draw(1, 7, 1, 64), rotary_table(7, 64)
    order = torch.tensor([4, 0, 6])
    whole = qk_norm_rope_triton(q, k, cos, sin)
    flat = qk_norm_rope_triton(q[0, order], k[0, order], cos[order], sin[order])
    assert all(torch.equal(a[0, order], b) for a, b in zip(whole, flat, strict=True))


def test_views_and_transposed_gradients_give_the_bits_of_contiguous_ones():
    """q and k as slices of one projection, their gradients as attention's (B, heads, T, D) leaves them."""
    B, T, H, K, D = 2, 5, 3, 2, 64
    together, (cos, sin) = draw(B, T, H + K, D), rotary_table(T, D)
    cotangents = draw(B, H, T, D).transpose(1, 2), draw(B, K, T, D).transpose(1, 2)

    def gradients(split, cotangents):
        q, k = (x.detach().requires_grad_() for x in split)
        return torch.autograd.grad(qk_norm_rope_triton(q, k, cos, sin), (q, k), cotangents)

    views = gradients(together.split((H, K), dim=2), cotangents)
    copies = gradients([x.contiguous() for x in together.split((H, K), dim=2)], [g.contiguous() for g in cotangents])
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


def test_more_leading_dimensions_are_batches():
    q, k, (cos, sin) = draw(2, 3, 4, 2, 64), draw(2, 3, 4, 1, 64), rotary_table(4, 64)
    nested = qk_norm_rope_triton(q, k, cos, sin)
    plain = qk_norm_rope_triton(q.flatten(0, 1), k.flatten(0, 1), cos, sin)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(nested, plain, strict=True))


def test_backward_keeps_the_result_and_not_the_input():
    q, k, (cos, sin) = draw(1, 4, 2, 64).requires_grad_(), draw(1, 4, 1, 64).requires_grad_(), rotary_table(4, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        zq, zk = qk_norm_rope_triton(q, k, cos, sin)
    kept = {x.data_ptr() for x in kept}
    assert not kept & {q.data_ptr(), k.data_ptr()} and {zq.data_ptr(), zk.data_ptr()} <= kept


@pytest.mark.parametrize("q, k, table, sentence", [
    ((1, 4, 2, 258), (1, 4, 2, 258), (4, 258), "D must be even and at most 256, got 258 (q is (1, 4, 2, 258), "
                                               "torch.float32)"),
    ((1, 4, 2, 64), (1, 4, 2, 64), (8, 64), "cos and sin must be (T, D/2) = (4, 32), got (8, 32) and (8, 32) "
                                            "(q is (1, 4, 2, 64), torch.float32)"),
    ((1, 4, 2, 64), (1, 3, 2, 64), (4, 64), "k must have q's tokens, head dim and dtype, got (1, 3, 2, 64), "
                                            "torch.float32 (q is (1, 4, 2, 64), torch.float32)"),
])
def test_what_it_cannot_do_is_refused_by_name(q, k, table, sentence):
    with pytest.raises(KernelError) as error:
        qk_norm_rope_triton(draw(*q), draw(*k), *rotary_table(*table))
    assert str(error.value) == f"qk_norm_rope[triton]: {sentence}"


def test_a_head_too_wide_is_a_reason_at_start():
    backend = BACKENDS["qk_norm_rope"]["triton"]
    assert why_not(backend, CPU, torch.float32, {"head_dim": 256}) is None
    assert why_not(backend, CPU, torch.float32, {"head_dim": 512}) == "head_dim must be at most 256, got 512"
