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
Loads are plain pointers (cp.async), not TMA descriptors. Source: arXiv 2307.08691. Limits: D 16, 32, 64 or 128.
"""

import math

import torch

from kernels.device import pick_tile, tl, triton
from kernels.qk_norm_rope import as_rows, norm_rope_grad, qk_norm_rope_fwd
from kernels.registry import custom_op

# B batch, T tokens, H query heads, K kv heads, D head dim; BM queries and BN keys of a block

HEAD_DIMS = (16, 32, 64, 128)

# keyed (sm, D <= 64); not tuned on a GPU yet, chosen so that nothing spills. fwd and dq own BM queries and need
# BM % BN == 0, dkdv owns BN keys and needs BN % BM == 0: then the bands begin at whole blocks.
TILES = {
    (0, True): dict(fwd=dict(BM=32, BN=16), dq=dict(BM=32, BN=16), dkdv=dict(BM=16, BN=32)),
    (0, False): dict(fwd=dict(BM=32, BN=16), dq=dict(BM=32, BN=16), dkdv=dict(BM=16, BN=32)),
    (80, True): dict(fwd=dict(BM=128, BN=64, num_warps=4, num_stages=3),
                     dq=dict(BM=128, BN=64, num_warps=8, num_stages=2),
                     dkdv=dict(BM=64, BN=128, num_warps=8, num_stages=2)),
    (80, False): dict(fwd=dict(BM=128, BN=64, num_warps=8, num_stages=2),
                      dq=dict(BM=64, BN=64, num_warps=8, num_stages=2),
                      dkdv=dict(BM=32, BN=128, num_warps=8, num_stages=2)),
    (90, True): dict(fwd=dict(BM=128, BN=128, num_warps=8, num_stages=3),
                     dq=dict(BM=128, BN=64, num_warps=8, num_stages=2),
                     dkdv=dict(BM=64, BN=128, num_warps=8, num_stages=2)),
    (90, False): dict(fwd=dict(BM=128, BN=128, num_warps=8, num_stages=2),
                      dq=dict(BM=128, BN=64, num_warps=8, num_stages=2),
                      dkdv=dict(BM=64, BN=128, num_warps=8, num_stages=2)),
}


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _wide(n):
    """Make a loop index int64 before it meets a stride; it may be a Python int in the interpreter."""
    return tl.zeros((), tl.int64) + n


@triton.jit
def _offsets(ROWS: tl.constexpr, stride_t, COLS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * stride_t + tl.arange(0, COLS)[None, :]


@triton.jit
def _visible(t, s, window, WINDOW: tl.constexpr):
    return (s <= t) & (s >= t - window) if WINDOW else s <= t


@triton.jit
def _alone(t, window, WINDOW: tl.constexpr):
    """Say which queries see only their own key: their scores have no gradient, and dp - delta would leave rounding."""
    return (t == 0) | (window == 0) if WINDOW else t == 0


@triton.jit
def _load(ptr, at, n, T, stride_t, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Load the block of ROWS tokens that begins at token n; `at` are its offsets."""
    if MASKED:
        return tl.load(ptr + _wide(n) * stride_t + at, mask=(n + tl.arange(0, ROWS) < T)[:, None], other=0.0)
    return tl.load(ptr + _wide(n) * stride_t + at)


@triton.jit
def _halves(x, ROWS: tl.constexpr, D: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))


