"""Muon's step for banks of matrices: momentum, Nesterov, one shared orthogonalization, decay and update.

buffer <- momentum buffer + (1 - momentum) g;  u = (1 - momentum) g + momentum buffer;  O = newton_schulz(u);
p <- (1 - lr decay) p - lr sqrt(max(1, rows/cols)) O.
Banks of one shape and its transpose share a single orthogonalization batch (c_fc with c_proj^T: 40 matrices at d20
instead of two batches of 20), each bank scaled by its own orientation. Learning rate, momentum and decay are 0-D
tensors: they change every step and must not recompile. Source: Keller Jordan's Muon, nanochat (Nov 2025).
"""

import torch

from kernels.registry import Op, declare, register

# N matrices in a bank, rows x cols each


@register("muon_update", "eager", uses=("newton_schulz",))
def muon_update_eager(params: list[torch.Tensor], grads: list[torch.Tensor], buffers: list[torch.Tensor],
                      lr: torch.Tensor, momentum: torch.Tensor, weight_decay: torch.Tensor,
                      compute_dtype: torch.dtype, *, newton_schulz) -> None:
    """Update banks params[i] (N_i, rows_i, cols_i) fp32 in place; buffers[i] of equal shape are updated too.

    All banks have the same shape up to transposition. Newton-Schulz runs in compute_dtype.
    """
    updates = []
    for grad, buffer in zip(grads, buffers, strict=True):
        buffer.lerp_(grad, 1 - momentum)
        update = torch.lerp(grad, buffer, momentum)
        updates.append((update.mT if is_tall(update) else update).to(compute_dtype))
    orthogonal = newton_schulz(torch.cat(updates)).split([len(p) for p in params])
    for param, o in zip(params, orthogonal, strict=True):
        o = o.mT if is_tall(param) else o
        param.mul_(1 - lr * weight_decay).sub_(o.to(param.dtype) * (lr * shape_scale(param)))


def is_tall(bank: torch.Tensor) -> bool:
    return bank.size(-2) > bank.size(-1)


def shape_scale(bank: torch.Tensor) -> float:
    """Return max(1, rows/cols)^0.5, which keeps the update's RMS alike for tall and wide matrices."""
    return max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5


def _inputs(case, dtype, device, generator) -> dict:
    banks = [(n, r, c) for n, r, c in case["banks"]]
    make = lambda: [torch.randn(b, generator=generator).to(device) for b in banks]  # noqa: E731
    scalar = lambda x: torch.tensor(x, device=device)  # noqa: E731
    return {"params": make(), "grads": make(), "buffers": make(), "lr": scalar(0.02), "momentum": scalar(0.95),
            "weight_decay": scalar(0.1), "compute_dtype": dtype}


def _elements(case) -> int:
    return sum(n * r * c for n, r, c in case["banks"])


OP = declare(Op(
    "muon_update",
    cases={"tiny": dict(banks=((2, 32, 32),)), "odd_shared": dict(banks=((3, 40, 17), (2, 17, 40))),
           "d12": dict(banks=((12, 3072, 768), (12, 768, 3072))),
           "d20": dict(banks=((20, 5120, 1280), (20, 1280, 5120))),
           "d26": dict(banks=((26, 6656, 1664), (26, 1664, 6656)))},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: _elements(c) * (5 * 4 + 2 * itemsize),  # p, g, buffer read; p, buffer written; u, O
    mutates=("params", "buffers"),
))
