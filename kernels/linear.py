"""Linear layer without bias: y = x W^T in x's dtype.

Master weights are fp32; the cast to the compute dtype is part of the op, so no autocast is needed and a backend may
quantize instead. Weights already in x's dtype, as at inference, are used as they are.

fp8: x and W in e4m3, the gradient of y in e5m2, each with one dynamic scale (fp8_cast); three GEMMs by
torch._scaled_mm, fp32 accumulation (fast accumulation in the forward GEMM only), results in x's dtype, the gradient of
W in W's. W's codes come with the call: they are made once per optimizer step, not per micro-batch. Kept for backward
is x's transposed code, half of bf16's bytes. d20's c_fc with 65,536 tokens: casting x and dy moves 0.50 + 2.0 GB, by
estimate 0.9 ms, beside GEMMs of 4.3 ms in bf16 and at best half of that in fp8.
Source: nanochat (2026), torchao. Limits: C and N multiples of 16 (M is free: the transposed codes are padded).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.registry import KernelError, Op, callable_of, declare, misfit, register

# M rows, C input dim, N output dim

# Which of a block's layers run in fp8 with linear=fp8, the others staying in x's dtype. FLOPs saved per byte cast grow
# with N C / (N + C), here at d20. nanochat's d26 MLP gained 1.18x forward and backward; its d12 as a whole lost.
FP8_LAYERS = frozenset({
    "mlp.c_fc",    # 1,280 -> 5,120: 1,024
    "mlp.c_proj",  # 5,120 -> 1,280: 1,024
})  # not attn.c_q, c_k, c_v, c_proj, 1,280 -> 1,280: 640, about break-even by estimate, not measured


@register("linear", "eager")
def linear_eager(x: torch.Tensor, w: torch.Tensor, codes: tuple | None = None) -> torch.Tensor:
    """Multiply x (..., C) by w (N, C) transposed -> (..., N) in x's dtype; codes, w in fp8, are for other backends."""
    return F.linear(x, w.to(x.dtype))


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, w_codes, w_codes_t, w_scale, fp8_cast, keep):
        codes, codes_t, scale = fp8_cast(x, gradient=False, transpose=keep)
        ctx.save_for_backward(codes_t, scale, w_codes_t, w_scale)
        ctx.fp8_cast, ctx.dtypes = fp8_cast, (x.dtype, w.dtype)
        return _scaled_mm(codes, w_codes, scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy):
        x_codes_t, x_scale, w_codes_t, w_scale = ctx.saved_tensors
        dy_codes, dy_codes_t, dy_scale = ctx.fp8_cast(dy, gradient=True)
        dx = _scaled_mm(dy_codes, w_codes_t, dy_scale, w_scale, ctx.dtypes[0], left=torch.float8_e5m2)
        dw = _scaled_mm(dy_codes_t, x_codes_t, dy_scale, x_scale, ctx.dtypes[1], left=torch.float8_e5m2)
        return dx, dw, None, None, None, None, None


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype,
               left: torch.dtype = torch.float8_e4m3fn, fast: bool = False) -> torch.Tensor:
    """Multiply the codes a (m, k) by b (n, k) transposed -> (m, n) in `dtype`; rows contiguous, as cuBLAS wants."""
    return torch._scaled_mm(a.view(left), b.view(torch.float8_e4m3fn).t(), scale_a=a_scale, scale_b=b_scale,
                            out_dtype=dtype, use_fast_accum=fast)


# Behind eager for auto: it changes the numbers, so it is asked for by name (--fp8).
@register("linear", "fp8", needs=("fp8",), uses=("fp8_cast",), rank=200, sqnr=(18.0, 17.0),
          check=lambda shapes: misfit("n_embd", shapes["n_embd"], 16))
def linear_fp8(x: torch.Tensor, w: torch.Tensor, codes: tuple | None = None, *, fp8_cast: Callable) -> torch.Tensor:
    """Multiply by w's codes = fp8_cast(w); a layer that comes without them is none of FP8_LAYERS and runs as eager."""
    if codes is None:
        return linear_eager(x, w)
    for rule in (misfit("C", w.size(1), 16), misfit("N", w.size(0), 16)):
        if rule:
            raise KernelError(f"linear[fp8]: {rule} (w is {tuple(w.shape)}, {w.dtype})")
    y = _Fp8Linear.apply(x.reshape(-1, x.size(-1)), w, *codes, fp8_cast, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], w.size(0))


def _inputs(case, dtype, device, generator) -> dict:
    x = torch.randn(case["M"], case["C"], generator=generator).to(device, dtype)
    w = torch.randn(case["N"], case["C"], generator=generator).to(device) * case["C"] ** -0.5
    w = w.to(torch.promote_types(dtype, torch.float32))
    codes = None if case["N"] % 16 else callable_of("fp8_cast", "eager")(w)
    return {"x": x, "w": w, "codes": codes}


OP = declare(Op(
    "linear",
    cases={"tiny": dict(M=16, C=64, N=32), "odd": dict(M=7, C=80, N=33), "odd_rows_21": dict(M=21, C=48, N=80),
           "d12": dict(M=65536, C=768, N=3072), "d20": dict(M=65536, C=1280, N=5120),
           "d26": dict(M=32768, C=1664, N=6656)},
    make_inputs=_inputs,
    flops=lambda c: 2 * c["M"] * c["C"] * c["N"],
    bytes=lambda c, itemsize: (c["M"] * (c["C"] + c["N"]) + c["N"] * c["C"]) * itemsize,
    grad_inputs=("x", "w"),
))
