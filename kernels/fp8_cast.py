"""Cast to fp8 with one scale per tensor: codes, transposed codes and the scale that undoes it.

codes = round(x * 2^k) in e4m3 (activations, weights) or e5m2 (gradients), k the largest for which max |x| 2^k fits.
Fused: an fp8 GEMM contracts over rows in one place and over columns in another and wants the contracted dimension
contiguous, so a tensor is needed both ways round. One pass reads x for the maximum, one reads it and writes both: 2 + 2
+ 1 + 1 bytes a number in bf16, against 10 for maximum, cast and transpose one after the other.
Numerics: the scale is a power of two, so the product is exact and a code is a single rounding of x (to nearest even),
the same on every device; it costs less than one of e4m3's 18 binades. The maximum is exact: a maximum of bits, which
also lets NaN and infinity through; either makes the scale NaN, so that they reach the loss instead of saturating.
Source: arXiv 2209.05433 (formats); tensorwise dynamic scaling as in nanochat (2026).
Limits: x (M, K). The transposed codes have rows of M rounded up to 16, filled up with 0, which the GEMM requires.
"""

import torch

from kernels.device import pick_tile, tl, triton
from kernels.registry import Op, custom_op, declare, register

# M rows, K columns

FORMATS = {False: torch.float8_e4m3fn, True: torch.float8_e5m2}  # by `gradient`; largest 1.75 * 2^8 and 1.75 * 2^15
TOP_EXPONENT = {False: 8, True: 15}
UP_TO_1_75 = 0x1FFFFF  # added to the bits of a float it carries into the exponent when the mantissa is above 1.75
INFINITY = 0x7F800000


