"""Newton-Schulz orthogonalization: push the singular values of each matrix towards 1, the core of Muon.

X0 = G / (|G|_F + 1e-7), then five times A = X X^T, X <- a X + (b A + c A A) X with the quintic's coefficients; the
result has singular values in about [0.7, 1.2], not exactly 1. Matrices are wide (m <= n), which keeps A small.
Numerics: in the input's dtype (bf16 on GPUs, fp32 on CPU). Source: Keller Jordan's Muon, nanochat (Nov 2025).
"""

import torch

from kernels.registry import Op, declare, register

# N matrices, m rows, n columns, m <= n

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
EPS = 1e-7


@register("newton_schulz", "eager")
def newton_schulz_eager(g: torch.Tensor, coefficients: tuple = QUINTIC) -> torch.Tensor:
    """Orthogonalize g (N, m, n), m <= n, with one (a, b, c) per step -> (N, m, n) in g's dtype."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + EPS)
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _inputs(case, dtype, device, generator) -> dict:
    return {"g": torch.randn(case["N"], case["m"], case["n"], generator=generator).to(device, dtype)}


def _flops(case) -> float:
    """Count full products; a symmetric kernel does fewer."""
    m, n = case["m"], case["n"]
    return len(QUINTIC) * case["N"] * (4 * m * m * n + 2 * m ** 3)


OP = declare(Op(
    "newton_schulz",
    cases={"tiny": dict(N=2, m=32, n=32), "odd": dict(N=3, m=17, n=40), "one": dict(N=1, m=16, n=64),
           "d12": dict(N=24, m=768, n=3072), "d20_square": dict(N=80, m=1280, n=1280),
           "d20": dict(N=40, m=1280, n=5120), "d26": dict(N=52, m=1664, n=6656)},
    make_inputs=_inputs,
    flops=_flops,
    bytes=lambda c, itemsize: 2 * c["N"] * c["m"] * c["n"] * itemsize,
))
