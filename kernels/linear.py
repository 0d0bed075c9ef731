"""Linear layer without bias: y = x W^T in x's dtype.

Master weights are fp32; the cast to the compute dtype is part of the op, so no autocast is needed and a backend may
quantize instead. Weights already in x's dtype, as at inference, are used as they are.
"""

import torch
import torch.nn.functional as F

from kernels.registry import Op, declare, register

# M rows, C input dim, N output dim


@register("linear", "eager")
def linear_eager(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply x (..., C) by w (N, C) transposed -> (..., N) in x's dtype."""
    return F.linear(x, w.to(x.dtype))


def _inputs(case, dtype, device, generator) -> dict:
    x = torch.randn(case["M"], case["C"], generator=generator).to(device, dtype)
    w = torch.randn(case["N"], case["C"], generator=generator).to(device) * case["C"] ** -0.5
    return {"x": x, "w": w.to(torch.promote_types(dtype, torch.float32))}


OP = declare(Op(
    "linear",
    cases={"tiny": dict(M=16, C=64, N=32), "odd": dict(M=7, C=80, N=33), "d12": dict(M=65536, C=768, N=3072),
           "d20": dict(M=65536, C=1280, N=5120), "d26": dict(M=32768, C=1664, N=6656)},
    make_inputs=_inputs,
    flops=lambda c: 2 * c["M"] * c["C"] * c["N"],
    bytes=lambda c, itemsize: (c["M"] * (c["C"] + c["N"]) + c["N"] * c["C"]) * itemsize,
    grad_inputs=("x", "w"),
))
