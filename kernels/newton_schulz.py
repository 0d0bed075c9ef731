"""Newton-Schulz orthogonalization: push the singular values of each matrix towards 1, the core of Muon.

X0 = G / (|G|_F + 1e-7), then per step A = X X^T, X <- a X + (b A + c A A) X. The quintic's singular values end in about
[0.7, 1.2], not exactly 1; Polar Express has other coefficients per step and comes closer. Matrices are wide (m <= n),
which keeps A small.
Kernels: A and every polynomial of A are symmetric, so only the tiles on and below the diagonal are computed and each
is stored twice, bit for bit symmetric. a X + B X adds in fp32 in the epilogue, where torch.baddbmm first copies X. The
division by the norm is a factor in the first step's epilogues and no pass of its own.
Gram form, for n >= 2m: two steps are taken on A alone, X <- P2(A') P1(A) X with A' = P1 A P1, which replaces products
with X (m^2 n) by symmetric ones (m^3 / 2 useful): at n = 4m five steps cost 47 instead of 65 m^3 (90 without symmetry).
It starts over from X after each pair, and no pair contains the first step: published is one restart, after step 2, for
fp16, but bf16's noise in A grows by a1 a2 in a pair and by more in a triple. On ill-conditioned spectra in bf16 (128 x
512) singular values pass their bound by 1.2 (Polar Express) and 0.2 (quintic) with that one restart, by at most 0.04
with ours; Polar Express' middle steps, where a1 a2 > 12, stay direct.
Numerics: products in the input's dtype (bf16 on GPUs, fp32 on CPU), sums and epilogues in fp32, the norm too.
Sources: Keller Jordan's Muon, nanochat (Nov 2025); arXiv 2505.16932 (Polar Express); Dao-AILab/gram-newton-schulz;
symmetric tiles as in modded-nanogpt and quack.
"""

import torch

from kernels.device import pick_tile, tl, triton
from kernels.registry import KernelError, Op, custom_op, declare, register

# N matrices, m rows, n columns, m <= n

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
# Minimax quintics for singular values in [1e-3, 1], composed greedily; cushion 0.02, safety factor 1.02 before the last
POLAR_EXPRESS = ((8.156555, -22.483293, 15.878770), (4.042930, -2.808917, 0.500018), (3.891668, -2.772484, 0.506065),
                 (3.285754, -2.368129, 0.464490), (2.346541, -1.709783, 0.423236))
COEFFICIENTS = {"quintic": QUINTIC, "polar-express": POLAR_EXPRESS}
EPS = 1e-7
PAIR_GAIN = 12.0  # largest a1 a2 of two steps in Gram form; the quintic's is 11.9


@register("newton_schulz", "eager")
def newton_schulz_eager(g: torch.Tensor, coefficients: tuple = QUINTIC,
                        norm: torch.Tensor | None = None) -> torch.Tensor:
    """Orthogonalize g (N, m, n), m <= n, with one (a, b, c) per step -> (N, m, n) in g's dtype.

    norm (N,): the Frobenius norms of g where the caller has them already.
    """
    norm = g.norm(dim=(-2, -1)) if norm is None else norm.to(g.dtype)
    x = g / (norm[:, None, None] + EPS)
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


# keyed (sm,); not tuned on a GPU yet. SYMMETRIC and PRODUCT: tile edges of the two kernels, K_BYTES: depth of a step.
# Below MIN_ROWS, or with fewer than MIN_TILES tiles (one per SM), cuBLAS is as fast or faster (flash-muon at 1,024
# unbatched: 0.90x): torch does those.
TILES = {
    (0,): dict(SYMMETRIC=32, PRODUCT=(32, 64), K_BYTES=256, MIN_ROWS=0, MIN_TILES=0, num_warps=4, num_stages=1),
    (80,): dict(SYMMETRIC=128, PRODUCT=(128, 128), K_BYTES=64, MIN_ROWS=512, MIN_TILES=108, num_warps=8, num_stages=4),
    (90,): dict(SYMMETRIC=128, PRODUCT=(128, 256), K_BYTES=128, MIN_ROWS=512, MIN_TILES=132, num_warps=8, num_stages=3),
}


