"""The eager references against independent arithmetic in fp64, and every other backend against the eager reference."""

import math

import pytest
import torch

from kernels import KernelConfig, KernelError, interpreter, resolve
from kernels.check import assert_parity, run, small_cases
from kernels.newton_schulz import newton_schulz_eager
from kernels.qk_norm_rope import key_scale
from kernels.registry import BACKENDS, OPS, callable_of, why_not
from kernels.sample import sample_eager, uniform

CPU = torch.device("cpu")
PARITY = [pytest.param(op, backend, case, dtype, id=f"{op}-{backend}-{case}-{str(dtype).removeprefix('torch.')}")
          for op in OPS for backend in BACKENDS[op] if backend != "eager"
          for case in small_cases(OPS[op]) for dtype in OPS[op].dtypes]


# every backend that Triton's interpreter runs, at the two smallest cases
TRITON = [pytest.param(op, backend, case, id=f"{op}-{backend}-{case}") for op in OPS
          for backend, b in BACKENDS[op].items() if "triton" in b.needs for case in small_cases(OPS[op])[:2]]


def inputs_of(op: str, case: str, dtype=torch.float64) -> dict:
    return OPS[op].make_inputs(OPS[op].cases[case], dtype, CPU, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("op, backend, case, dtype", PARITY)
def test_backend_is_as_exact_as_eager(op, backend, case, dtype):
    reason = why_not(BACKENDS[op][backend], CPU, dtype)
    if reason:
        pytest.skip(reason)
    assert_parity(op, backend, case, dtype, CPU)


@pytest.mark.parametrize("op, backend, case", TRITON)
def test_triton_takes_strided_inputs_or_refuses_them_by_name(op, backend, case):
    try:
        assert_parity(op, backend, case, torch.float32, CPU, strided=True)
    except KernelError as error:
        assert str(error).startswith(f"{op}[{backend}]: ")


@pytest.mark.parametrize("op, backend, case", TRITON)
def test_triton_programs_may_run_in_any_order(op, backend, case):
    values = inputs_of(op, case, torch.float32)
    fn = callable_of(op, backend)
    once = run(OPS[op], fn, values)
    for seed in (1, 2):
        with interpreter.shuffled(seed):
            again = run(OPS[op], fn, values)
        assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


def test_sdpa_parity_really_ran():
    assert why_not(BACKENDS["attention"]["sdpa"], CPU, torch.float32) is None


@pytest.mark.parametrize("wrong", [
    lambda q, k, v, cos, sin, window=-1: BACKENDS["attention"]["eager"].fn(q, k, v, cos, -sin, window),
    lambda q, k, v, cos, sin, window=-1: BACKENDS["attention"]["eager"].fn(q, k, v, cos, sin, window + 1),
    lambda q, k, v, cos, sin, window=-1: BACKENDS["attention"]["eager"].fn(q, k * torch.nan, v, cos, sin, window),
], ids=["rotated the other way", "mask off by one", "nan"])
def test_parity_catches_a_wrong_backend(wrong, monkeypatch):
    monkeypatch.setattr("kernels.check.callable_of",
                        lambda op, name: wrong if name == "sdpa" else callable_of(op, name))
    with pytest.raises(AssertionError, match="attention=sdpa odd_T65_window_17"):
        assert_parity("attention", "sdpa", "odd_T65_window_17", torch.float32, CPU)


@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in small_cases(OPS[op]) if OPS[op].grad_inputs])
def test_eager_gradients_are_the_derivative(op, case):
    """A central difference along a random direction agrees with the gradient."""
    values = inputs_of(op, case)
    names = OPS[op].grad_inputs
    fn = callable_of(op, "eager")

    def scalar(shift: float, directions) -> float:
        moved = {**values, **{n: values[n] + shift * d for n, d in zip(names, directions, strict=True)}}
        out = fn(**moved)
        outs = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        return sum(float((o * torch.randn(o.shape, generator=generator).to(o)).sum()) for o in outs)

    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(values[n].shape, generator=generator, dtype=torch.float64) for n in names]
    found = run(OPS[op], fn, values)
    expected = sum(float((found[f"gradient of {n}"] * d).sum()) for n, d in zip(names, directions, strict=True))
    h = 1e-5
    measured = (scalar(h, directions) - scalar(-h, directions)) / (2 * h)
    assert measured == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rms_norm_divides_by_the_root_of_mean_square_plus_fp32_epsilon():
    x = torch.tensor([[3e-4, 4e-4]], dtype=torch.float64)
    y = callable_of("rms_norm", "eager")(x)
    torch.testing.assert_close(y, x / math.sqrt(12.5e-8 + 1.1920929e-07), rtol=1e-12, atol=0)


