"""RMSNorm without weight: y = x / sqrt(mean(x^2) + eps) over the last dimension.

Numerics: eps is fp32's epsilon in every dtype, also fp64, where torch's default is another number (2.2e-16); the
sum of squares accumulates in fp32 or wider. Source: nanochat (Nov 2025), arXiv 1910.07467.
"""

import torch
import torch.nn.functional as F

from kernels.registry import RMS_NORM_EPS, Op, declare, register

# B batch, T tokens, C model dim

@register("rms_norm", "eager")
def rms_norm_eager(x: torch.Tensor) -> torch.Tensor:
    """Normalize x (..., C) over C; same shape and dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


def _inputs(case, dtype, device, generator) -> dict:
    return {"x": torch.randn(case["rows"], case["C"], generator=generator).to(device, dtype)}


OP = declare(Op(
    "rms_norm",
    cases={"tiny": {"rows": 8, "C": 64}, "odd_rows_7_c_80": {"rows": 7, "C": 80}, "one_row": {"rows": 1, "C": 256},
           "d12": {"rows": 65536, "C": 768}, "d20": {"rows": 65536, "C": 1280}, "d26": {"rows": 32768, "C": 1664}},
    make_inputs=_inputs,
    flops=lambda c: 3 * c["rows"] * c["C"],
    bytes=lambda c, itemsize: 2 * c["rows"] * c["C"] * itemsize,
    grad_inputs=("x",),
))
