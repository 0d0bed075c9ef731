"""Bits per byte, of a model and of a token unigram."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.common import Runtime
from nanochat.evals.bpb import evaluate_bpb, token_counts, unigram_bpb

V = 5
BYTES = np.array([1, 2, 3, 4, 0], np.int32)  # token 4 is a special


class Bigram:
    """A model whose logits are a row of a table; `calls` counts forward passes."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table, self.calls = table, 0

    def __call__(self, x, targets, reduction="mean"):
        self.calls += 1
        return F.cross_entropy(self.table[x].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)


def batches(*targets):
    for row in targets:
        y = torch.tensor([row])
        yield torch.zeros_like(y), y


def test_a_uniform_model_spends_log2_v_bits_a_token():
    model = Bigram(torch.zeros(V, V))
    assert evaluate_bpb(model, batches([0, 1, 2, 3]), 1, BYTES) == pytest.approx(4 * math.log2(V) / 10)


def test_specials_and_ignored_targets_count_on_neither_side():
    table = torch.zeros(V, V)
    table[0] = torch.tensor([0.0, 1.0, 2.0, 3.0, -9.0])
    model = Bigram(table)
    plain = evaluate_bpb(model, batches([1, 2]), 1, BYTES)
    assert evaluate_bpb(model, batches([1, 4, -1, 2, 4]), 1, BYTES) == plain
    log_p = torch.log_softmax(table[0].double(), 0)
    assert plain == pytest.approx(-(log_p[1] + log_p[2]).item() / math.log(2) / 5)


def test_batches_are_weighed_by_their_bytes_and_only_n_are_taken():
    model, stream = Bigram(torch.randn(V, V)), batches([0], [3, 3], [1, 2], [2, 2])
    three = evaluate_bpb(model, stream, 3, BYTES)
    assert model.calls == 3
    assert three == pytest.approx(evaluate_bpb(model, batches([0, 3, 3, 1, 2]), 1, BYTES))
    assert next(stream)[1].tolist() == [[2, 2]]


def test_nothing_to_count_is_infinite():
    model = Bigram(torch.zeros(V, V))
    assert evaluate_bpb(model, batches([4, -1]), 1, BYTES) == math.inf
    assert evaluate_bpb(model, batches(), 5, BYTES) == math.inf
    assert evaluate_bpb(model, batches([1]), 0, BYTES) == math.inf


def test_ranks_are_summed_before_dividing():
    class TwoRanks(Runtime):
        def all_reduce(self, tensor, op="sum"):
            assert (op, tensor.dtype) == ("sum", torch.float64)
            return tensor.add_(torch.tensor([math.log(2) * 6, 3.0], dtype=torch.float64))

    own = 2 * math.log2(V)  # bits over 3 bytes
    value = evaluate_bpb(Bigram(torch.zeros(V, V)), batches([0, 1]), 1, BYTES, TwoRanks(torch.device("cpu"), 0, 2))
    assert value == pytest.approx((own + 6) / (3 + 3))


def test_sums_are_fp64():
    """One token of 13.8 nats and 4,000 of 1e-6, which a sum in fp32 rounds away."""
    table = torch.tensor([[-1e-6, math.log(1e-6)], [0.0, 0.0]])
    nats = -F.log_softmax(table[0], 0).double()
    ones = np.array([1, 1], np.int32)
    for stream, n in ((batches([1], *([[0] * 10] * 400)), 401), (batches([1] + [0] * 4000), 1)):
        value = evaluate_bpb(Bigram(table), stream, n, ones)
        assert value == pytest.approx((nats[1] + 4000 * nats[0]).item() / math.log(2) / 4001, rel=1e-12)


def test_token_counts_count_targets_that_are_not_ignored():
    assert token_counts(batches([0, 1, 1, -1], [4, 1, 0, 2], [3]), 2, V).tolist() == [2, 3, 1, 0, 1]


def test_unigram_by_hand():
    train, val = np.array([3, 0, 1, 0, 6]), np.array([2, 1, 0, 0, 5])
    nats = 2 * -math.log(4 / 15) + 1 * -math.log(1 / 15)
    assert unigram_bpb(train, val, BYTES) == pytest.approx(nats / math.log(2) / (2 * 1 + 1 * 2))
    assert unigram_bpb(train, np.array([0, 0, 0, 0, 5]), BYTES) == math.inf


def test_unigram_equals_a_model_that_predicts_its_frequencies():
    rng = np.random.RandomState(0)
    targets = torch.from_numpy(rng.choice(V, size=(4, 50), p=[0.5, 0.2, 0.1, 0.1, 0.1]))
    pairs = [(torch.zeros_like(y[None]), y[None]) for y in targets]
    counts = token_counts(pairs, 4, V)
    model = Bigram(torch.from_numpy(np.log(counts + 1.0))[None].expand(V, V))
    assert evaluate_bpb(model, pairs, 4, BYTES) == pytest.approx(unigram_bpb(counts, counts, BYTES))
