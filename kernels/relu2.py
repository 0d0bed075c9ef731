"""Squared ReLU: y = relu(x)^2, the MLP's activation. Source: nanochat (Nov 2025), arXiv 2109.08668."""

import torch
import torch.nn.functional as F

from kernels.registry import Op, declare, register


@register("relu2", "eager")
def relu2_eager(x: torch.Tensor) -> torch.Tensor:
    """Square the positive part of x (any shape); same shape and dtype."""
    return F.relu(x).square()


def _inputs(case, dtype, device, generator) -> dict:
    return {"x": torch.randn(case["rows"], case["C"], generator=generator).to(device, dtype)}


OP = declare(Op(
    "relu2",
    cases={"tiny": dict(rows=8, C=64), "odd_rows_7_c_81": dict(rows=7, C=81),
           "d12": dict(rows=65536, C=3072), "d20": dict(rows=65536, C=5120), "d26": dict(rows=32768, C=6656)},
    make_inputs=_inputs,
    flops=lambda c: 2 * c["rows"] * c["C"],
    bytes=lambda c, itemsize: 2 * c["rows"] * c["C"] * itemsize,
    grad_inputs=("x",),
))
