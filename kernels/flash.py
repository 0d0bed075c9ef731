"""Our flash attention, forward and backward, for kernels/attention.py: rotary and QK-norm are part of it.

With z = qk_norm_rope(q, k) and c = D^-0.5:  p_ts = exp(c zq_t . zk_s),  y_t = sum_s p_ts v_s / sum_s p_ts.
Why no running maximum: QK-norm bounds |zq . zk| by D, so |c zq . zk| <= sqrt(D), and exp(sqrt(128)) = 8.2e4 is far from
fp32's and bf16's limits. Scores are exponentiated as they are, in base 2, and nothing is ever rescaled; fp16, whose
largest number is 6.6e4, is not offered.

Forward: the qk_norm_rope pre-kernel once, then a program per block of queries walks the keys in three loops: the band
masked by the window, the middle without any mask, the band masked by causality. It leaves y and log2 of the sums.
Backward: one kernel per block of queries gives dq and, by the way, delta = rowsum(dy y); one per block of keys gives dk
and dv, summed over the query heads of the group. dzq and dzk are complete when their loops end, so the inverse rotation
and the norm's gradient are the epilogue and cost no pass over memory. No atomics: bits are equal from run to run.
Kept for backward: z (not q, k), 1 / rms, v, y, log2 sums: 4 x 168 + 8 MB a layer at d20 (65,536 tokens, bf16).
Numerics: fp32 scores and sums; p and the scores' gradient are rounded to v's dtype before their second product.
From sm90 on blocks come by TMA descriptors made on the host, before that through pointers. Source: arXiv 2307.08691.
Limits: D 64 or 128 (at 32 Triton 3.6 and 3.7 read outside shared memory on Hopper: triton-lang/triton issue 10573).
"""

import math

import torch

from kernels.device import pick_tile, sm, tl, triton
from kernels.qk_norm_rope import check_rotary, norm_rope_grad, qk_norm_rope_fwd
from kernels.registry import KernelError, custom_op

# B batch, T tokens, H query heads, K kv heads, D head dim; BM queries and BN keys of a block

HEAD_DIMS = (64, 128)
DTYPES = (torch.float32, torch.bfloat16)

# keyed (sm, D == 64); not tuned on a GPU yet, the largest of a few that spill nothing. fwd and dq own BM queries, with
# BM % BN == 0, dkdv owns BN keys, with BN % BM == 0: then the bands begin at whole blocks. The entries of sm80 fit
# the 99 KiB of sm86 and sm89. The interpreter takes both ways to load.
_SMALL = dict(fwd=dict(BM=32, BN=16), dq=dict(BM=32, BN=16), dkdv=dict(BM=16, BN=32))
TILES = {
    (0, True): {name: dict(tile, TMA=False) for name, tile in _SMALL.items()},
    (0, False): {name: dict(tile, TMA=True) for name, tile in _SMALL.items()},
    (80, True): dict(fwd=dict(BM=128, BN=64, num_warps=8, num_stages=2, TMA=False),
                     dq=dict(BM=128, BN=64, num_warps=8, num_stages=2, TMA=False),
                     dkdv=dict(BM=32, BN=128, num_warps=8, num_stages=2, TMA=False)),
    (80, False): dict(fwd=dict(BM=128, BN=32, num_warps=8, num_stages=3, TMA=False),
                      dq=dict(BM=64, BN=64, num_warps=8, num_stages=2, TMA=False),
                      dkdv=dict(BM=32, BN=64, num_warps=8, num_stages=2, TMA=False)),
    (90, True): dict(fwd=dict(BM=128, BN=128, num_warps=8, num_stages=3, TMA=True),
                     dq=dict(BM=128, BN=64, num_warps=8, num_stages=2, TMA=True),
                     dkdv=dict(BM=64, BN=128, num_warps=8, num_stages=2, TMA=True)),
    (90, False): dict(fwd=dict(BM=128, BN=128, num_warps=8, num_stages=2, TMA=True),
                      dq=dict(BM=128, BN=64, num_warps=8, num_stages=3, TMA=True),
                      dkdv=dict(BM=32, BN=128, num_warps=8, num_stages=2, TMA=True)),
}


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _wide(n):
    """Make an index int64 before it meets a stride; a loop's index is a Python int in the interpreter."""
    return tl.zeros((), tl.int64) + n


