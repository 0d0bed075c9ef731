"""relu2 beyond parity: special values, and the adapter to Liger-Kernel against a stand-in for the package."""

import sys
import types

import pytest
import torch

from kernels.registry import BACKENDS, why_not
from kernels.relu2 import relu2_eager, relu2_liger, relu2_triton

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_special_values_are_eagers():
    x = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1e-30, 2.0, torch.inf, torch.nan], requires_grad=True)
    for fn in (relu2_triton, relu2_eager):
        y = fn(x)
        assert y[:4].eq(0).all() and y[5] == 4 and y[6] == torch.inf and y[7].isnan()
        dx, = torch.autograd.grad(y, x, torch.full_like(x, 3.0))
        assert dx[:4].eq(0).all() and dx[5] == 12 and dx[6] == torch.inf


def test_liger_gets_contiguous_tensors_in_its_own_order(monkeypatch):
    """The package's signatures of 0.8.5: relu_squared_forward(X), relu_squared_backward(X, dY)."""
    def forward(X):
        assert X.is_contiguous()
        return X.clamp(min=0) ** 2

    def backward(X, dY):
        assert X.is_contiguous() and dY.is_contiguous()
        return 2 * X.clamp(min=0) * dY

    package = types.ModuleType("liger_kernel.ops.relu_squared")
    package.relu_squared_forward, package.relu_squared_backward = forward, backward
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    x = torch.randn(6, 10).t().requires_grad_()
    dy = torch.randn(6, 10).t()
    y, expected = relu2_liger(x), relu2_eager(x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


def test_liger_says_why_it_is_unavailable():
    assert why_not(BACKENDS["relu2"]["liger"], CPU) == "needs a CUDA GPU, this is cpu"