@triton.jit
def _triangle(t):
    """Return (i, j), j <= i, of tile number t, counted along the rows of a lower triangle."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1) / 2).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root is rounded: one too many or too few
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def _symmetric_kernel(p_ptr, s_ptr, add_ptr, norm_ptr, out_ptr, m, k, alpha, beta, diagonal, EPS: tl.constexpr,
                      NORMED: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """out = alpha P S^T + beta add + diagonal I, known to be symmetric, for one tile and its mirror image."""
    i, j = _triangle(tl.program_id(0))
    batch = tl.program_id(1).to(tl.int64)  # 40 matrices of 1,280 x 5,120 are 2^28 cells, 320 of them pass 2^31
    rows, cols, ks = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    p_at = p_ptr + batch * m * k + rows[:, None] * k + ks[None, :]
    s_at = s_ptr + batch * m * k + cols[:, None] * k + ks[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK_K):
        p = tl.load(p_at + start, mask=(rows < m)[:, None] & (start + ks < k)[None, :], other=0.0)
        s = tl.load(s_at + start, mask=(cols < m)[:, None] & (start + ks < k)[None, :], other=0.0)
        acc = tl.dot(p, tl.trans(s), acc, input_precision="ieee")
    if NORMED:
        scale = 1 / (tl.load(norm_ptr + batch) + EPS)
        alpha = alpha * scale * scale
    here = batch * m * m + rows[:, None] * m + cols[None, :]
    inside = (rows < m)[:, None] & (cols < m)[None, :]
    acc = alpha * acc + tl.where(rows[:, None] == cols[None, :], diagonal, 0.0)
    if ADDS:
        acc += beta * tl.load(add_ptr + here, mask=inside, other=0.0).to(tl.float32)
    mirrored = tl.trans(acc)
    if i == j:  # sums of one cell and its mirror image may differ in the last bit
        acc = tl.where(rows[:, None] >= cols[None, :], acc, mirrored)
    else:
        there = batch * m * m + cols[:, None] * m + rows[None, :]
        tl.store(out_ptr + there, mirrored.to(out_ptr.dtype.element_ty),
                 mask=(cols < m)[:, None] & (rows < m)[None, :])
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(b_ptr, x_ptr, norm_ptr, out_ptr, m, n, a, EPS: tl.constexpr, NORMED: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out = a X + B X for one tile; neighbours share columns of X, and all of B stays in L2."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    b_at = b_ptr + batch * m * m + rows[:, None] * m + ks[None, :]
    x_at = x_ptr + batch * m * n + ks[:, None] * n + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, m, BLOCK_K):
        b = tl.load(b_at + start, mask=(rows < m)[:, None] & (start + ks < m)[None, :], other=0.0)
        x = tl.load(x_at + start * n, mask=(start + ks < m)[:, None] & (cols < n)[None, :], other=0.0)
        acc = tl.dot(b, x, acc, input_precision="ieee")
    here = batch * m * n + rows[:, None] * n + cols[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    acc += a * tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        acc = acc / (tl.load(norm_ptr + batch) + EPS)
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(x: torch.Tensor) -> tuple[dict, dict]:
    """Return (what a launch takes, the whole entry)."""
    tile = pick_tile(TILES, x.device)
    launch = dict(BLOCK_K=tile["K_BYTES"] // x.element_size(), num_warps=tile["num_warps"],
                  num_stages=tile["num_stages"])
    return launch, tile


def _triangles(m: int, block: int) -> int:
    return triton.cdiv(m, block) * (triton.cdiv(m, block) + 1) // 2


def symmetric(p: torch.Tensor, s: torch.Tensor, alpha: float = 1.0, add: torch.Tensor | None = None, beta: float = 0.0,
              diagonal: float = 0.0, norm: torch.Tensor | None = None) -> torch.Tensor:
    """Return alpha P S^T + beta add + diagonal I (N, m, m) for p, s (N, m, k) whose product is symmetric.

    norm (N,): p and s stand for themselves divided by norm + EPS.
    """
    N, m, k = p.shape
    launch, tile = _tile(p)
    out = torch.empty((N, m, m), dtype=p.dtype, device=p.device)
    _symmetric_kernel[(_triangles(m, tile["SYMMETRIC"]), N)](
        p, s, p if add is None else add, p if norm is None else norm, out, m, k, alpha, beta, diagonal, EPS=EPS,
        NORMED=norm is not None, ADDS=add is not None, BLOCK=tile["SYMMETRIC"], **launch)
    return out


def _product(b: torch.Tensor, x: torch.Tensor, a: float, norm: torch.Tensor | None) -> torch.Tensor:
    """Return a X + B X for b (N, m, m), x (N, m, n), divided by norm + EPS where given."""
    N, m, n = x.shape
    launch, tile = _tile(x)
    block_m, block_n = tile["PRODUCT"]
    out = torch.empty((N, m, n), dtype=x.dtype, device=x.device)
    _product_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n), N)](
        b, x, x if norm is None else norm, out, m, n, a, EPS=EPS, NORMED=norm is not None, BLOCK_M=block_m,
        BLOCK_N=block_n, **launch)
    return out


@custom_op("newton_schulz", fake=lambda g, coefficients, norm, gram: torch.empty(g.shape, dtype=g.dtype,
                                                                                  device=g.device))
def _orthogonalize(g: torch.Tensor, coefficients: list[float], norm: torch.Tensor | None, gram: bool) -> torch.Tensor:
    """coefficients: a, b, c of every step in a row; gram: take two steps at a time where that is exact enough."""
    x, m = g.contiguous(), g.size(1)
    steps = [tuple(coefficients[i:i + 3]) for i in range(0, len(coefficients), 3)]
    tile = _tile(x)[1]
    if m < tile["MIN_ROWS"] or len(x) * _triangles(m, tile["SYMMETRIC"]) < tile["MIN_TILES"]:
        return newton_schulz_eager(x, steps, norm)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32) if norm is None else norm.contiguous()
    for group in _groups(steps, gram):
        x, norm = _advance(x, group, norm), None
    return x


def _groups(steps: list[tuple], gram: bool) -> list[list[tuple]]:
    """Split the steps, from the last on, into pairs for the Gram form and single steps."""
    groups = []
    while steps:
        size = 2 if gram and len(steps) > 1 and steps[-1][0] * steps[-2][0] <= PAIR_GAIN else 1
        groups.insert(0, steps[-size:])
        steps = steps[:-size]
    return groups


def _advance(x: torch.Tensor, steps: list[tuple], norm: torch.Tensor | None) -> torch.Tensor:
    """Take one step, or two in Gram form."""
    gram = symmetric(x, x, norm=norm)
    a, b, c = steps[0]
    if len(steps) == 1:
        return _product(symmetric(gram, gram, c, gram, b), x, a, norm)
    first = symmetric(gram, gram, c, gram, b, diagonal=a)
    gram = symmetric(first, symmetric(gram, first))  # of the matrix after the first step, without that matrix
    a, b, c = steps[1]
    second = symmetric(gram, gram, c, gram, b)
    return _product(symmetric(first, second, 1.0, first, a), x, 0.0, norm)


def _checked(backend: str, g: torch.Tensor) -> torch.Tensor:
    if g.dim() != 3 or g.size(1) > g.size(2):
        raise KernelError(f"newton_schulz[{backend}]: g must be (N, m, n) with m <= n, got {tuple(g.shape)}, {g.dtype}")
    return g


# before `direct`: 1.4x fewer operations at n = 4m, equal for square matrices; neither is measured
@register("newton_schulz", "triton", needs=("triton",), rank=40, dtypes=(torch.float32, torch.bfloat16, torch.float16))
def newton_schulz_triton(g: torch.Tensor, coefficients: tuple = QUINTIC,
                         norm: torch.Tensor | None = None) -> torch.Tensor:
    """Our kernels, in Gram form where n >= 2m."""
    g = _checked("triton", g)
    return _orthogonalize(g, [x for step in coefficients for x in step], norm, g.size(2) >= 2 * g.size(1))


@register("newton_schulz", "direct", needs=("triton",), rank=45, dtypes=(torch.float32, torch.bfloat16, torch.float16))
def newton_schulz_direct(g: torch.Tensor, coefficients: tuple = QUINTIC,
                         norm: torch.Tensor | None = None) -> torch.Tensor:
    """Our kernels, every step on X itself."""
    return _orthogonalize(_checked("direct", g), [x for step in coefficients for x in step], norm, False)


def _inputs(case, dtype, device, generator) -> dict:
    g = torch.randn(case["N"], case["m"], case["n"], generator=generator).to(device, dtype)
    return {"g": g, "coefficients": QUINTIC[:case.get("steps", 5)]}


def _flops(case) -> float:
    """Count full products; a symmetric kernel does fewer."""
    m, n = case["m"], case["n"]
    return case.get("steps", 5) * case["N"] * (4 * m * m * n + 2 * m ** 3)


OP = declare(Op(
    "newton_schulz",
    # three steps are one of each kind in Gram form; the interpreter takes a second per step
    cases={"tiny": dict(N=2, m=40, n=40, steps=2), "odd": dict(N=2, m=17, n=72, steps=3),
           "odd_six_tiles": dict(N=1, m=67, n=75, steps=2), "one": dict(N=1, m=16, n=64),
           "d12": dict(N=24, m=768, n=3072), "d20_square": dict(N=80, m=1280, n=1280),
           "d20": dict(N=40, m=1280, n=5120), "d26": dict(N=52, m=1664, n=6656)},
    make_inputs=_inputs,
    flops=_flops,
    bytes=lambda c, itemsize: 2 * c["N"] * c["m"] * c["n"] * itemsize,
))