@triton.jit
def _store_raw_grad(dz, z_ptr, r_ptr, cos_ptr, sin_ptr, dx_ptr, rows, at, r_at, T,
                    ROWS: tl.constexpr, D: tl.constexpr):
    """Take dz (ROWS, D) back through norm and rotation and store it; `at` (ROWS, D/2) are offsets of first halves."""
    mask = (rows < T)[:, None]
    z1 = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z2 = tl.load(z_ptr + at + D // 2, mask=mask, other=0.0).to(tl.float32)
    angle = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    r = tl.load(r_ptr + r_at, mask=rows < T, other=0.0)
    dz1, dz2 = _halves(dz, ROWS, D)
    dx1, dx2 = norm_rope_grad(dz1, dz2, z1, z2, r, cos, sin, D)
    tl.store(dx_ptr + at, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + at + D // 2, dx2.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _query_block(T, H, GROUP, BM: tl.constexpr):
    """Return batch (int64), head, kv head and first token of this program, later blocks first: they have more keys."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BM)
    head = pid // blocks
    return (head // H).to(tl.int64), head % H, head % H // GROUP, (blocks - 1 - pid % blocks) * BM


@triton.jit
def _key_bands(m, window, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Return where the keys of queries m .. m + BM begin and where every one of the queries sees them (up to m)."""
    if WINDOW:
        return tl.maximum(m - window, 0) // BN * BN, tl.minimum(tl.cdiv(tl.maximum(m + BM - 1 - window, 0), BN) * BN, m)
    return 0, 0


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _fwd_loop(acc, total, q, k_ptr, v_ptr, at_k, at_v, rows, first, last, T, stride_kt, stride_vt, window,
              SCALE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr):
    for n in range(first, last, BN):
        k = _load(k_ptr, at_k, n, T, stride_kt, BN, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE)
        if MASKED:
            p = tl.where(_visible(rows[:, None], n + tl.arange(0, BN)[None, :], window, WINDOW), p, 0.0)
        total += tl.sum(p, axis=1)
        v = _load(v_ptr, at_v, n, T, stride_vt, BN, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total


@triton.jit
def _flash_fwd_kernel(q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, T, H, GROUP, window, stride_qb, stride_qt, stride_qh,
                      stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, SCALE: tl.constexpr,
                      D: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    b, h, kv, m = _query_block(T, H, GROUP, BM)
    rows = m + tl.arange(0, BM)
    at_q = _offsets(BM, stride_qt, D)
    at_k = _offsets(BN, stride_kt, D)
    at_v = _offsets(BN, stride_vt, D)
    own = b * stride_qb + h * stride_qh + m.to(tl.int64) * stride_qt
    q = tl.load(q_ptr + own + at_q, mask=(rows < T)[:, None], other=0.0)
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    first, middle = _key_bands(m, window, BM, BN, WINDOW)
    if WINDOW:
        acc, total = _fwd_loop(acc, total, q, k_ptr, v_ptr, at_k, at_v, rows, first, middle, T, stride_kt, stride_vt,
                               window, SCALE, BN, True, WINDOW)
    acc, total = _fwd_loop(acc, total, q, k_ptr, v_ptr, at_k, at_v, rows, middle, m, T, stride_kt, stride_vt,
                           window, SCALE, BN, False, WINDOW)
    acc, total = _fwd_loop(acc, total, q, k_ptr, v_ptr, at_k, at_v, rows, m, tl.minimum(m + BM, T), T, stride_kt,
                           stride_vt, window, SCALE, BN, True, WINDOW)
    total = tl.where(rows < T, total, 1.0)  # rows past the end may have seen no key
    tl.store(y_ptr + own + at_q, (acc / total[:, None]).to(y_ptr.dtype.element_ty), mask=(rows < T)[:, None])
    tl.store(lse_ptr + (b * H + h) * T + rows, tl.log2(total), mask=rows < T)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _dq_loop(dq, q, dy, lse, delta, k_ptr, v_ptr, at_k, at_v, rows, first, last, T, stride_kt, stride_vt, window,
             SCALE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr):
    for n in range(first, last, BN):
        k = _load(k_ptr, at_k, n, T, stride_kt, BN, MASKED)
        v = _load(v_ptr, at_v, n, T, stride_vt, BN, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - lse[:, None])
        if MASKED:
            p = tl.where(_visible(rows[:, None], n + tl.arange(0, BN)[None, :], window, WINDOW), p, 0.0)
        ds = p * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _flash_dq_kernel(q_ptr, k_ptr, v_ptr, y_ptr, dy_ptr, lse_ptr, delta_ptr, r_ptr, cos_ptr, sin_ptr, dq_ptr,
                     T, H, GROUP, window, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
                     stride_vb, stride_vt, stride_vh, stride_yb, stride_yt, stride_yh, SCALE: tl.constexpr,
                     GRAD_SCALE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):
    b, h, kv, m = _query_block(T, H, GROUP, BM)
    rows = m + tl.arange(0, BM)
    inside = (rows < T)[:, None]
    at_q = _offsets(BM, stride_qt, D)
    at_y = _offsets(BM, stride_yt, D)
    at_k = _offsets(BN, stride_kt, D)
    at_v = _offsets(BN, stride_vt, D)
    own = b * stride_qb + h * stride_qh + m.to(tl.int64) * stride_qt
    dy_ptr += b * stride_yb + h * stride_yh + m.to(tl.int64) * stride_yt
    q = tl.load(q_ptr + own + at_q, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + at_y, mask=inside, other=0.0)
    y = tl.load(y_ptr + own + at_q, mask=inside, other=0.0)
    row = (b * H + h) * T + rows
    lse = tl.load(lse_ptr + row, mask=rows < T, other=0.0)
    lse = tl.where(_alone(rows, window, WINDOW), float("inf"), lse)  # p = 0
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=rows < T)
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    dq = tl.zeros((BM, D), tl.float32)
    first, middle = _key_bands(m, window, BM, BN, WINDOW)
    if WINDOW:
        dq = _dq_loop(dq, q, dy, lse, delta, k_ptr, v_ptr, at_k, at_v, rows, first, middle, T, stride_kt, stride_vt,
                      window, SCALE, BN, True, WINDOW)
    dq = _dq_loop(dq, q, dy, lse, delta, k_ptr, v_ptr, at_k, at_v, rows, middle, m, T, stride_kt, stride_vt,
                  window, SCALE, BN, False, WINDOW)
    dq = _dq_loop(dq, q, dy, lse, delta, k_ptr, v_ptr, at_k, at_v, rows, m, tl.minimum(m + BM, T), T, stride_kt,
                  stride_vt, window, SCALE, BN, True, WINDOW)
    at = own + _offsets(BM, stride_qt, D // 2)
    _store_raw_grad(dq * GRAD_SCALE, q_ptr, r_ptr, cos_ptr, sin_ptr, dq_ptr, rows, at,
                    b * T * H + rows * H + h, T, BM, D)


@triton.jit
def _dkdv_loop(dk, dv, k, v, q_ptr, dy_ptr, lse_ptr, delta_ptr, at_q, at_y, cols, first, last, T, stride_qt, stride_yt,
               window, SCALE: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr):
    for m in range(first, last, BM):  # any block may be the last one, so loads are masked everywhere; 0 adds nothing
        rows = m + tl.arange(0, BM)
        q = _load(q_ptr, at_q, m, T, stride_qt, BM, True)
        dy = _load(dy_ptr, at_y, m, T, stride_yt, BM, True)
        lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE - lse[None, :])  # (BN, BM)
        if MASKED:
            p = tl.where(_visible(rows[None, :], cols[:, None], window, WINDOW), p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dy), input_precision="ieee") - delta[None, :])
        if MASKED:
            ds = tl.where(_alone(rows, window, WINDOW)[None, :], 0.0, ds)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _flash_dkdv_kernel(q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, r_ptr, cos_ptr, sin_ptr, dk_ptr, dv_ptr,
                       T, H, GROUP, window, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
                       stride_vb, stride_vt, stride_vh, stride_yb, stride_yt, stride_yh, SCALE: tl.constexpr,
                       GRAD_SCALE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
                       BN: tl.constexpr):
    K = H // GROUP
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BN)
    b, kv, n = (pid // blocks // K).to(tl.int64), pid // blocks % K, pid % blocks * BN
    cols = n + tl.arange(0, BN)
    inside = (cols < T)[:, None]
    at_q = _offsets(BM, stride_qt, D)
    at_y = _offsets(BM, stride_yt, D)
    at_k = _offsets(BN, stride_kt, D)
    at_v = _offsets(BN, stride_vt, D)
    own = b * stride_kb + kv * stride_kh + n.to(tl.int64) * stride_kt
    k = tl.load(k_ptr + own + at_k, mask=inside, other=0.0)
    v = tl.load(v_ptr + b * stride_vb + kv * stride_vh + n.to(tl.int64) * stride_vt + at_v, mask=inside, other=0.0)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    # causal band, then queries that see every key of the block, then those whose window leaves it
    middle = tl.minimum(n + BN, T)
    right, last = T, T
    if WINDOW:
        right = tl.maximum(tl.minimum((n + window + 1) // BM * BM, T), middle)
        last = tl.minimum(n + BN + window, T)
    for g in range(0, GROUP):
        h = kv * GROUP + g
        q_head = q_ptr + b * stride_qb + h * stride_qh
        dy_head = dy_ptr + b * stride_yb + h * stride_yh
        row = (b * H + h) * T
        dk, dv = _dkdv_loop(dk, dv, k, v, q_head, dy_head, lse_ptr + row, delta_ptr + row, at_q, at_y, cols,
                            n, middle, T, stride_qt, stride_yt, window, SCALE, BM, True, WINDOW)
        dk, dv = _dkdv_loop(dk, dv, k, v, q_head, dy_head, lse_ptr + row, delta_ptr + row, at_q, at_y, cols,
                            middle, right, T, stride_qt, stride_yt, window, SCALE, BM, False, WINDOW)
        if WINDOW:
            dk, dv = _dkdv_loop(dk, dv, k, v, q_head, dy_head, lse_ptr + row, delta_ptr + row, at_q, at_y, cols,
                                right, last, T, stride_qt, stride_yt, window, SCALE, BM, True, WINDOW)
    tl.store(dv_ptr + own + at_k, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    at = own + _offsets(BN, stride_kt, D // 2)
    _store_raw_grad(dk * GRAD_SCALE, k_ptr, r_ptr, cos_ptr, sin_ptr, dk_ptr, cols, at,
                    b * T * K + cols * K + kv, T, BN, D)


# --- launchers ------------------------------------------------------------------------------------


def _tile(kernel: str, q: torch.Tensor) -> dict:
    """Return the blocks of one kernel; fp32 halves them and has no pipeline, since it takes twice the bytes."""
    tile = dict(pick_tile(TILES, q.device, q.size(-1) <= 64)[kernel])
    if "num_warps" in tile and q.dtype == torch.float32:
        tile |= dict(BM=tile["BM"] // 2, BN=tile["BN"] // 2, num_stages=1)
    return tile


def _launch(kernel, name: str, tensors: tuple, strided: tuple[torch.Tensor, ...], window: int, **constants) -> None:
    """Launch a program per block of queries, or of keys for dkdv; strided = (zq, zk, v[, dy]) tell their strides."""
    (B, T, H, D), K = strided[0].shape, strided[1].size(2)
    tile = _tile(name, strided[0])
    blocks = B * K * triton.cdiv(T, tile["BN"]) if name == "dkdv" else B * H * triton.cdiv(T, tile["BM"])
    window = -1 if window >= T - 1 else window  # all are seen; so no bound of the loops can pass 2^31
    strides = [stride for x in strided for stride in x.stride()[:3]]
    kernel[(blocks,)](*tensors, T, H, H // K, window, *strides, SCALE=D ** -0.5 * math.log2(math.e), D=D,
                      WINDOW=window >= 0, **constants, **tile)


def _per_row(q: torch.Tensor) -> torch.Tensor:
    B, T, H, _ = q.shape
    return torch.empty(B, H, T, dtype=torch.float32, device=q.device)


def _fake_fwd(q, k, v, cos, sin, window):
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return y, _per_row(q), *qk_norm_rope_fwd(q, k, cos, sin)


@custom_op("attention_fwd", fake=_fake_fwd)
def flash_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, window: int
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y (B, T, H, D), log2 of the sums (B, H, T), zq, zk and their 1 / rms, for raw q, k, v of any strides."""
    y, lse, zq, zk, rq, rk = _fake_fwd(q, k, v, cos, sin, window)
    v = as_rows(v)
    _launch(_flash_fwd_kernel, "fwd", (zq, zk, v, y, lse), (zq, zk, v), window)
    return y, lse, zq, zk, rq, rk


def _fake_bwd(dy, y, lse, zq, zk, rq, rk, v, cos, sin, window):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (zq, zk, v))


@custom_op("attention_bwd", fake=_fake_bwd)
def _flash_bwd(dy: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, zq: torch.Tensor, zk: torch.Tensor,
               rq: torch.Tensor, rk: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
               window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of raw q, k and v, contiguous."""
    dq, dk, dv = _fake_bwd(dy, y, lse, zq, zk, rq, rk, v, cos, sin, window)
    dy, v, cos, sin = as_rows(dy), as_rows(v), cos.contiguous(), sin.contiguous()
    delta = _per_row(zq)  # written by the dq kernel, which goes first
    grad_scale = zq.size(-1) ** -0.5
    _launch(_flash_dq_kernel, "dq", (zq, zk, v, y, dy, lse, delta, rq, cos, sin, dq), (zq, zk, v, dy), window,
            GRAD_SCALE=grad_scale)
    _launch(_flash_dkdv_kernel, "dkdv", (zq, zk, v, dy, lse, delta, rk, cos, sin, dk, dv), (zq, zk, v, dy), window,
            GRAD_SCALE=grad_scale)
    return dq, dk, dv


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # only y gets a gradient; zeros for the others would cost 340 MB a layer at d20
    ctx.window = inputs[5]
    ctx.save_for_backward(*output, *inputs[2:5])


def _backward(ctx, dy, *_):
    return *_flash_bwd(dy, *ctx.saved_tensors, ctx.window), None, None, None


flash_fwd.register_autograd(_backward, setup_context=_save)
