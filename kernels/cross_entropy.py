"""Output head and loss in one op: logits z = softcap * tanh(x W^T / softcap), then cross-entropy.

One op because the logits are the largest tensor of the model: 32 x 2,048 rows by 65,536 columns are 16 GiB in fp32,
and a fused backend never holds them whole. Rows with target -1 are ignored; the mean is over the others.
Numerics: the product in x's dtype, softcap and softmax in fp32 or wider. Source: nanochat (Nov 2025).
"""

import torch
import torch.nn.functional as F

from kernels.registry import Op, declare, register

# N rows, C model dim, V vocab

IGNORE = -1


@register("cross_entropy", "eager")
def cross_entropy_eager(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: float = 15.0,
                        reduction: str = "mean") -> torch.Tensor:
    """Score x (N, C) against w (V, C) for targets (N,) int64 -> a scalar, or (N,) with reduction="none"."""
    return F.cross_entropy(softcapped_logits(x, w, softcap), targets, ignore_index=IGNORE, reduction=reduction)


def softcapped_logits(x: torch.Tensor, w: torch.Tensor, softcap: float = 15.0) -> torch.Tensor:
    """Return the logits (..., V) of x (..., C) for w (V, C) in fp32 or wider."""
    logits = F.linear(x, w.to(x.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap)


def _inputs(case, dtype, device, generator) -> dict:
    N, C, V = case["N"], case["C"], case["V"]
    x = torch.randn(N, C, generator=generator).to(device, dtype)
    w = torch.randn(V, C, generator=generator).to(device) * 3 * C ** -0.5  # logits of size 3: softcap matters
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:: case["ignore_every"]] = IGNORE
    return {"x": x, "w": w.to(torch.promote_types(dtype, torch.float32)), "targets": targets.to(device),
            "reduction": case["reduction"]}


def _case(N, C, V, reduction="mean", ignore_every=5) -> dict:
    return dict(N=N, C=C, V=V, reduction=reduction, ignore_every=ignore_every)


OP = declare(Op(
    "cross_entropy",
    cases={"tiny": _case(16, 64, 128), "odd_V101": _case(7, 80, 101, "sum"), "odd_none": _case(9, 64, 130, "none"),
           "d12": _case(65536, 768, 65536), "d20": _case(65536, 1280, 65536), "d26": _case(32768, 1664, 65536)},
    make_inputs=_inputs,
    flops=lambda c: 2 * c["N"] * c["C"] * c["V"],
    bytes=lambda c, itemsize: (c["N"] + c["V"]) * c["C"] * itemsize,
    grad_inputs=("x", "w"),
))
