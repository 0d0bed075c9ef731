"""Muon's step for banks of matrices: momentum, Nesterov, one shared orthogonalization, decay and update.

buffer <- momentum buffer + (1 - momentum) g;  u = (1 - momentum) g + momentum buffer;  O = newton_schulz(u);
p <- (1 - lr decay) p - lr sqrt(max(1, rows/cols)) O.
Banks of one shape and its transpose share a single orthogonalization batch (c_fc with c_proj^T: 40 matrices at d20
instead of two batches of 20), each bank scaled by its own orientation.
Kernels: one pass before (read g and buffer, write buffer and u, the latter cast, transposed where the bank is tall and
straight into its place in the batch; squares summed per tile) and one after (read O and p, write p). In bf16 that is
14 and 10 bytes per element and no other copy: eager stacks, transposes, normalizes and casts in passes of their own.
The norm of a matrix is the sum of its tiles' partial sums in a fixed order, so a step repeats bit for bit.
Numerics: fp32, u and O rounded once to compute_dtype. Learning rate, momentum and decay are 0-D tensors that the
kernels read: they change every step and must neither recompile nor synchronize.
Source: Keller Jordan's Muon, nanochat (Nov 2025).
Limits: banks are contiguous fp32.
"""

import torch

from kernels.device import pick_tile, tl, triton
from kernels.registry import KernelError, Op, custom_op, declare, register

# N matrices in a bank, rows x cols each; in the batch m x n, m <= n

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


# keyed (sm,); not tuned on a GPU yet: square tiles, so that a transposed one is read and written in whole lines
TILES = {
    (0,): dict(BLOCK=32, num_warps=1),
    (80,): dict(BLOCK=64, num_warps=8),
}


