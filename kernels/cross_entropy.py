"""Output head and loss in one op: logits z = softcap * tanh(x W^T / softcap), then cross-entropy.

One op because the logits are the largest tensor of the model: 32 x 2,048 rows by 65,536 columns are 8 GiB in bf16 and
16 GiB in fp32. A fused backend never holds them whole: chunks of rows are multiplied, turned into losses and, when
gradients are wanted, in place into dz, from which dX and dW leave at once. Rows with target -1 are ignored; the mean
is over the others.
The softcap bounds the logits, so the kernel sums exponentials at a fixed shift, block by block, without a running
maximum. With q = 1 - tanh(x W^T / softcap), s = sum exp(-softcap q) and target y: loss = log s + softcap q_y,
dz = (exp(-softcap q) / s - [column = y]) q (2 - q).
Numerics: the product in x's dtype, all else in fp32; dW is summed over the chunks in fp32. "mean" and the upstream
gradient scale the finished dX and dW, so that small factors never reach a narrow dz.
Source: nanochat (Nov 2025); gradients in the forward pass as in Liger-Kernel.
Limits: softcap at most 40, where exp(-2 softcap) is still a normal fp32. A target outside the vocabulary gives NaN.
"""

import torch
import torch.nn.functional as F

from kernels.device import pick_tile, tl, triton
from kernels.registry import KernelError, Op, custom_op, declare, register

# N rows, C model dim, V vocab

IGNORE = -1
MAX_SOFTCAP = 40.0


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


# keyed (sm,); not tuned on a GPU yet. ROWS is the chunk: 8,192 rows of 65,536 bf16 logits are 1 GiB, and dW (fp32,
# 335 MB at d20) is read and written once per chunk. A program does one row in blocks of 16 columns per thread: a whole
# row in registers spills.
TILES = {
    (0,): dict(ROWS=4, BLOCK_V=64, num_warps=1),
    (80,): dict(ROWS=8192, BLOCK_V=4096, num_warps=8),
}


