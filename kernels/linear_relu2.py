"""The MLP: y = relu(x F^T)^2 P^T, its activation the epilogue of the GEMM before it, forward and backward.

One persistent kernel computes a GEMM tile by tile and finishes each in registers. Forward: post = relu(x F^T)^2; the
GEMM's result x F^T never reaches memory. Backward: dpre = (dy P) * 2 sqrt(post), because relu(pre) = sqrt(post): only
post is kept. The other GEMMs (post P^T; dF = dpre^T x, dP = dy^T post, dx = dpre F) are the vendor's. The op ends after
the projection P because only then its backward contains the GEMM dy P that wants an epilogue. Against GEMM and relu2
one after the other this saves, in passes over an (M, N) tensor, two forward and two backward: 2.7 GB per layer at d20
with 65,536 tokens, and one such tensor (671 MB) kept for backward.
Numerics: products in the inputs' dtype, fp32 accumulation, one rounding of post and of dpre. post is not the square of
a rounded x F^T, so sqrt(post) has half the relative error of the relu(pre) that eager keeps, and dpre needs no looser
tolerance. fp16 is not offered: there post underflows to 0 from relu(pre) < 2.4e-4.
Source: the fused linear and squared ReLU of modded-nanogpt (2025-12). Limits: C, N, O are multiples of 16 bytes (TMA).
"""

from collections.abc import Callable

import torch

from kernels.device import pick_tile, sm_count, tl, triton
from kernels.registry import KernelError, Op, custom_op, declare, misfit, register

# M rows, C input dim, N hidden dim, O output dim (C in the model); fc (N, C), proj (O, N)


@register("linear_relu2", "eager", uses=("linear", "relu2"))
def linear_relu2_eager(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor, fc_codes: tuple | None = None,
                       proj_codes: tuple | None = None, *, linear: Callable, relu2: Callable) -> torch.Tensor:
    """Run x (..., C) through both matrices -> (..., O) in x's dtype; codes are the matrices in fp8, see linear."""
    return linear(relu2(linear(x, fc, fc_codes)), proj, proj_codes)


# keyed (sm,), BLOCK_N and BLOCK_K in bytes: fp32, which is for checks and has no tensor cores here, takes half as many
# columns. Not tuned on a GPU yet. GROUP_M rows of tiles share their columns of the weights in L2.
TILES = {
    (0,): dict(BLOCK_M=32, BLOCK_N=256, BLOCK_K=128, GROUP_M=3, TMA=True, num_warps=1, num_stages=1),
    (80,): dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, TMA=False, num_warps=8, num_stages=4),
    (90,): dict(BLOCK_M=128, BLOCK_N=512, BLOCK_K=128, GROUP_M=8, TMA=True, num_warps=8, num_stages=3),
}