def _padded(M: int) -> int:
    return -(-M // 16) * 16


@register("fp8_cast", "eager")
def fp8_cast_eager(x: torch.Tensor, gradient: bool = False,
                   transpose: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cast x (M, K) -> bits of the codes uint8 (M, K) and (K, M rounded up to 16), scale fp32 (): x ~ codes * scale.

    gradient takes e5m2 instead of e4m3; without transpose the second result is empty.
    """
    x = x.float()
    bits = x.abs().amax().view(torch.int32)
    exponent = (TOP_EXPONENT[gradient] + 254 - ((bits + UP_TO_1_75) >> 23)).clamp(max=253)  # biased by 127
    finite = bits < INFINITY
    up, down = (torch.where(finite, (e << 23).view(torch.float32), torch.nan) for e in (exponent, 254 - exponent))
    codes = (x * up).to(FORMATS[gradient]).view(torch.uint8)
    if not transpose:
        return codes, codes.new_empty(0), down
    pad = codes.new_zeros(x.size(1), _padded(x.size(0)) - x.size(0))
    return codes, torch.cat((codes.t(), pad), dim=1), down


# keyed (sm,); not tuned on a GPU yet: 32 KiB of x per program and turn, at most PARTS partial maxima
TILES = {
    (0,): dict(BLOCK=256, PARTS=3, BLOCK_M=16, BLOCK_K=32, num_warps=1),
    (89,): dict(BLOCK=4096, PARTS=1024, BLOCK_M=128, BLOCK_K=64, num_warps=4),
}


@triton.jit
def _fp8_amax_kernel(x_ptr, partial_ptr, n, BLOCK: tl.constexpr):
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partial_ptr + tl.program_id(0), tl.max(most, axis=0))


@triton.jit
def _fp8_scale_kernel(partial_ptr, up_ptr, down_ptr, n_parts, TOP: tl.constexpr, PARTS: tl.constexpr,
                      CARRY: tl.constexpr, INF: tl.constexpr):
    part = tl.arange(0, PARTS)
    bits = tl.max(tl.load(partial_ptr + part, mask=part < n_parts, other=0), axis=0)
    exponent = tl.minimum(TOP + 254 - ((bits + CARRY) >> 23), 253)
    up, down = exponent << 23, (254 - exponent) << 23
    nan = 0x7FC00000
    tl.store(up_ptr, tl.where(bits < INF, up, nan).to(tl.float32, bitcast=True))
    tl.store(down_ptr, tl.where(bits < INF, down, nan).to(tl.float32, bitcast=True))


@triton.jit
def _fp8_cast_kernel(x_ptr, up_ptr, codes_ptr, codes_t_ptr, M, K, PADDED_M, GRADIENT: tl.constexpr,
                     TRANSPOSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    tiles_k = tl.cdiv(K, BLOCK_K)
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(up_ptr)
    codes = (x.to(tl.float8e5) if GRADIENT else x.to(tl.float8e4nv)).to(tl.uint8, bitcast=True)
    tl.store(codes_ptr + at, codes, mask=inside)
    if TRANSPOSE:
        codes_t = tl.trans(tl.where(inside, codes, 0))  # 0 * NaN is no 0
        at_t = k.to(tl.int64)[:, None] * PADDED_M + m[None, :]
        tl.store(codes_t_ptr + at_t, codes_t, mask=(k < K)[:, None] & (m < PADDED_M)[None, :])


def _fake(x: torch.Tensor, gradient: bool, transpose: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M, K = x.shape
    transposed = (K, _padded(M)) if transpose else (0,)
    return (x.new_empty((M, K), dtype=torch.uint8), x.new_empty(transposed, dtype=torch.uint8),
            x.new_empty((), dtype=torch.float32))


@custom_op("fp8_cast", fake=_fake)
def _fp8_cast(x: torch.Tensor, gradient: bool, transpose: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, (M, K) = x.contiguous(), x.shape
    codes, codes_t, down = _fake(x, gradient, transpose)
    tile = dict(pick_tile(TILES, x.device))
    block, parts, num_warps = tile.pop("BLOCK"), tile.pop("PARTS"), tile["num_warps"]
    n_parts = min(parts, triton.cdiv(x.numel(), block))
    partial, up = x.new_empty(n_parts, dtype=torch.int32), torch.empty_like(down)
    _fp8_amax_kernel[(n_parts,)](x, partial, x.numel(), BLOCK=block, num_warps=num_warps)
    _fp8_scale_kernel[(1,)](partial, up, down, n_parts, TOP=TOP_EXPONENT[gradient], CARRY=UP_TO_1_75, INF=INFINITY,
                            PARTS=triton.next_power_of_2(parts), num_warps=num_warps)
    rows = _padded(M) if transpose else M
    grid = (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(K, tile["BLOCK_K"]),)
    _fp8_cast_kernel[grid](x, up, codes, codes_t, M, K, _padded(M), GRADIENT=gradient, TRANSPOSE=transpose, **tile)
    return codes, codes_t, down


@register("fp8_cast", "triton", needs=("triton", "fp8"), rank=40)  # three launches; eager is a dozen
def fp8_cast_triton(x: torch.Tensor, gradient: bool = False,
                    transpose: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our kernels; x (M, K) of any strides."""
    return _fp8_cast(x, gradient, transpose)


def _inputs(case, dtype, device, generator) -> dict:
    x = torch.randn(case["M"], case["K"], generator=generator)
    if case["largest"]:
        x = x / x.abs().amax() * case["largest"]
    x = x.to(device, torch.float32 if case["master"] else dtype)
    return {"x": x, "gradient": case["gradient"], "transpose": case["transpose"]}


def _case(M: int, K: int, gradient: bool = False, transpose: bool = True, master: bool = False,
          largest: float | None = None) -> dict:
    return dict(M=M, K=K, gradient=gradient, transpose=transpose, master=master, largest=largest)


OP = declare(Op(
    "fp8_cast",
    cases={"tiny": _case(16, 32), "odd_33_50": _case(33, 50, largest=1.75001),
           "odd_gradient_7_65": _case(7, 65, gradient=True), "odd_rows_only_19_40": _case(19, 40, transpose=False),
           "d12_gradient": _case(65536, 3072, gradient=True),
           "d20_activation": _case(65536, 1280), "d20_gradient": _case(65536, 5120, gradient=True),
           "d20_inference": _case(128, 1280, transpose=False), "d20_weight": _case(5120, 1280, master=True),
           "d26_gradient": _case(32768, 6656, gradient=True)},
    make_inputs=_inputs,
    bytes=lambda c, itemsize: c["M"] * c["K"] * (2 * (4 if c["master"] else itemsize) + 1 + c["transpose"]),
    internal=True,
))
