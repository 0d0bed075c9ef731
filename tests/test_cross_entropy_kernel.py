"""cross_entropy beyond parity: ignored rows, bad targets, saturation, fp16, who computes gradients, Liger."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import KernelError
from kernels.cross_entropy import cross_entropy_eager, cross_entropy_liger, cross_entropy_triton
from kernels.registry import BACKENDS, why_not

N, C, V = 10, 32, 70  # three chunks of rows, two blocks of columns in the interpreter


def inputs(dtype=torch.float32, spread=3.0):
    x = torch.randn(N, C).to(dtype).requires_grad_()
    w = (torch.randn(V, C) * spread * C ** -0.5).requires_grad_()
    targets = torch.randint(0, V, (N,))
    targets[[2, 7]] = -1
    return x, w, targets


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows_have_no_loss_and_gradients_of_exactly_zero(reduction):
    x, w, targets = inputs()
    loss = cross_entropy_triton(x, w, targets, reduction=reduction)
    loss.sum().backward()
    assert (x.grad[targets == -1] == 0).all() and (x.grad[targets != -1] != 0).any(dim=1).all()
    with torch.no_grad():
        x[targets == -1] = 1e30  # whatever they hold
    again = cross_entropy_triton(x, w, targets, reduction=reduction)
    assert torch.equal(again, loss)
    if reduction == "none":
        assert (loss[targets == -1] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_a_single_target_it_answers_as_eager_does(reduction):
    x, w, _ = inputs()
    targets = torch.full((N,), -1)
    results = []
    for fn in (cross_entropy_eager, cross_entropy_triton):
        loss = fn(x, w, targets, reduction=reduction)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("target", [V, V + 1000, -2])
def test_a_target_outside_the_vocabulary_makes_its_loss_nan(target):
    x, w, targets = inputs()
    targets[4] = target
    loss = cross_entropy_triton(x, w, targets, reduction="none")
    assert loss[4].isnan() and loss.isnan().sum() == 1


def test_logits_far_beyond_the_softcap_stay_finite_and_nan_stays_nan():
    x, w, targets = inputs(spread=3e5)
    loss = cross_entropy_triton(x, w, targets, reduction="none")
    torch.testing.assert_close(loss, cross_entropy_eager(x, w, targets, reduction="none"))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (x, w)))
    with torch.no_grad():
        x[4, 0] = torch.nan
    assert cross_entropy_triton(x, w, targets, reduction="none").isnan().sum() == 1


def test_small_factors_do_not_reach_the_narrow_gradient_of_the_logits():
    """In fp16 a mean over many rows and a small upstream factor would be below the smallest number, 6e-8."""
    x, w, targets = inputs(torch.float16)
    (cross_entropy_triton(x, w, targets) * 1e-6).backward()
    wide, wide_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    (cross_entropy_eager(wide, wide_w, targets) * 1e-6).backward()
    assert (w.grad - wide_w.grad).norm() < 1e-2 * wide_w.grad.norm()


def test_the_upstream_factor_is_not_rounded_to_the_gradients_dtype():
    x, w, targets = inputs(torch.bfloat16)
    whole, third = (torch.autograd.grad(cross_entropy_triton(x, w, targets, reduction="sum") * scale, (x, w))
                    for scale in (1.0, 1 / 3))
    for one, scaled in zip(whole, third, strict=True):
        assert torch.equal(scaled, (one.float() * torch.tensor(1 / 3)).to(one.dtype))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name().split("::")[1]] if func.namespace == "kernels" else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction, forward, backward", [
    ("sum", "cross_entropy_sum", []), ("mean", "cross_entropy_sum", []),
    ("none", "cross_entropy_rows", ["cross_entropy_rows_bwd"]),
])
def test_gradients_are_computed_once_and_only_when_wanted(reduction, forward, backward):
    x, w, targets = inputs()
    with Operators() as seen:
        cross_entropy_triton(x, w, targets, reduction=reduction).sum().backward()
    assert seen.names == [forward, *backward]
    with Operators() as seen, torch.no_grad():
        cross_entropy_triton(x, w, targets, reduction=reduction)
    assert seen.names == ["cross_entropy_rows"]


@pytest.mark.parametrize("options, sentence", [
    (dict(softcap=41.0), "cross_entropy[triton]: softcap must be above 0 and at most 40, got 41 (x is (10, 32), "
                         "torch.float32)"),
    (dict(reduction="max"), "cross_entropy[triton]: reduction must be none, mean or sum, got 'max'"),
])
def test_what_the_kernel_cannot_do_is_a_sentence(options, sentence):
    with pytest.raises(KernelError) as error:
        cross_entropy_triton(*inputs(), **options)
    assert str(error.value) == sentence


def test_liger_is_called_as_its_0_8_5_wants_and_named_when_missing(monkeypatch):
    seen = []

    def apply(x, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
              return_z_loss, accum_dtype):
        seen.append((x.dtype, weight.dtype, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction,
                     softcap, return_z_loss, accum_dtype))
        return "loss", None, None, None

    module = SimpleNamespace(LigerFusedLinearCrossEntropyFunction=SimpleNamespace(apply=apply))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    x, w, targets = inputs(torch.bfloat16)
    assert cross_entropy_liger(x, w, targets, reduction="sum") == "loss"
    assert seen == [(torch.bfloat16, torch.bfloat16, None, None, -1, 0.0, 0.0, "sum", 15.0, False, torch.float32)]
    monkeypatch.undo()
    assert why_not(BACKENDS["cross_entropy"]["liger"], torch.device("cpu")) == "needs a CUDA GPU, this is cpu"
