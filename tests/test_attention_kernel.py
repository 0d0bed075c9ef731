"""Attention beyond parity: our flash kernels' exactness where it is promised, and the adapters with stand-ins."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from kernels import KernelError, flash
from kernels.attention import attention_eager
from kernels.check import run
from kernels.qk_norm_rope import rotary_table
from kernels.registry import BACKENDS, OPS, callable_of, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OP = OPS["attention"]


def inputs_of(case, dtype=torch.float32, **changes):
    return OP.make_inputs({**OP.cases[case], **changes}, dtype, CPU, torch.Generator().manual_seed(0))


def triton(inputs):
    return run(OP, callable_of("attention", "triton"), inputs)


def assert_same_bits(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- our kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case, D", [("one_token", 64), ("one_token", 128), ("window_0", 64), ("window_0", 128)])
def test_a_query_that_sees_only_itself_returns_its_value_and_no_gradient_of_scores(case, D):
    inputs = inputs_of(case, D=D)
    found = triton(inputs)
    assert not found["gradient of q"].any() and not found["gradient of k"].any()
    group = inputs["q"].size(2) // inputs["v"].size(2)
    torch.testing.assert_close(found["output 0"], inputs["v"].repeat_interleave(group, dim=2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1, -1], ids=["largest scores", "smallest scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_at_their_bound_neither_overflow_nor_vanish(sign, dtype):
    """All keys equal and q = +-k at position 0 of the rotation: every score is +-sqrt(D), weights are equal."""
    T, D = 40, 128
    direction, (cos, sin) = torch.randn(D) * 1e4, rotary_table(1, D)
    k = direction.expand(1, T, 1, D).to(dtype)
    v = torch.randn(1, T, 1, D).to(dtype)
    y = callable_of("attention", "triton")(sign * k, k, v, cos.expand(T, -1), sin.expand(T, -1))
    expected = v.double().cumsum(1) / torch.arange(1, T + 1)[:, None, None]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_a_window_as_long_as_the_row_is_no_window():
    small = dict(B=1, T=40, H=1, K=1)
    without = triton(inputs_of("tiny", **small))
    for window in (39, 40, 2**31 - 1):
        assert_same_bits(triton(inputs_of("tiny", **small, window=window)), without)


@pytest.mark.parametrize("window", [-1, 30])
def test_descriptors_and_pointers_load_the_same(window, monkeypatch):
    inputs = inputs_of("tiny", B=2, T=50, H=2, K=1, window=window)
    pointers = triton(inputs)
    tiles = {name: dict(tile, TMA=True) for name, tile in flash.TILES[0, True].items()}
    monkeypatch.setitem(flash.TILES, (0, True), tiles)
    assert_same_bits(triton(inputs), pointers)


@pytest.mark.parametrize("sm, entry", [(80, 80), (89, 80), (90, 90), (100, 90), (120, 80)])
def test_a_gpu_gets_blocks_that_fit_its_shared_memory(sm, entry, monkeypatch):
    monkeypatch.setattr("kernels.device.META_SM", sm)
    q = torch.empty(1, 8, 2, 128, dtype=torch.bfloat16, device="meta")
    assert flash._tile("fwd", q) == flash.TILES[entry, False]["fwd"]
    assert flash._tile("fwd", q.float())["BM"] < flash._tile("fwd", q)["BM"]


@pytest.mark.parametrize("D", [64, 128])
def test_views_of_one_projection_give_the_bits_of_contiguous_inputs(D):
    B, T, H, K = 2, 9, 2, 1
    cos, sin = rotary_table(T, D)
    together = torch.randn(B, T, H + 2 * K, D)
    views = dict(zip("qkv", together.split((H, K, K), dim=2), strict=True)) | {"cos": cos, "sin": sin}
    copies = {name: x.contiguous() for name, x in views.items()}
    assert_same_bits(run(OP, callable_of("attention", "triton"), views, copy=torch.Tensor.detach), triton(copies))


def test_unaligned_values_are_copied_for_descriptors():
    inputs = inputs_of("tiny", B=1, D=128)  # by descriptor
    shifted = torch.empty(inputs["v"].numel() + 1)[1:].view_as(inputs["v"]).copy_(inputs["v"])
    assert shifted.data_ptr() % 16
    assert_same_bits(run(OP, callable_of("attention", "triton"), inputs | {"v": shifted}, copy=torch.Tensor.detach),
                     triton(inputs))


def test_backward_keeps_rotated_q_and_k_and_not_the_raw_ones():
    inputs = inputs_of("tiny")
    raw = [inputs[name].requires_grad_() for name in "qkv"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = callable_of("attention", "triton")(**inputs)
    pointers = {x.data_ptr() for x in kept}
    assert not pointers & {raw[0].data_ptr(), raw[1].data_ptr()} and {raw[2].data_ptr(), y.data_ptr()} <= pointers
    rows = y[..., 0].numel() * 4
    assert sum(x.nbytes for x in kept) == 4 * y.nbytes + 3 * rows + 2 * inputs["cos"].nbytes  # z, v, y; lse, r


@pytest.mark.parametrize("changes, sentence", [
    (dict(D=80), "head dim must be one of (64, 128), got 80 (q is (2, 32, 2, 80), torch.float32)"),
    (dict(dtype=torch.float16), "dtype must be float32 or bfloat16, got torch.float16 "
                                "(q is (2, 32, 2, 64), torch.float16)"),
    (dict(H=3), "v must be as k, of a divisor of 3 heads, got (2, 32, 2, 64), torch.float32 for k (2, 32, 2, 64) "
                "(q is (2, 32, 3, 64), torch.float32)"),
])
def test_what_flash_cannot_do_is_refused_by_name(changes, sentence):
    with pytest.raises(KernelError) as error:
        callable_of("attention", "triton")(**inputs_of("tiny", **changes))
    assert str(error.value) == f"attention[triton]: {sentence}"


def test_a_head_dim_it_lacks_is_a_reason_at_start():
    backend = BACKENDS["attention"]["triton"]
    assert why_not(backend, CPU, torch.bfloat16, {"head_dim": 64}) is None
    assert why_not(backend, CPU, torch.bfloat16, {"head_dim": 32}) == "head_dim must be one of (64, 128), got 32"


# --- adapters -------------------------------------------------------------------------------------

PACKAGES = {"flash": "flash_attn.flash_attn_interface", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr("kernels.registry.sm", lambda device: 90)


def stand_in(monkeypatch, name, calls):
    """Put a package into sys.modules whose flash_attn_func is eager attention without rotary and norm."""
    def flash_attn_func(q, k, v, causal, window_size, deterministic):
        calls.append((causal, window_size, deterministic))
        left = window_size[0]
        keys = torch.arange(q.size(1))
        hidden = keys[None] > keys[:, None]
        if left is not None and left >= 0:
            hidden |= keys[:, None] - keys[None] > left
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        scores = (torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5).masked_fill(hidden, -torch.inf)
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        return (y, scores.logsumexp(-1)) if name == "flash_attn.cute" else y

    for part in {name.split(".")[0], name}:
        module = ModuleType(part)
        module.__spec__, module.__path__ = ModuleSpec(part, None), []
        monkeypatch.setitem(sys.modules, part, module)
    module.flash_attn_func = sys.modules[name].flash_attn_func = flash_attn_func


@pytest.mark.parametrize("backend", PACKAGES)
def test_flash_attn_is_a_reason_until_its_package_is_there(backend, monkeypatch, h100):
    properties = BACKENDS["attention"][backend]
    assert why_not(properties, CPU) == "needs a CUDA GPU, this is cpu"
    assert why_not(properties, CUDA, torch.bfloat16) == f"package {PACKAGES[backend]} is not importable"
    stand_in(monkeypatch, PACKAGES[backend], [])
    assert why_not(properties, CUDA, torch.bfloat16) is None
    assert why_not(properties, CUDA, torch.float32) == "takes bfloat16, float16, got float32"


@pytest.mark.parametrize("case, bounds", [("odd_T63_gqa", None), ("odd_T65_window_17", (17, 0)), ("window_0", (0, 0))])
@pytest.mark.parametrize("backend", PACKAGES)
def test_flash_attn_gets_rotated_heads_causality_and_window(backend, case, bounds, monkeypatch):
    calls, inputs = [], inputs_of(case)
    stand_in(monkeypatch, PACKAGES[backend], calls)
    y = callable_of("attention", backend)(**inputs)
    nothing = (None, None) if backend == "flash4" else (-1, -1)
    assert calls == [(True, bounds or nothing, False)]
    torch.testing.assert_close(y, attention_eager(**inputs), rtol=1e-5, atol=1e-5)


def test_flash_attn_is_deterministic_when_torch_is(monkeypatch):
    calls = []
    stand_in(monkeypatch, PACKAGES["flash"], calls)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    callable_of("attention", "flash")(**inputs_of("tiny"))
    assert calls[0][2] is True


@pytest.mark.parametrize("backend, flash_on, cudnn_on", [("sdpa", True, False), ("cudnn", False, True)])
def test_sdpa_and_cudnn_name_the_kernel_of_torch(backend, flash_on, cudnn_on, monkeypatch):
    enabled = []

    def spy(q, k, v, attn_mask, is_causal, enable_gqa):
        enabled.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        assert is_causal and attn_mask is None and enable_gqa
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    inputs = inputs_of("odd_T63_gqa")
    assert callable_of("attention", backend)(**inputs).shape == inputs["q"].shape
    assert enabled == [(flash_on, cudnn_on)]


def test_cudnn_has_no_window(h100):
    with pytest.raises(KernelError) as error:
        callable_of("attention", "cudnn")(**inputs_of("odd_T65_window_17"))
    assert str(error.value) == ("attention[cudnn]: there must be no window, got 17 (q is (1, 65, 2, 128), "
                                "torch.float32)")
    backend = BACKENDS["attention"]["cudnn"]
    assert why_not(backend, CUDA, torch.bfloat16, {"window_pattern": "L"}) is None
    assert why_not(backend, CUDA, torch.bfloat16, {"window_pattern": "SSL"}) == "has no window, got pattern SSL"


def test_auto_prefers_hopper_kernels_then_ours_then_flash_attn_2():
    order = sorted(BACKENDS["attention"].values(), key=lambda b: b.rank)
    assert [b.name for b in order] == ["flash3", "flash4", "cudnn", "triton", "flash", "sdpa", "eager"]