@triton.jit
def _muon_before_kernel(grad_ptr, buffer_ptr, momentum_ptr, batch_ptr, square_ptr, first, rows, cols,
                        TALL: tl.constexpr, BLOCK: tl.constexpr):
    """Momentum, Nesterov and cast of one tile into matrix `first` + i of the batch, and its sum of squares."""
    r, c = _tile(cols, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    at = matrix * rows * cols + r[:, None] * cols + c[None, :]
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    momentum = tl.load(momentum_ptr)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    buffer = tl.load(buffer_ptr + at, mask=inside, other=0.0)
    buffer += (1 - momentum) * (grad - buffer)
    tl.store(buffer_ptr + at, buffer, mask=inside)
    update = (grad + momentum * (buffer - grad)).to(batch_ptr.dtype.element_ty)
    wide = update.to(tl.float32)  # the norm is that of the rounded matrix
    square = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    tl.store(square_ptr + (first + matrix) * tl.num_programs(0) + tl.program_id(0), square)
    base = (first + matrix) * rows * cols
    if TALL:
        tl.store(batch_ptr + base + c[:, None] * rows + r[None, :], tl.trans(update),
                 mask=(c < cols)[:, None] & (r < rows)[None, :])
    else:
        tl.store(batch_ptr + base + r[:, None] * cols + c[None, :], update, mask=inside)


@triton.jit
def _muon_after_kernel(param_ptr, batch_ptr, lr_ptr, decay_ptr, scale, first, rows, cols, TALL: tl.constexpr,
                       BLOCK: tl.constexpr):
    """Decay and update of one tile of the parameters from matrix `first` + i of the batch."""
    r, c = _tile(cols, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    at = matrix * rows * cols + r[:, None] * cols + c[None, :]
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    base = (first + matrix) * rows * cols
    if TALL:
        o = tl.trans(tl.load(batch_ptr + base + c[:, None] * rows + r[None, :],
                             mask=(c < cols)[:, None] & (r < rows)[None, :], other=0.0))
    else:
        o = tl.load(batch_ptr + base + r[:, None] * cols + c[None, :], mask=inside, other=0.0)
    lr = tl.load(lr_ptr)
    param = tl.load(param_ptr + at, mask=inside, other=0.0)
    param = param * (1 - lr * tl.load(decay_ptr)) - lr * scale * o.to(tl.float32)
    tl.store(param_ptr + at, param, mask=inside)


@triton.jit
def _tile(cols, BLOCK: tl.constexpr):
    """Return the rows and columns of this program's tile."""
    tiles_c = tl.cdiv(cols, BLOCK)
    r = tl.program_id(0) // tiles_c * BLOCK + tl.arange(0, BLOCK)
    return r, tl.program_id(0) % tiles_c * BLOCK + tl.arange(0, BLOCK)


def _launches(banks: list[torch.Tensor]):
    """Yield for each bank (bank, grid, number of its first matrix in the batch, rows, cols, constants)."""
    first = 0
    for bank in banks:
        tile = pick_tile(TILES, bank.device)
        N, rows, cols = bank.shape
        tiles = triton.cdiv(rows, tile["BLOCK"]) * triton.cdiv(cols, tile["BLOCK"])
        yield bank, (tiles, N), first, rows, cols, dict(TALL=is_tall(bank), **tile)
        first += N


def _fake_before(grads: list[torch.Tensor], buffers: list[torch.Tensor], momentum: torch.Tensor,
                 dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    N, (m, n) = sum(len(g) for g in grads), sorted(grads[0].shape[1:])
    batch = torch.empty((N, m, n), dtype=dtype, device=momentum.device)
    return batch, torch.empty(N, dtype=torch.float32, device=momentum.device)


@custom_op("muon_before", fake=_fake_before, mutates=("buffers",))
def _before(grads: list[torch.Tensor], buffers: list[torch.Tensor], momentum: torch.Tensor,
            dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Update the buffers -> (batch of wide update matrices (N, m, n), their Frobenius norms (N,))."""
    batch, _ = _fake_before(grads, buffers, momentum, dtype)
    tiles = next(_launches(grads))[1][0]  # a bank and its transpose have equally many
    squares = torch.empty((len(batch), tiles), dtype=torch.float32, device=batch.device)
    for (grad, grid, first, rows, cols, constants), buffer in zip(_launches(grads), buffers, strict=True):
        _muon_before_kernel[grid](grad, buffer, momentum, batch, squares, first, rows, cols, **constants)
    return batch, squares.sum(dim=1).sqrt()


@custom_op("muon_after", fake=lambda *_: None, mutates=("params",))
def _after(params: list[torch.Tensor], orthogonal: torch.Tensor, lr: torch.Tensor, weight_decay: torch.Tensor) -> None:
    """Decay the parameters and subtract their matrices of the batch, each bank scaled by its orientation."""
    for param, grid, first, rows, cols, constants in _launches(params):
        _muon_after_kernel[grid](param, orthogonal, lr, weight_decay, shape_scale(param), first, rows, cols,
                                 **constants)


# first choice: 2 passes over memory where a compiled eager step has at least 3 (norm, transposed copies); not measured
@register("muon_update", "triton", needs=("triton",), uses=("newton_schulz",), rank=40,
          dtypes=(torch.float32, torch.bfloat16, torch.float16))
def muon_update_triton(params: list[torch.Tensor], grads: list[torch.Tensor], buffers: list[torch.Tensor],
                       lr: torch.Tensor, momentum: torch.Tensor, weight_decay: torch.Tensor,
                       compute_dtype: torch.dtype, *, newton_schulz) -> None:
    """Our kernels around the resolved newton_schulz, which gets the norms with the batch."""
    for bank in (*params, *grads, *buffers):
        if not bank.is_contiguous() or bank.dtype != torch.float32:
            raise KernelError("muon_update[triton]: banks must be contiguous fp32, got strides "
                              f"{bank.stride()} ({tuple(bank.shape)}, {bank.dtype})")
    batch, norm = _before(grads, buffers, momentum, compute_dtype)
    _after(params, newton_schulz(batch, norm=norm), lr, weight_decay)


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
    cases={"tiny": dict(banks=((2, 40, 40),)), "odd_shared": dict(banks=((3, 40, 17), (2, 17, 40))),
           "odd_tall": dict(banks=((1, 33, 20),)), "d20_square": dict(banks=((80, 1280, 1280),)),
           "d12": dict(banks=((12, 3072, 768), (12, 768, 3072))),
           "d20": dict(banks=((20, 5120, 1280), (20, 1280, 5120))),
           "d26": dict(banks=((26, 6656, 1664), (26, 1664, 6656)))},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: _elements(c) * (5 * 4 + 2 * itemsize),  # p, g, buffer read; p, buffer written; u, O
    mutates=("params", "buffers"),
))