def test_qk_norm_rope_is_a_complex_rotation_by_minus_theta_then_a_norm():
    values = inputs_of("qk_norm_rope", "odd_T63_gqa")
    q, k = callable_of("qk_norm_rope", "eager")(**values)
    D = q.size(-1)
    theta = torch.arange(63)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones_like(theta), -theta)[:, None]
    for raw, got in ((values["q"], q), (values["k"], k)):
        rotated = torch.complex(raw[..., : D // 2], raw[..., D // 2:]) * turn
        flat = torch.cat((rotated.real, rotated.imag), dim=-1)
        expected = flat / (flat.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # the table is fp32: 63 rad * 2^-24


@pytest.mark.parametrize("case", small_cases(OPS["attention"]))
def test_attention_is_a_weighted_mean_of_visible_values(case):
    values = inputs_of("attention", case)
    window, v = values["window"], values["v"]
    q, k = callable_of("qk_norm_rope", "eager")(values["q"], values["k"], values["cos"], values["sin"])
    got = callable_of("attention", "eager")(**values)
    T, H, group = q.size(1), q.size(2), q.size(2) // k.size(2)
    for t in (0, T // 2, T - 1):
        first = max(0, t - window) if window >= 0 else 0
        for h in range(H):
            keys, vals = k[0, first:t + 1, h // group], v[0, first:t + 1, h // group]
            weights = torch.softmax(keys @ q[0, t, h] / math.sqrt(q.size(-1)), dim=0)
            torch.testing.assert_close(got[0, t, h], weights @ vals, rtol=1e-9, atol=1e-9)


def test_cross_entropy_caps_logits_and_ignores_minus_one():
    x = torch.tensor([[40.0, 0.0], [0.0, 1.0], [9.0, 9.0]], dtype=torch.float64)
    w = torch.eye(2, dtype=torch.float64)
    targets = torch.tensor([1, 0, -1])
    z = 15 * torch.tanh(x / 15)
    rows = [math.log(math.exp(a) + math.exp(b)) - (b if t else a)
            for (a, b), t in zip(z.tolist(), [1, 0], strict=False)]
    fn = callable_of("cross_entropy", "eager")
    assert fn(x, w, targets).item() == pytest.approx(sum(rows) / 2, rel=1e-12)
    assert fn(x, w, targets, reduction="sum").item() == pytest.approx(sum(rows), rel=1e-12)
    assert fn(x, w, targets, reduction="none").tolist() == pytest.approx([*rows, 0.0], rel=1e-12)


@pytest.mark.parametrize("case", small_cases(OPS["newton_schulz"]))
def test_newton_schulz_keeps_the_singular_vectors_and_flattens_the_values(case):
    g = inputs_of("newton_schulz", case)["g"]
    o = newton_schulz_eager(g)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    torch.testing.assert_close(o, u @ torch.diag_embed(s) @ vh, rtol=1e-8, atol=1e-8)
    assert s.max() < 1.3


def test_muon_update_follows_its_formula_bank_by_bank():
    values = inputs_of("muon_update", "odd_shared", torch.float64)
    values = {k: [x.double() for x in v] if isinstance(v, list) else v for k, v in values.items()}
    before = {k: [x.clone() for x in values[k]] for k in ("params", "grads", "buffers")}
    callable_of("muon_update", "eager")(**values)
    for i, (p, g, b) in enumerate(zip(before["params"], before["grads"], before["buffers"], strict=True)):
        buffer = 0.95 * b + 0.05 * g
        update = 0.05 * g + 0.95 * buffer
        wide = update if update.size(1) <= update.size(2) else update.mT
        o = newton_schulz_eager(wide)
        o = o if update.size(1) <= update.size(2) else o.mT
        scale = max(1.0, p.size(1) / p.size(2)) ** 0.5
        torch.testing.assert_close(values["buffers"][i], buffer, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(values["params"][i], p * (1 - 0.02 * 0.1) - 0.02 * scale * o, rtol=1e-5, atol=1e-6)
    for grad, untouched in zip(values["grads"], before["grads"], strict=True):
        assert torch.equal(grad, untouched)


def test_paged_append_writes_slots_and_skips_minus_one():
    values = inputs_of("paged_append", "tiny", torch.float32)
    before = values["k_pages"].clone(), values["v_pages"].clone()
    q, k = callable_of("qk_norm_rope", "eager")(values["q"], values["k"], values["cos"], values["sin"])
    got = callable_of("paged_append", "eager")(**values)
    assert torch.equal(got, q)
    slots = values["slots"].tolist()
    assert -1 in slots
    written = {slot: row for row, slot in enumerate(slots) if slot >= 0}
    for pages, old, new in ((values["k_pages"], before[0], k), (values["v_pages"], before[1], values["v"])):
        rows, old_rows = pages.flatten(0, 1), old.flatten(0, 1)
        for slot in range(len(rows)):
            assert torch.equal(rows[slot], new[written[slot]] if slot in written else old_rows[slot])


@pytest.mark.parametrize("case", small_cases(OPS["paged_attention"]))
def test_paged_attention_equals_dense_attention_over_the_gathered_context(case):
    values = inputs_of("paged_attention", case, torch.float64)
    got = callable_of("paged_attention", "eager")(**values)
    window, P = values["window"], values["k_pages"].size(1)
    if (scales := values["v_scales"]) is not None:
        codes = (values[name].view(torch.float8_e4m3fn).double() for name in ("k_pages", "v_pages"))
        values["k_pages"] = next(codes) / key_scale(values["q"].size(2))
        values["v_pages"] = next(codes) * scales[..., None]
    bounds = values["cu_seqlens_q"].tolist()
    for s, context in enumerate(values["context_lens"].tolist()):
        keys, vals = (torch.stack([pages[values["block_tables"][s, j // P], j % P] for j in range(context)])
                      for pages in (values["k_pages"], values["v_pages"]))
        queries = values["q"][bounds[s]:bounds[s + 1]]
        group = queries.size(1) // keys.size(1)
        for i, query in enumerate(queries):
            position = context - len(queries) + i
            first = max(0, position - window) if window >= 0 else 0
            for h in range(queries.size(1)):
                scores = keys[first:position + 1, h // group] @ query[h] / math.sqrt(query.size(-1))
                weights = torch.softmax(scores, dim=0)
                torch.testing.assert_close(got[bounds[s] + i, h], weights @ vals[first:position + 1, h // group],
                                           rtol=1e-9, atol=1e-9)


def test_sample_draws_from_the_softmax_of_the_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).expand(20_000, -1)
    rows = torch.arange(20_000)
    full = torch.full((20_000,), 0.7)
    everything = torch.ones(20_000), torch.zeros(20_000)  # top_p, min_p
    ids, log_probs = sample_eager(logits, full, torch.full_like(rows, 2), *everything, rows, torch.zeros_like(rows))
    expected = torch.softmax(torch.tensor([2.0, 1.0]) / 0.7, 0)
    assert set(ids.tolist()) == {0, 1}
    assert (ids == 0).double().mean().item() == pytest.approx(expected[0].item(), abs=0.015)  # 4 sigma
    torch.testing.assert_close(log_probs.exp(), expected[ids])


def test_sample_is_greedy_at_temperature_zero_and_blind_to_other_rows():
    values = inputs_of("sample", "tiny", torch.float32)
    ids, log_probs = sample_eager(**values)
    greedy = values["temperature"] == 0
    assert torch.equal(ids[greedy], values["logits"][greedy].argmax(-1))
    for row in range(len(ids)):
        alone = sample_eager(**{name: value[row:row + 1] for name, value in values.items()})
        assert alone[0].item() == ids[row].item() and alone[1].item() == log_probs[row].item()


def test_uniform_depends_on_seed_and_position_and_is_uniform():
    n = 50_000
    index = torch.arange(n)
    for u in (uniform(index, torch.zeros_like(index)), uniform(torch.zeros_like(index), index)):
        assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == n
        counts = torch.histc(u.float(), bins=20, min=0, max=1)
        chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum().item()
        assert chi2 < 60  # 19 degrees of freedom: exceeded by chance less than once in 10^5
    assert uniform(torch.tensor([1]), torch.tensor([2])) != uniform(torch.tensor([2]), torch.tensor([1]))


def test_resolved_kernels_compile_without_graph_breaks():
    kernels = resolve(KernelConfig.parse("auto"), CPU, torch.float32)
    x = torch.randn(4, 8)

    def block(x):
        return kernels.relu2(kernels.rms_norm(x))

    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