@triton.jit
def _load(x, b, n, head, T, stride_b, stride_t, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Load tokens n .. n + ROWS of batch b and one head; x is a descriptor of (B, T, heads D), or a pointer to it.

    Tokens past T are 0.
    """
    if TMA:
        block = tl.reshape(x.load([b, n, head * D]), (ROWS, D))
    else:
        rows = tl.arange(0, ROWS)
        at = rows[:, None] * stride_t + tl.arange(0, D)[None, :]
        block = tl.load(x + _wide(b) * stride_b + _wide(n) * stride_t + head * D + at, mask=(n + rows < T)[:, None],
                        other=0.0)
    return block


@triton.jit
def _visible(t, s, window, WINDOW: tl.constexpr):
    return (s <= t) & (s >= t - window) if WINDOW else s <= t


@triton.jit
def _alone(t, window, WINDOW: tl.constexpr):
    """Say which queries see only their own key: their scores have no gradient, and dp - delta would leave rounding."""
    return (t == 0) | (window == 0) if WINDOW else t == 0


@triton.jit
def _halves(x, ROWS: tl.constexpr, D: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))


@triton.jit
def _own(b, n, head, heads, T, ROWS: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr):
    """Return offsets (ROWS, COLS) of tokens n .. n + ROWS of one head in a contiguous (B, T, heads, D)."""
    rows = _wide(b) * T + n + tl.arange(0, ROWS)
    return (rows * heads + head)[:, None] * D + tl.arange(0, COLS)[None, :]


@triton.jit
def _store_raw_grad(dz, z_ptr, r_ptr, cos_ptr, sin_ptr, dx_ptr, b, n, head, heads, T,
                    ROWS: tl.constexpr, D: tl.constexpr):
    """Take dz (ROWS, D) of tokens n .. n + ROWS of one head back through norm and rotation and store it."""
    rows = n + tl.arange(0, ROWS)
    mask = (rows < T)[:, None]
    at = _own(b, n, head, heads, T, ROWS, D, D // 2)
    z1 = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z2 = tl.load(z_ptr + at + D // 2, mask=mask, other=0.0).to(tl.float32)
    angle = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    r = tl.load(r_ptr + (_wide(b) * T + rows) * heads + head, mask=rows < T, other=0.0)
    dz1, dz2 = _halves(dz, ROWS, D)
    dx1, dx2 = norm_rope_grad(dz1, dz2, z1, z2, r, cos, sin, D)
    tl.store(dx_ptr + at, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + at + D // 2, dx2.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _query_block(T, H, BM: tl.constexpr):
    """Return batch, head and first token of this program, later blocks first: they have more keys."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BM)
    return pid // blocks // H, pid // blocks % H, (blocks - 1 - pid % blocks) * BM


@triton.jit
def _key_bands(m, window, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Return where the keys of queries m .. m + BM begin and from where on all of the queries see them (up to m)."""
    if WINDOW:
        return tl.maximum(m - window, 0) // BN * BN, tl.minimum(tl.cdiv(tl.maximum(m + BM - 1 - window, 0), BN) * BN, m)
    return 0, 0


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _fwd_loop(acc, total, q, k_src, v_src, b, kv, m, first, last, T, window, stride_kb, stride_kt, stride_vb, stride_vt,
              SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
              WINDOW: tl.constexpr, TMA: tl.constexpr):
    for n in range(first, last, BN):
        k = _load(k_src, b, n, kv, T, stride_kb, stride_kt, BN, D, TMA)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE)
        if MASKED:
            t, s = m + tl.arange(0, BM), n + tl.arange(0, BN)
            p = tl.where(_visible(t[:, None], s[None, :], window, WINDOW), p, 0.0)
        total += tl.sum(p, axis=1)
        v = _load(v_src, b, n, kv, T, stride_vb, stride_vt, BN, D, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total


@triton.jit
def _flash_fwd_kernel(q_src, k_src, v_src, y_ptr, lse_ptr, T, H, K, window, stride_qb, stride_qt, stride_kb, stride_kt,
                      stride_vb, stride_vt, SCALE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    b, h, m = _query_block(T, H, BM)
    kv = h // (H // K)
    q = _load(q_src, b, m, h, T, stride_qb, stride_qt, BM, D, TMA)
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    first, middle = _key_bands(m, window, BM, BN, WINDOW)
    if WINDOW:
        acc, total = _fwd_loop(acc, total, q, k_src, v_src, b, kv, m, first, middle, T, window, stride_kb, stride_kt,
                               stride_vb, stride_vt, SCALE, BM, BN, D, True, WINDOW, TMA)
    acc, total = _fwd_loop(acc, total, q, k_src, v_src, b, kv, m, middle, m, T, window, stride_kb, stride_kt,
                           stride_vb, stride_vt, SCALE, BM, BN, D, False, WINDOW, TMA)
    acc, total = _fwd_loop(acc, total, q, k_src, v_src, b, kv, m, m, tl.minimum(m + BM, T), T, window, stride_kb,
                           stride_kt, stride_vb, stride_vt, SCALE, BM, BN, D, True, WINDOW, TMA)
    rows = m + tl.arange(0, BM)
    total = tl.where(rows < T, total, 1.0)  # rows past the end may have seen no key
    tl.store(y_ptr + _own(b, m, h, H, T, BM, D, D), (acc / total[:, None]).to(y_ptr.dtype.element_ty),
             mask=(rows < T)[:, None])
    tl.store(lse_ptr + (_wide(b) * H + h) * T + rows, tl.log2(total) / SCALE, mask=rows < T)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _dq_loop(dq, q, dy, lse, delta, k_src, v_src, b, kv, m, first, last, T, window, stride_kb, stride_kt, stride_vb,
             stride_vt, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
             WINDOW: tl.constexpr, TMA: tl.constexpr):
    for n in range(first, last, BN):
        k = _load(k_src, b, n, kv, T, stride_kb, stride_kt, BN, D, TMA)
        v = _load(v_src, b, n, kv, T, stride_vb, stride_vt, BN, D, TMA)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - lse[:, None] * SCALE)
        if MASKED:
            t, s = m + tl.arange(0, BM), n + tl.arange(0, BN)
            p = tl.where(_visible(t[:, None], s[None, :], window, WINDOW), p, 0.0)
        ds = p * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _flash_dq_kernel(q_src, k_src, v_src, dy_src, q_ptr, y_ptr, lse_ptr, delta_ptr, r_ptr, cos_ptr, sin_ptr, dq_ptr,
                     T, H, K, window, stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
                     stride_yb, stride_yt, SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr, D: tl.constexpr,
                     WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    b, h, m = _query_block(T, H, BM)
    kv = h // (H // K)
    rows = m + tl.arange(0, BM)
    row = (_wide(b) * H + h) * T + rows
    q = _load(q_src, b, m, h, T, stride_qb, stride_qt, BM, D, TMA)
    dy = _load(dy_src, b, m, h, T, stride_yb, stride_yt, BM, D, TMA)
    y = tl.load(y_ptr + _own(b, m, h, H, T, BM, D, D), mask=(rows < T)[:, None], other=0.0)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=rows < T)
    lse = tl.load(lse_ptr + row, mask=rows < T, other=0.0)
    lse = tl.where(_alone(rows, window, WINDOW), float("inf"), lse)  # p = 0
    dq = tl.zeros((BM, D), tl.float32)
    first, middle = _key_bands(m, window, BM, BN, WINDOW)
    if WINDOW:
        dq = _dq_loop(dq, q, dy, lse, delta, k_src, v_src, b, kv, m, first, middle, T, window, stride_kb, stride_kt,
                      stride_vb, stride_vt, SCALE, BM, BN, D, True, WINDOW, TMA)
    dq = _dq_loop(dq, q, dy, lse, delta, k_src, v_src, b, kv, m, middle, m, T, window, stride_kb, stride_kt,
                  stride_vb, stride_vt, SCALE, BM, BN, D, False, WINDOW, TMA)
    dq = _dq_loop(dq, q, dy, lse, delta, k_src, v_src, b, kv, m, m, tl.minimum(m + BM, T), T, window, stride_kb,
                  stride_kt, stride_vb, stride_vt, SCALE, BM, BN, D, True, WINDOW, TMA)
    _store_raw_grad(dq * GRAD_SCALE, q_ptr, r_ptr, cos_ptr, sin_ptr, dq_ptr, b, m, h, H, T, BM, D)


@triton.jit
def _dkdv_loop(dk, dv, k, v, q_src, dy_src, lse_ptr, delta_ptr, b, h, n, first, last, T, window, stride_qb, stride_qt,
               stride_yb, stride_yt, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
               MASKED: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr):
    for m in range(first, last, BM):
        t = m + tl.arange(0, BM)
        q = _load(q_src, b, m, h, T, stride_qb, stride_qt, BM, D, TMA)  # queries past T are 0 and add nothing
        dy = _load(dy_src, b, m, h, T, stride_yb, stride_yt, BM, D, TMA)
        lse = tl.load(lse_ptr + t, mask=t < T, other=0.0)
        # (BN, BM). The sums begin at -lse and -delta: beside the products they would hold registers, which then spill.
        begin = tl.zeros((BN, BM), tl.float32) - lse[None, :]
        p = tl.exp2(tl.dot(k, tl.trans(q), begin, input_precision="ieee") * SCALE)
        if MASKED:
            s = n + tl.arange(0, BN)
            p = tl.where(_visible(t[None, :], s[:, None], window, WINDOW), p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + t, mask=t < T, other=0.0)
        begin = tl.zeros((BN, BM), tl.float32) - delta[None, :]
        ds = p * tl.dot(v, tl.trans(dy), begin, input_precision="ieee")
        if MASKED:
            ds = tl.where(_alone(t, window, WINDOW)[None, :], 0.0, ds)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _flash_dkdv_kernel(q_src, k_src, v_src, dy_src, k_ptr, lse_ptr, delta_ptr, r_ptr, cos_ptr, sin_ptr, dk_ptr, dv_ptr,
                       T, H, K, window, stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
                       stride_yb, stride_yt, SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr, D: tl.constexpr,
                       WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BN)
    b, kv, n = pid // blocks // K, pid // blocks % K, pid % blocks * BN
    k = _load(k_src, b, n, kv, T, stride_kb, stride_kt, BN, D, TMA)
    v = _load(v_src, b, n, kv, T, stride_vb, stride_vt, BN, D, TMA)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    # the causal band, then queries that see every key of the block, then those whose window leaves it
    middle = tl.minimum(n + BN, T)
    right, last = T, T
    if WINDOW:
        right = tl.maximum(tl.minimum((n + window + 1) // BM * BM, T), middle)
        last = tl.minimum(n + BN + window, T)
    for h in range(kv * (H // K), (kv + 1) * (H // K)):
        row = (_wide(b) * H + h) * T
        dk, dv = _dkdv_loop(dk, dv, k, v, q_src, dy_src, lse_ptr + row, delta_ptr + row, b, h, n, n, middle, T, window,
                            stride_qb, stride_qt, stride_yb, stride_yt, SCALE, BM, BN, D, True, WINDOW, TMA)
        dk, dv = _dkdv_loop(dk, dv, k, v, q_src, dy_src, lse_ptr + row, delta_ptr + row, b, h, n, middle, right, T,
                            window, stride_qb, stride_qt, stride_yb, stride_yt, SCALE, BM, BN, D, False, WINDOW, TMA)
        if WINDOW:
            dk, dv = _dkdv_loop(dk, dv, k, v, q_src, dy_src, lse_ptr + row, delta_ptr + row, b, h, n, right, last, T,
                                window, stride_qb, stride_qt, stride_yb, stride_yt, SCALE, BM, BN, D, True, WINDOW, TMA)
    tl.store(dv_ptr + _own(b, n, kv, K, T, BN, D, D), dv.to(dv_ptr.dtype.element_ty),
             mask=(n + tl.arange(0, BN) < T)[:, None])
    _store_raw_grad(dk * GRAD_SCALE, k_ptr, r_ptr, cos_ptr, sin_ptr, dk_ptr, b, n, kv, K, T, BN, D)


# --- launchers ------------------------------------------------------------------------------------


def _tile(kernel: str, q: torch.Tensor) -> dict:
    """Return the blocks of one kernel; fp32 on a GPU has no tensor cores and takes small ones, to compare with."""
    tiles = TILES
    if (sm(q.device) or 0) >= 120:  # consumer Blackwell has sm89's 99 KiB of shared memory
        tiles = {key: tile for key, tile in TILES.items() if key[0] < 90}
    tile = pick_tile(tiles, q.device, q.size(-1) == 64)[kernel]
    if "num_warps" in tile and q.dtype == torch.float32:
        return dict(BM=32, BN=32, num_warps=8, num_stages=1, TMA=False)
    return tile


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """View x (B, T, heads, D) as (B, T, heads D) as TMA can read it, copying where strides or alignment forbid it."""
    x = x.flatten(2)
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:2])
    return x if aligned and x.stride(2) == 1 else x.clone(memory_format=torch.contiguous_format)


def _launch(kernel, name: str, queries: tuple[torch.Tensor, ...], keys: tuple[torch.Tensor, ...], tensors: tuple,
            window: int, **constants) -> None:
    """Launch a program per block of queries, or of keys for dkdv.

    queries = (zq[, dy]) and keys = (zk, v) are what comes in blocks, `tensors` the other arguments.
    """
    (B, T, H, D), K = queries[0].shape, keys[0].size(2)
    tile = _tile(name, queries[0])
    blocks = B * K * triton.cdiv(T, tile["BN"]) if name == "dkdv" else B * H * triton.cdiv(T, tile["BM"])
    window = -1 if window >= T - 1 else window  # all are seen; so no bound of the loops can pass 2^31
    rows = [tile["BM"], tile["BN"], tile["BN"], tile["BM"]]
    matrices = [_matrix(x) for x in (queries[0], *keys, *queries[1:])]
    strides = [stride for x in matrices for stride in x.stride()[:2]]
    if tile["TMA"]:
        from triton.tools.tensor_descriptor import TensorDescriptor
        matrices = [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, n, D])
                    for x, n in zip(matrices, rows, strict=False)]
    kernel[(blocks,)](*matrices, *tensors, T, H, K, window, *strides, SCALE=D ** -0.5 * math.log2(math.e), D=D,
                      WINDOW=window >= 0, **constants, **tile)


def _per_row(q: torch.Tensor) -> torch.Tensor:
    B, T, H, _ = q.shape
    return torch.empty(B, H, T, dtype=torch.float32, device=q.device)


def _fake_fwd(q, k, v, cos, sin, window):
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return y, _per_row(q), *qk_norm_rope_fwd(q, k, cos, sin)


@custom_op("attention_fwd", fake=_fake_fwd)
def _flash_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, window: int
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y (B, T, H, D), log2 of the sums (B, H, T), zq, zk and their 1 / rms, for raw q, k, v of any strides."""
    y, lse, zq, zk, rq, rk = _fake_fwd(q, k, v, cos, sin, window)
    _launch(_flash_fwd_kernel, "fwd", (zq,), (zk, v), (y, lse), window)
    return y, lse, zq, zk, rq, rk


def _fake_bwd(dy, y, lse, zq, zk, rq, rk, v, cos, sin, window):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (zq, zk, v))


@custom_op("attention_bwd", fake=_fake_bwd)
def _flash_bwd(dy: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, zq: torch.Tensor, zk: torch.Tensor,
               rq: torch.Tensor, rk: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
               window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of raw q, k and v, contiguous."""
    dq, dk, dv = _fake_bwd(dy, y, lse, zq, zk, rq, rk, v, cos, sin, window)
    cos, sin, delta = cos.contiguous(), sin.contiguous(), _per_row(zq)
    grad_scale = zq.size(-1) ** -0.5
    # dq first: it writes delta
    _launch(_flash_dq_kernel, "dq", (zq, dy), (zk, v), (zq, y, lse, delta, rq, cos, sin, dq), window,
            GRAD_SCALE=grad_scale)
    _launch(_flash_dkdv_kernel, "dkdv", (zq, dy), (zk, v), (zk, lse, delta, rk, cos, sin, dk, dv), window,
            GRAD_SCALE=grad_scale)
    return dq, dk, dv


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # only y gets a gradient; zeros for the others would cost 340 MB a layer at d20
    ctx.window = inputs[5]
    ctx.save_for_backward(*output, *inputs[2:5])


def _backward(ctx, dy, *_):
    return *_flash_bwd(dy, *ctx.saved_tensors, ctx.window), None, None, None


_flash_fwd.register_autograd(_backward, setup_context=_save)


def head_dim_rule(shapes) -> str | None:
    D = shapes["head_dim"]
    return None if D in HEAD_DIMS else f"head_dim must be one of {HEAD_DIMS}, got {D}"


def attention_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                     window: int = -1) -> torch.Tensor:
    """Our kernels; q, k, v of any strides, free of copies where D is contiguous. The pre-kernel is always our own."""
    check_rotary("attention", q, k, cos, sin)
    (H, D), given = q.shape[-2:], f"(q is {tuple(q.shape)}, {q.dtype})"
    if D not in HEAD_DIMS:
        raise KernelError(f"attention[triton]: head dim must be one of {HEAD_DIMS}, got {D} {given}")
    if q.dtype not in DTYPES:
        raise KernelError(f"attention[triton]: dtype must be float32 or bfloat16, got {q.dtype} {given}")
    if v.shape != k.shape or v.dtype != q.dtype or H % k.size(-2):
        raise KernelError(f"attention[triton]: v must be as k, of a divisor of {H} heads, got {tuple(v.shape)}, "
                          f"{v.dtype} for k {tuple(k.shape)} {given}")
    return _flash_fwd(q, k, v, cos, sin, window)[0]
