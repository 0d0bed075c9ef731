"""The model: sizes, causality, loss, dense forward against paged forward."""

import math

import pytest
import torch

from kernels import KernelConfig, resolve
from nanochat.gpt import GPT, GPTConfig, PagedBatch, PagedCache

CPU = torch.device("cpu")
KERNELS = resolve(KernelConfig.parse("eager"), CPU, torch.float32)
SMALL = GPTConfig(sequence_len=64, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=128)


def random_model(config: GPTConfig = SMALL, kernels=KERNELS) -> GPT:
    """A model whose zero-initialized matrices are random too, so that every layer matters."""
    model = GPT.build(config, kernels, torch.float32, CPU, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 64) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("depth, n_params, flops", [(20, 560_988_160, 3.492e9), (32, 1_879_048_192, 1.208e10)])
def test_sizes_are_nanochats(depth, n_params, flops):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, 65536, 2048), KERNELS)
    assert model.num_params() == n_params
    assert model.estimate_flops() == pytest.approx(flops, rel=1e-3)


def test_causal_flops_count_the_visible_pairs():
    with torch.device("meta"):
        full, windowed = (GPT(GPTConfig(512, 97, 2, 1, 1, 128, pattern), KERNELS) for pattern in ("L", "SL"))
    seen = [min(t + 1, 129) for t in range(512)]  # a window of 128 is 129 keys
    gap = full.estimate_flops(causal=True) - windowed.estimate_flops(causal=True)
    assert gap == pytest.approx(12 * 128 * (sum(range(1, 513)) - sum(seen)) / 512)
    assert full.estimate_flops() - full.estimate_flops(causal=True) == pytest.approx(2 * 12 * 128 * (512 - 513 / 2))


def test_names_are_those_of_published_nanochat_models():
    names = set(random_model().state_dict())
    layer = {f"transformer.h.0.{n}.weight" for n in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc",
                                                     "mlp.c_proj")}
    assert {n for n in names if ".h.0." in n} == layer
    assert {n for n in names if ".h." not in n} == {"transformer.wte.weight", "lm_head.weight"}


def test_initial_loss_is_that_of_guessing_and_weights_depend_on_the_seed_alone():
    model, again, other = (GPT.build(SMALL, KERNELS, torch.float32, CPU, seed=s) for s in (1, 1, 2))
    x = tokens()
    assert model(x, x).item() == pytest.approx(math.log(SMALL.vocab_size), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.transformer["wte"].weight, other.transformer["wte"].weight)
    c_fc = model.transformer["h"][0].mlp.c_fc.weight
    assert c_fc.std().item() == pytest.approx(SMALL.n_embd ** -0.5, rel=0.02)


def test_a_token_changes_only_what_comes_after_it():
    model, x = random_model(), tokens(1)
    changed = x.clone()
    changed[0, 40] = (x[0, 40] + 1) % SMALL.vocab_size
    a, b = model(x), model(changed)
    assert torch.equal(a[0, :40], b[0, :40])
    assert ((a[0, 40:] - b[0, 40:]).abs().amax(dim=-1) > 1e-4).all()


def test_short_windows_hide_old_tokens_except_in_the_last_layer():
    config = GPTConfig(sequence_len=1024, vocab_size=97, n_layer=5, n_head=1, n_kv_head=1, n_embd=64,
                       window_pattern="SSSL")
    assert [config.window(i) for i in range(5)] == [256, 256, 256, -1, -1]


def test_loss_is_the_cross_entropy_of_the_logits():
    model, x = random_model(), tokens()
    y = tokens().roll(-1, 1)
    y[0, :10] = -1
    logits = model(x)
    assert logits.dtype == torch.float32 and logits.abs().max() < 15
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(model(x, y, reduction="none"), expected)
    torch.testing.assert_close(model(x, y), expected.sum() / (y >= 0).sum())


def test_a_row_over_the_context_is_refused():
    with pytest.raises(ValueError, match="a row must fit the context of 64 tokens, got 65"):
        random_model()(tokens(1, 65))


@pytest.mark.parametrize("bad, sentence", [
    (dict(n_head=3), "n_embd must be n_head times an even head dim, got 128 and 3 heads"),
    (dict(n_kv_head=3), "n_kv_head must divide n_head = 4, got 3"),
    (dict(n_layer=0), "n_layer must be at least 1, got 0"),
    (dict(window_pattern="LX"), "window_pattern must be letters L and S, got 'LX'"),
])
def test_impossible_shapes_are_refused(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTConfig(**{**dict(sequence_len=64, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=128), **bad})


@pytest.mark.parametrize("chunks", [[64], [1] * 8, [5, 16, 11, 1, 1, 20]])
def test_paged_forward_equals_dense_forward(chunks):
    """Two sequences fed in chunks through shuffled pages give the dense logits at every chunk's end."""
    model, x, page_size = random_model(), tokens(2), 16
    cache = PagedCache.allocate(SMALL, 9, page_size, torch.float32, CPU)
    tables = torch.tensor([[7, 2, 5, 0], [1, 8, 3, 6]], dtype=torch.int32)
    with torch.inference_mode():
        dense = model(x)
        start = 0
        for length in chunks:
            positions = torch.arange(start, start + length)
            slots = torch.cat([tables[s].long()[positions // page_size] * page_size + positions % page_size
                               for s in range(2)])
            batch = PagedBatch(x[:, start:start + length].flatten(), positions.repeat(2), slots, tables,
                               torch.tensor([0, length, 2 * length], dtype=torch.int32),
                               torch.full((2,), start + length, dtype=torch.int32),
                               torch.tensor([length - 1, 2 * length - 1]))
            start += length
            torch.testing.assert_close(model.forward_paged(batch, cache), dense[:, start - 1], rtol=1e-4, atol=1e-4)


def test_compiled_model_has_no_graph_breaks_and_the_same_loss():
    model, x = random_model(), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(x, x, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, random_model()(x, x, reduction="sum"), rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_activations_keep_fp32_masters_and_cast_weights_changes_no_logit():
    model, x = random_model(), tokens()
    model.dtype = torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = model(x)
    assert torch.equal(model.cast_weights()(x), before) and before.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