@triton.jit
def _offsets(row, col, rows, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    r, c = row + tl.arange(0, HEIGHT), col + tl.arange(0, WIDTH)
    return r.to(tl.int64)[:, None] * cols + c[None, :], (r < rows)[:, None] & (c < cols)[None, :]


@triton.jit
def _load(source, row, col, rows, cols, TMA: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Load a block of a contiguous (rows, cols) matrix, a descriptor with TMA, a pointer without; 0 outside."""
    if TMA:
        block = source.load([row, col])
    else:
        at, inside = _offsets(row, col, rows, cols, HEIGHT, WIDTH)
        block = tl.load(source + at, mask=inside, other=0.0)
    return block


@triton.jit
def _finish(acc, post, out, row, col, rows, cols, BACKWARD: tl.constexpr, TMA: tl.constexpr, HEIGHT: tl.constexpr,
            WIDTH: tl.constexpr):
    if BACKWARD:
        kept = _load(post, row, col, rows, cols, TMA, HEIGHT, WIDTH)
        result = acc * 2 * tl.sqrt(kept.to(tl.float32))
    else:
        result = tl.where(acc < 0, 0.0, acc * acc)  # tl.maximum would turn NaN into 0
    if TMA:
        out.store([row, col], result.to(out.dtype))
    else:
        at, inside = _offsets(row, col, rows, cols, HEIGHT, WIDTH)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_relu2_kernel(a, b, post, out, M, N, K, BACKWARD: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // (GROUP_M * tiles_n) * GROUP_M
        rows = tl.minimum(tiles_m - first, GROUP_M)
        m = (first + tile % (GROUP_M * tiles_n) % rows) * BLOCK_M
        n = tile % (GROUP_M * tiles_n) // rows * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            left = _load(a, m, k, M, K, TMA, BLOCK_M, BLOCK_K)
            if BACKWARD:
                right = _load(b, k, n, K, N, TMA, BLOCK_K, BLOCK_N)
            else:
                right = _load(b, n, k, N, K, TMA, BLOCK_N, BLOCK_K).T
            acc = tl.dot(left, right, acc, input_precision="ieee")
        # in two halves, so that post and out need half the shared memory beside the pipeline's
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        acc_0, acc_1 = tl.split(halves)
        _finish(acc_0, post, out, m, n, M, N, BACKWARD, TMA, BLOCK_M, BLOCK_N // 2)
        _finish(acc_1, post, out, m, n + BLOCK_N // 2, M, N, BACKWARD, TMA, BLOCK_M, BLOCK_N // 2)


def _launch(a: torch.Tensor, b: torch.Tensor, post: torch.Tensor, out: torch.Tensor, backward: bool) -> None:
    (M, K), N = a.shape, out.size(1)
    tile = dict(pick_tile(TILES, a.device))
    tile |= {name: tile[name] // a.element_size() for name in ("BLOCK_N", "BLOCK_K")}
    BM, BN, BK = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    matrices = [a, b, post, out]
    if tile["TMA"]:
        from triton.tools.tensor_descriptor import TensorDescriptor
        blocks = [[BM, BK], [BK, BN] if backward else [BN, BK], [BM, BN // 2], [BM, BN // 2]]
        matrices = [TensorDescriptor.from_tensor(*pair) for pair in zip(matrices, blocks, strict=True)]
    n_programs = min(sm_count(a.device), triton.cdiv(M, BM) * triton.cdiv(N, BN))
    _linear_relu2_kernel[(n_programs,)](*matrices, M, N, K, BACKWARD=backward, **tile)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as contiguous rows that begin at a multiple of 16 bytes, as TMA needs them."""
    x = x.reshape(-1, x.size(-1)).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _fake_fwd(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M = x.numel() // x.size(-1)
    return x.new_empty((*x.shape[:-1], proj.size(0))), x.new_empty((M, fc.size(0)))


@custom_op("linear_relu2_fwd", fake=_fake_fwd)
def _linear_relu2_fwd(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, post = _fake_fwd(x, fc, proj)
    _launch(_rows(x), _rows(fc.to(x.dtype)), post, post, backward=False)
    torch.mm(post, proj.to(x.dtype).t(), out=y.view(-1, y.size(-1)))
    return y, post


def _fake_bwd(dy, x, fc, proj, post):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, fc, proj))


@custom_op("linear_relu2_bwd", fake=_fake_bwd)
def _linear_relu2_bwd(dy: torch.Tensor, x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor,
                      post: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy, rows, dpre = _rows(dy), _rows(x), torch.empty_like(post)
    _launch(dy, _rows(proj.to(dy.dtype)), post, dpre, backward=True)
    dx = torch.mm(dpre, fc.to(dy.dtype)).view(x.shape)
    return dx, torch.mm(dpre.t(), rows).to(fc.dtype), torch.mm(dy.t(), post).to(proj.dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


_linear_relu2_fwd.register_autograd(lambda ctx, dy, _: _linear_relu2_bwd(dy, *ctx.saved_tensors), setup_context=_save)


# Behind eager for auto: the epilogue pays only where this GEMM reaches at least 3/4 of the vendor's speed (13 ms of a
# d20 step at 9/10 of it, 2 ms at 3/4), which is not measured yet.
@register("linear_relu2", "triton", needs=("triton",), rank=110, dtypes=(torch.float32, torch.bfloat16),
          bypasses=("linear", "relu2"), check=lambda shapes: misfit("n_embd", shapes["n_embd"], 8))
def linear_relu2_triton(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor, fc_codes: tuple | None = None,
                        proj_codes: tuple | None = None) -> torch.Tensor:
    """Our kernels; x (..., C) of any strides. Codes are refused: this backend multiplies in x's dtype."""
    step = 16 // x.element_size()
    for name, size in (("C", fc.size(1)), ("N", fc.size(0)), ("O", proj.size(0))):
        if rule := misfit(name, size, step):
            raise KernelError(f"linear_relu2[triton]: {rule} (x is {tuple(x.shape)}, {x.dtype})")
    if fc_codes is not None or proj_codes is not None:
        raise KernelError("linear_relu2[triton]: weights must be given without fp8 codes; use linear_relu2=eager")
    return _linear_relu2_fwd(x, fc, proj)[0]


def _inputs(case, dtype, device, generator) -> dict:
    M, C, N = case["M"], case["C"], case["N"]
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(M, C, generator=generator).to(device, dtype)
    fc = torch.randn(N, C, generator=generator).to(device, wide) * C ** -0.5
    return {"x": x, "fc": fc, "proj": torch.randn(C, N, generator=generator).to(device, wide) * N ** -0.5}


OP = declare(Op(
    "linear_relu2",
    cases={"tiny": dict(M=32, C=32, N=64), "odd_7_24_88": dict(M=7, C=24, N=88),
           "odd_115_72_136": dict(M=115, C=72, N=136), "d12": dict(M=65536, C=768, N=3072),
           "d20": dict(M=65536, C=1280, N=5120), "d26": dict(M=32768, C=1664, N=6656)},
    make_inputs=_inputs,
    flops=lambda c: 4 * c["M"] * c["C"] * c["N"],
    bytes=lambda c, itemsize: 2 * (c["M"] * (c["C"] + c["N"]) + c["N"] * c["C"]) * itemsize,
    grad_inputs=("x", "fc", "proj"),
))
