"""Sampling: the distribution, its limits, and that a row's draw depends on its own seed and position alone."""

import math

import pytest
import torch

from kernels.sample import _inverse_cdf, sample_eager, uniform


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Broadcast plain numbers to one value per row."""
    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(len(logits)).contiguous()

    return sample_eager(logits, column(temperature, torch.float32), column(top_k, torch.int64),
                        column(top_p, torch.float32), column(min_p, torch.float32), column(seed, torch.int64),
                        column(position, torch.int64))


def splitmix(x):
    """One SplitMix64 step on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_uniforms_are_splitmix_of_seed_then_position():
    seeds, positions = [0, 1, 7919, 2**63 - 1, -3], [0, 1, 255, 2047, 10]
    want = [(splitmix((splitmix(s % 2**64) + p) % 2**64) >> 11) / 2**53 for s, p in zip(seeds, positions, strict=True)]
    assert uniform(torch.tensor(seeds), torch.tensor(positions)).tolist() == want


def test_uniforms_of_neighbouring_seeds_and_positions_look_independent():
    n = 200
    grid = uniform(torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)).view(n, n)
    assert 0 <= grid.min() and grid.max() < 1
    assert grid.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12) / n)
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1]), (grid[1:, :-1], grid[:-1, 1:])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(correlation) < 4 / n


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (2.0, 3), (1.0, 50)])
def test_frequencies_are_the_distribution(temperature, top_k):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -9.0])
    scaled = logits / temperature
    if 0 < top_k < 6:
        scaled[scaled < scaled.sort(descending=True).values[top_k - 1]] = float("-inf")
    want = scaled.softmax(dim=0)
    n = 20_000
    ids, _ = draw(logits.expand(n, 6), temperature, top_k, seed=torch.arange(n))
    got = torch.bincount(ids, minlength=6) / n
    assert got[want == 0].sum() == 0
    assert ((got - want).abs() <= 4 * (want * (1 - want) / n).sqrt() + 1e-9).all()


PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize("options, kept", [
    (dict(top_p=0.4), [0]), (dict(top_p=0.41), [0, 1]), (dict(top_p=0.7), [0, 1]), (dict(top_p=0.96), [0, 1, 2, 3, 4]),
    (dict(top_p=1e-9), [0]), (dict(top_k=3, top_p=0.8), [0, 1]), (dict(min_p=0.3), [0, 1, 2]), (dict(min_p=0.9), [0]),
    (dict(top_p=0.9, min_p=0.5), [0, 1]), (dict(temperature=0.0, top_p=0.5), [0]),
])
def test_top_p_and_min_p_keep_exactly_these(options, kept):
    """top-p: the fewest that reach p, of what top-k left; min-p: at least that share of the largest."""
    n = 4000
    ids, log_probs = draw(PROBABILITIES.double().log().float().expand(n, 5), seed=torch.arange(n), **options)
    assert sorted(set(ids.tolist())) == kept
    if options.get("temperature") != 0:
        torch.testing.assert_close(log_probs.exp(), PROBABILITIES[ids] / PROBABILITIES[kept].sum())


def test_temperature_0_is_argmax_and_the_first_of_equals():
    ids, _ = draw(torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 5.0, 5.0]]), temperature=0.0, top_k=2)
    assert ids.tolist() == [1, 0]


def test_equals_of_the_kth_logit_stay():
    ids, logprobs = draw(torch.zeros(300, 4) + torch.tensor([1.0, 1.0, 1.0, 0.0]), top_k=2, seed=torch.arange(300))
    assert set(ids.tolist()) == {0, 1, 2}
    assert logprobs == pytest.approx([-math.log(3)] * 300, abs=1e-6)


def test_log_probability_is_that_of_the_distribution_drawn_from():
    logits = torch.randn(3, 20)
    ids, logprobs = draw(logits, temperature=torch.tensor([0.7, 0.7, 0.0]), top_k=torch.tensor([0, 4, 4]), seed=3)
    top = (logits[1] / 0.7).topk(4).values.logsumexp(dim=0)
    want = [(logits[0] / 0.7).log_softmax(dim=0)[ids[0]], logits[1, ids[1]] / 0.7 - top,
            logits[2].log_softmax(dim=0)[ids[2]]]
    assert logprobs.tolist() == pytest.approx([float(w) for w in want], abs=1e-5)


def test_a_row_does_not_depend_on_the_others():
    n = 24
    logits = 3 * torch.randn(n, 301)
    temperature, top_k = (torch.arange(n) % 3) * 0.6, (torch.arange(n) % 5) * 7
    seed, position = torch.arange(n) * 31, torch.arange(n) + 5
    top_p, min_p = 1 - (torch.arange(n) % 4) * 0.2, (torch.arange(n) % 2) * 0.05
    columns = (temperature, top_k, top_p, min_p, seed, position)
    ids, logprobs = sample_eager(logits, *columns)
    for i in range(n):
        row = slice(i, i + 1)
        alone = sample_eager(logits[row], *(column[row] for column in columns))
        assert alone[0] == ids[i]
        assert alone[1] == pytest.approx(logprobs[i].item(), abs=1e-6)


def test_a_draw_changes_with_seed_and_with_position():
    logits = torch.zeros(64, 1000)
    by_seed, _ = draw(logits, seed=torch.arange(64))
    by_position, _ = draw(logits, position=torch.arange(64))
    assert len(set(by_seed.tolist())) > 50 and len(set(by_position.tolist())) > 50


@pytest.mark.parametrize("u, want", [(0.0, 1), (0.2999, 1), (0.3001, 3), (1 - 2**-53, 3), (1.0, 3)])
def test_an_id_of_probability_0_is_never_drawn(u, want):
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5833333, 0.0, 0.0]])
    assert _inverse_cdf(probabilities, torch.tensor([u], dtype=torch.float64)).tolist() == [want]


def test_a_row_of_nan_says_so_and_leaves_the_others_alone():
    logits = torch.randn(3, 10)
    want = draw(logits, seed=5)
    logits[1] = float("nan")
    ids, logprobs = draw(logits, seed=5, top_k=torch.tensor([0, 4, 0]))
    assert 0 <= ids[1] < 10 and logprobs[1].isnan()
    assert ids[[0, 2]].tolist() == want[0][[0, 2]].tolist() and torch.equal(logprobs[[0, 2]], want[1][[0, 2]])