@triton.jit
def _cross_entropy_kernel(z_ptr, target_ptr, upstream_ptr, loss_ptr, V, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
                          SCALED: tl.constexpr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 65,536 rows of 65,536 columns pass 2^31
    z_ptr += row * V
    target = tl.load(target_ptr + row)
    n = tl.where(target == -1, 0, V)  # an ignored row has no columns to read
    # read before any thread overwrites it with its gradient
    z_y = tl.load(z_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, n, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)
        q, _ = _softcap(z, SOFTCAP)
        total += tl.where(cols < n, tl.exp(-SOFTCAP * q), 0.0)
    log_sum = tl.log(tl.where(n == 0, 1.0, tl.sum(total, axis=0)))
    q_y, _ = _softcap(z_y, SOFTCAP)
    tl.store(loss_ptr + row, tl.where(n == 0, 0.0, log_sum + SOFTCAP * q_y))
    if GRADIENT:
        upstream = tl.load(upstream_ptr + row) if SCALED else 1.0
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(z_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)
            q, slope = _softcap(z, SOFTCAP)
            dz = upstream * (tl.exp(-SOFTCAP * q - log_sum) - tl.where(cols == target, 1.0, 0.0)) * slope
            tl.store(z_ptr + cols, tl.where(cols < n, dz, 0.0).to(z_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def _softcap(z, SOFTCAP: tl.constexpr):
    """Return q = 1 - tanh(z / SOFTCAP) and the slope 1 - tanh^2, the latter not as a difference of numbers near 1."""
    u = z * (2 / SOFTCAP)
    e = tl.exp(tl.where(u > 80, 80.0, u))  # inf * 0 would be NaN; tl.minimum would drop a NaN
    r = 1 / (e + 1)
    return 2 * r, 4 * (e * r) * r


def _chunks(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor | None, loss: torch.Tensor,
            softcap: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill loss (N,) chunk by chunk -> (dX, dW in fp32), both empty without `gradient`."""
    tile = pick_tile(TILES, x.device)
    rows = tile["ROWS"]
    launch = {name: value for name, value in tile.items() if name != "ROWS"}
    weights, targets = w.to(x.dtype), targets.contiguous()
    dx = torch.empty(x.shape if gradient else 0, dtype=x.dtype, device=x.device)
    dw = torch.empty(w.shape if gradient else 0, dtype=torch.float32, device=x.device)
    for start in range(0, x.size(0), rows):
        chunk = slice(start, start + rows)
        z = torch.mm(x[chunk], weights.t())
        _cross_entropy_kernel[(z.size(0),)](z, targets[chunk], targets if upstream is None else upstream[chunk],
                                            loss[chunk], z.size(1), SOFTCAP=softcap, GRADIENT=gradient,
                                            SCALED=upstream is not None, **launch)
        if gradient:
            torch.mm(z, weights, out=dx[chunk])
            _accumulate(dw, z.t(), x[chunk], first=start == 0)
    return dx, dw


# torch 2.9's addmm wants the addend in the operands' dtype; from 2.10 on it may have the output's
ADDMM_ADDS_WIDE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total (fp32) <- a @ b, plus total unless `first`: narrow operands, products summed in fp32."""
    beta = 0 if first else 1
    if a.dtype == torch.float32 or a.device.type == "cpu":  # widened operands have the same products
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)
    elif ADDMM_ADDS_WIDE:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32)
        total.copy_(product) if first else total.add_(product)


def _fake_loss(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    return torch.empty(x.size(0), dtype=torch.float32, device=x.device)


def _fake_gradients(x: torch.Tensor, w: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(w.shape, dtype=w.dtype, device=w.device)


def _fake_sum(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor,
              softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty((), dtype=torch.float32, device=x.device), *_fake_gradients(x, w)


@custom_op("cross_entropy_rows", fake=_fake_loss)
def _rows(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    """Loss of every row, without gradients."""
    loss = _fake_loss(x, w, targets, softcap)
    _chunks(x, w, targets, None, loss, softcap, gradient=False)
    return loss


@custom_op("cross_entropy_rows_bwd", fake=_fake_gradients)
def _rows_bwd(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor,
              softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """dX and dW where every row has its own upstream gradient: the logits are multiplied a second time."""
    loss = _fake_loss(x, w, targets, softcap)
    dx, dw = _chunks(x, w, targets, upstream.contiguous(), loss, softcap, gradient=True)
    return dx, dw.to(w.dtype)


@custom_op("cross_entropy_sum", fake=_fake_sum)
def _sum(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor,
         softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss with its dX and dW, from one product of logits."""
    loss = _fake_loss(x, w, targets, softcap)
    dx, dw = _chunks(x, w, targets, None, loss, softcap, gradient=True)
    return loss.sum(), dx, dw.to(w.dtype)


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _save_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else backward fills zeros of dX's and dW's size, for outputs nobody uses
    ctx.save_for_backward(*output[1:])


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """Multiply in fp32 and round once: a 0-D factor would first be rounded to the gradient's dtype (bf16: 0.2 %)."""
    return torch.mul(gradient, upstream[None], out=torch.empty_like(gradient))


_rows.register_autograd(lambda ctx, upstream: (*_rows_bwd(*ctx.saved_tensors, upstream, ctx.softcap), None, None),
                        setup_context=_save_inputs)
_sum.register_autograd(lambda ctx, upstream, *_: (*(_scaled(g, upstream) for g in ctx.saved_tensors), None, None),
                       setup_context=_save_gradients)


# before liger: larger chunks (8 read-modify-writes of dW at d20 for its 32) and no host sync; not measured
@register("cross_entropy", "triton", needs=("triton",), rank=40,
          dtypes=(torch.float32, torch.bfloat16, torch.float16))
def cross_entropy_triton(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: float = 15.0,
                         reduction: str = "mean") -> torch.Tensor:
    """Our kernel; gradients are computed in the forward pass, except with reduction="none"."""
    if not 0 < softcap <= MAX_SOFTCAP:
        raise KernelError(f"cross_entropy[triton]: softcap must be above 0 and at most {MAX_SOFTCAP:g}, "
                          f"got {softcap:g} (x is {tuple(x.shape)}, {x.dtype})")
    if reduction not in ("none", "mean", "sum"):
        raise KernelError(f"cross_entropy[triton]: reduction must be none, mean or sum, got {reduction!r}")
    if reduction == "none":
        return _rows(x, w, targets, softcap)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    total = _sum(x, w, targets, softcap)[0] if wants_gradient else _rows(x, w, targets, softcap).sum()
    if reduction == "sum":
        return total
    count = (targets != IGNORE).sum()
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)  # eager's 0/0, and its zero gradient


@register("cross_entropy", "liger", needs=("cuda", "liger_kernel"), rank=60)
def cross_entropy_liger(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: float = 15.0,
                        reduction: str = "mean") -> torch.Tensor:
    """Liger-Kernel's, written for 0.8.5, not run against it yet; dW summed in fp32 (its default is w's dtype)."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    return LigerFusedLinearCrossEntropyFunction.apply(x, w.to(x.dtype), targets, None, None, IGNORE, 0.0, 0.0,
                                                      reduction, softcap, False, torch.float32)[0]


def _inputs(case, dtype, device, generator) -> dict:
    N, C, V = case["N"], case["C"], case["V"]
    x = torch.randn(N, C, generator=generator).to(device, dtype)
    w = torch.randn(V, C, generator=generator).to(device) * case["spread"] * C ** -0.5
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:: case["ignore_every"]] = IGNORE
    return {"x": x, "w": w.to(torch.promote_types(dtype, torch.float32)), "targets": targets.to(device),
            "reduction": case["reduction"]}


def _case(N, C, V, reduction="mean", ignore_every=5, spread=3) -> dict:
    """spread: size of the logits; at 3 the softcap of 15 matters, at 60 it saturates."""
    return dict(N=N, C=C, V=V, reduction=reduction, ignore_every=ignore_every, spread=spread)


OP = declare(Op(
    "cross_entropy",
    cases={"tiny": _case(16, 64, 128), "odd_V101": _case(7, 80, 101, "sum"), "odd_none": _case(9, 64, 130, "none"),
           "odd_saturated": _case(6, 64, 33, "none", spread=40), "all_ignored": _case(3, 64, 40, "sum", 1),
           "d12": _case(65536, 768, 65536), "d20": _case(65536, 1280, 65536),
           "d20_none": _case(65536, 1280, 65536, "none"), "d26": _case(32768, 1664, 65536)},
    make_inputs=_inputs,
    flops=lambda c: 2 * c["N"] * c["C"] * c["V"],
    bytes=lambda c, itemsize: (c["N"] + c["V"]) * c["C"] * itemsize,
    grad_inputs=("x", "w"),
))
