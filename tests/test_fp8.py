"""fp8: the cast by exact arithmetic, the three GEMMs of a layer, codes that follow the weights, and the flag."""

import math
from dataclasses import replace

import pytest
import torch

from kernels import KernelConfig, KernelError, KernelUnavailable, interpreter, resolve
from kernels.fp8_cast import fp8_cast_eager, fp8_cast_triton
from kernels.linear import linear_eager, linear_fp8
from kernels.registry import BACKENDS, callable_of, why_not
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW

CPU = torch.device("cpu")
FORMATS = {False: (torch.float8_e4m3fn, 3, -6, 448.0), True: (torch.float8_e5m2, 2, -14, 57344.0)}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
SMALL = GPTConfig(sequence_len=32, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)

# largest values around the point where one more power of two no longer fits, and extremes of fp32
LARGEST = [1.0, 1.75, 1.7500001, 1.99, 448.0, 449.0, 3e38, 1e-30, 0.0]


def nearest_code(value: float, gradient: bool) -> float:
    """Round to the format's nearest number, ties to even, in exact arithmetic of doubles."""
    _, mantissa_bits, least_exponent, _ = FORMATS[gradient]
    if value == 0:
        return 0.0
    exponent = max(math.frexp(abs(value))[1] - 1, least_exponent)
    step = 2.0 ** (exponent - mantissa_bits)
    return round(value / step) * step  # Python rounds halves to even


def values_of(codes: torch.Tensor, gradient: bool = False) -> torch.Tensor:
    return codes.view(FORMATS[gradient][0]).double()


def sqnr(exact: torch.Tensor, got: torch.Tensor) -> float:
    exact, got = exact.detach().double(), got.detach().double()
    return 10 * math.log10(exact.square().sum() / (exact - got).square().sum())


def config_of(text: str, fp8: bool = False, device: torch.device = CPU):
    return resolve(KernelConfig.parse(text, fp8), device, torch.float32, SMALL.shapes())


def model_of(text: str, **shape) -> GPT:
    model = GPT.build(replace(SMALL, **shape), config_of(text), torch.float32, CPU, seed=1)
    with torch.no_grad():  # the initial projections are 0: nothing would reach the MLP's first matrix
        for block in model.transformer["h"]:
            block.mlp.c_proj.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
        model.lm_head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    model.quantize_weights()
    return model


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (2, 32), generator=torch.Generator().manual_seed(seed))


# --- the cast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("largest", LARGEST)
def test_cast_takes_the_largest_power_of_two_that_fits_and_rounds_once(largest, gradient):
    x = torch.rand(9, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = (x * largest).clamp(-largest, largest)
    x[4, 7] = -largest
    codes, codes_t, scale = fp8_cast_eager(x, gradient)
    _, _, _, top = FORMATS[gradient]
    assert math.frexp(scale.item())[0] == 0.5
    amax = x.abs().max().item()
    assert amax / scale.item() <= top and (amax < 1e-35 or 2 * amax / scale.item() > top)
    expected = [nearest_code(v / scale.item(), gradient) for v in x.flatten().tolist()]
    assert values_of(codes, gradient).flatten().tolist() == expected
    assert torch.equal(codes_t[:, :9], codes.t()) and codes_t.shape == (20, 16) and not codes_t[:, 9:].any()


@NO_GPU
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("largest", [*LARGEST, math.inf, math.nan])
def test_cast_kernel_equals_the_reference_bit_for_bit(largest, gradient):
    x = torch.randn(37, 70, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    x = x * largest if math.isfinite(largest) else x
    x[36, 69] = -largest
    for got, expected in zip(fp8_cast_triton(x, gradient), fp8_cast_eager(x, gradient), strict=True):
        assert got.numpy().tobytes() == expected.numpy().tobytes()  # NaN equals NaN


@NO_GPU
def test_interpreter_casts_every_bfloat16_as_torch_does():
    x = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    for gradient, (_, _, _, top) in FORMATS.items():
        fits = x.where(x.abs() <= top, 0).view(256, 256)  # a scale of 1 when the largest is there
        assert torch.equal(fp8_cast_triton(fits, gradient)[0], fp8_cast_eager(fits, gradient)[0])
        assert fp8_cast_eager(fits, gradient)[2] == 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_the_scale_nan_instead_of_saturating(bad):
    x = torch.ones(16, 16)
    x[3, 3] = bad
    w = torch.eye(16)
    assert fp8_cast_eager(x)[2].isnan()
    assert linear_fp8(x, w, fp8_cast_eager(w), fp8_cast=fp8_cast_eager).isnan().all()


@pytest.mark.parametrize("gradient, least", [(False, 25), (True, 19)])
def test_cast_keeps_its_signal(gradient, least):
    """e4m3 rounds to 4 significant bits (31 dB), e5m2 to 3 (25 dB), less what the subnormals lose."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
        codes, _, scale = fp8_cast_eager(x, gradient)
        assert sqnr(x, values_of(codes, gradient) * scale) >= least


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [7, 32])
def test_fp8_linear_is_three_products_of_dequantized_codes(rows):
    generator = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((rows, 48), (64, 48), (rows, 64)))
    x.requires_grad_(), w.requires_grad_()
    y = linear_fp8(x, w, fp8_cast_eager(w.detach()), fp8_cast=fp8_cast_eager)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    (xq, x_scale), (wq, w_scale), (gq, g_scale) = ((values_of(c, g), s) for (c, _, s), g in (
        (fp8_cast_eager(x.detach()), False), (fp8_cast_eager(w.detach()), False), (fp8_cast_eager(dy, True), True)))
    for got, left, right in ((y, xq * x_scale, wq.t() * w_scale), (dx, gq * g_scale, wq * w_scale),
                             (dw, gq.t() * g_scale, xq * x_scale)):
        torch.testing.assert_close(got.double(), left @ right, rtol=1e-5, atol=1e-5)


def test_a_layer_without_codes_runs_as_eager_and_inference_keeps_no_transposed_codes():
    x, w = torch.randn(2, 3, 32), torch.randn(16, 32, requires_grad=True)
    assert torch.equal(linear_fp8(x, w, fp8_cast=None), linear_eager(x, w))
    asked = []

    def spy(x, gradient=False, transpose=True):
        asked.append(transpose)
        return fp8_cast_eager(x, gradient, transpose)

    codes = fp8_cast_eager(w.detach())
    with torch.no_grad():
        quiet = linear_fp8(x, w, codes, fp8_cast=spy)
    assert torch.equal(linear_fp8(x, w, codes, fp8_cast=spy), quiet) and quiet.shape == (2, 3, 16)
    assert asked == [False, True]


@pytest.mark.parametrize("shape, sentence", [
    ((24, 32), r"linear\[fp8\]: N must be a multiple of 16, got 24 \(w is \(24, 32\), torch.float32\)"),
    ((32, 24), r"linear\[fp8\]: C must be a multiple of 16, got 24 \(w is \(32, 24\), torch.float32\)"),
])
def test_sizes_that_the_gemm_cannot_do_are_refused(shape, sentence):
    w = torch.randn(shape)
    with pytest.raises(KernelError, match=sentence):
        linear_fp8(torch.randn(4, shape[1]), w, fp8_cast_eager(w), fp8_cast=fp8_cast_eager)


# --- the model ------------------------------------------------------------------------------------


def test_only_the_mlp_runs_in_fp8_and_an_evaluation_can_leave_it():
    model, plain, x = model_of("eager,linear=fp8"), model_of("eager"), batch()
    assert len(model.fp8_layers) == 2 * SMALL.n_layer and not plain.fp8_layers
    assert {id(layer) for layer in model.fp8_layers} == {
        id(layer) for block in model.transformer["h"] for layer in (block.mlp.c_fc, block.mlp.c_proj)}
    expected = plain(x)
    with model.without_fp8():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected) and sqnr(expected, model(x)) > 20


def test_codes_follow_every_change_of_the_weights_and_serve_all_micro_batches():
    model = model_of("eager,linear=fp8")
    optimizer = MuonAdamW(model, model.kernels)
    layer = model.transformer["h"][0].mlp.c_fc

    def fresh() -> bool:
        return all(torch.equal(a, b) for a, b in zip(layer.codes, fp8_cast_eager(layer.weight.detach()), strict=True))

    assert fresh()
    before, copy = layer.codes, layer.codes[0].clone()
    for seed in (0, 1):
        model(batch(seed), batch(seed + 7)).backward()
    assert layer.codes is before and torch.equal(before[0], copy) and layer.weight.grad.abs().max() > 0
    optimizer.step()
    assert fresh() and not torch.equal(layer.codes[0], copy)
    assert layer.codes[0].data_ptr() == before[0].data_ptr()  # a captured graph reads there
    model.load_state_dict({name: 0.5 * p for name, p in model.state_dict().items()})
    assert fresh()
    model.init_weights(5)
    assert fresh()


def test_an_fp8_model_without_codes_is_refused():
    model = GPT(SMALL, config_of("eager,linear=fp8"))
    with pytest.raises(RuntimeError, match="call GPT.quantize_weights"):
        model(batch())


def test_weights_cast_for_inference_keep_the_logits_of_fp8():
    model, x = model_of("eager,linear=fp8"), batch()
    model.dtype = torch.bfloat16
    before = model(x)
    assert torch.equal(model.cast_weights()(x), before)


@pytest.mark.parametrize("text", ["eager,linear=fp8", pytest.param("eager,linear=fp8,fp8_cast=triton", marks=NO_GPU)])
def test_fp8_training_compiles_as_one_graph_never_again_and_follows_the_uncompiled_run(text):
    torch._dynamo.reset()

    def train(compiled: bool) -> list[float]:
        model = model_of(text, n_layer=1)
        optimizer = MuonAdamW(model, model.kernels)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else model
        losses = []
        for _ in range(3):
            loss = forward(batch(), batch(1))
            loss.backward()
            with model.without_fp8():
                model(batch(), batch(1))  # as an evaluation between two steps
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = train(False)
    with torch._dynamo.config.patch(error_on_recompile=True), interpreter.launches() as names:
        assert train(True) == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0] - 0.05
    assert ("_fp8_cast_kernel" in names) == ("triton" in text)


# --- the flag -------------------------------------------------------------------------------------


def test_fp8_is_linear_fp8():
    kernels = config_of("eager", fp8=True)
    assert kernels.names["linear"] == "fp8" and kernels.requested == "eager,linear=fp8"
    assert config_of("eager,linear=fp8", fp8=True).requested == "eager,linear=fp8"


@pytest.mark.parametrize("text", ["auto,linear=eager", "linear=auto"])
def test_fp8_beside_another_linear_is_an_error(text):
    other = text.split("linear=")[1]
    with pytest.raises(KernelError) as error:
        KernelConfig.parse(text, fp8=True)
    assert str(error.value) == (f"--fp8 is linear=fp8, but --kernels {text} names linear={other}; "
                                "leave one of them out")


@NO_GPU
def test_linear_relu2_yields_to_fp8_and_says_so():
    kernels = config_of("triton,attention=eager,linear=fp8")
    assert (kernels.names["linear_relu2"], kernels.names["relu2"], kernels.names["fp8_cast"]) == (
        "eager", "triton", "triton")
    assert "kernels: linear_relu2=eager, because linear_relu2=triton would not call linear=fp8" in kernels.notes
    assert config_of("triton,attention=eager,linear=auto").names["linear_relu2"] == "triton"
    with pytest.raises(KernelError) as error:
        config_of("linear_relu2=triton,linear=fp8")
    assert str(error.value) == ("--kernels linear_relu2=triton,linear=fp8: linear_relu2=triton does not call "
                                "linear=fp8; leave one of them out")


def test_fp8_needs_a_gpu_that_multiplies_it_and_a_width_of_sixteens(monkeypatch):
    monkeypatch.setattr("kernels.registry.sm", lambda device: 80)
    backend = BACKENDS["linear"]["fp8"]
    assert why_not(backend, torch.device("cuda"), torch.bfloat16) == "needs sm89+, this is sm80"
    assert why_not(backend, CPU, torch.bfloat16, {"n_embd": 72}) == "n_embd must be a multiple of 16, got 72"
    with pytest.raises(KernelUnavailable, match="linear=fp8: n_embd must be a multiple of 16, got 72"):
        resolve(KernelConfig.parse("linear=fp8"), CPU, torch.float32, {**SMALL.shapes(), "n_embd": 72})


@NO_GPU
def test_the_cast_is_not_demanded_where_nothing_calls_it(monkeypatch):
    """A GPU without fp8 runs --kernels triton."""
    monkeypatch.setattr("kernels.registry._unmet", lambda need, device: "no fp8 here" if need == "fp8" else None)
    assert config_of("triton,attention=eager").names["fp8_cast"] == "eager"
    with pytest.raises(KernelUnavailable, match="fp8_cast=triton: no fp8 here"):
        config_of("fp8_cast=triton")


def test_fp8_is_never_taken_unasked():
    assert config_of("auto").names["linear"] == "eager"
    assert callable_of("linear", "fp8").keywords == {"fp8_cast": fp8_cast_eager}
