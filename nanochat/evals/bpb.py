"""Bits per byte: how many bits the model spends per byte of text, so that vocabularies of any size compare.

bpb = (sum of nats over the targets) / (ln 2 * sum of the targets' UTF-8 bytes)

Special tokens stand for no bytes; they and ignored targets (-1) count on neither side. Sums are fp64 and over
all ranks.
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch

from nanochat.common import Runtime


@torch.no_grad()
def evaluate_bpb(model, batches: Iterable, n_batches: int, token_bytes: np.ndarray,
                 runtime: Runtime | None = None) -> float:
    """Bits per byte of the model over this rank's first `n_batches` pairs x, y (B, T) int64; inf without any
    bytes.

    `token_bytes` is (V,) int32, bytes per token id, 0 for specials. The result is the same on every rank.
    """
    lengths = torch.as_tensor(token_bytes, dtype=torch.int64)
    totals = None  # (nats, bytes) fp64 on the device, so that no batch waits for the host
    for x, y in itertools.islice(batches, n_batches):
        counted, y_bytes = _counted(y, lengths.to(y.device))
        nats = model(x, y.where(counted, -1), reduction="none").view(-1).double().sum()
        totals = torch.stack((nats, y_bytes.sum().double())) + (0 if totals is None else totals)
    if totals is None:
        return math.inf
    if runtime is not None:
        runtime.all_reduce(totals)
    return bits_per_byte(*totals.tolist())


def token_counts(batches: Iterable, n_batches: int, vocab_size: int) -> np.ndarray:
    """(V,) int64: how often each token is a target in the first `n_batches` batches."""
    counts = np.zeros(vocab_size, np.int64)
    for _, y in itertools.islice(batches, n_batches):
        counts += np.bincount(y[y >= 0].cpu().numpy(), minlength=vocab_size)
    return counts


def unigram_bpb(train_counts: np.ndarray, val_counts: np.ndarray, token_bytes: np.ndarray) -> float:
    """Bits per byte that a token unigram, fitted on `train_counts` with add-one smoothing, spends on
    `val_counts`.

    All three are (V,). It knows how frequent tokens are and nothing of their order: what a model has to beat.
    """
    smoothed = train_counts.astype(np.float64) + 1
    nats = -np.log(smoothed / smoothed.sum())
    counted = np.where(token_bytes > 0, val_counts, 0)
    return bits_per_byte(float(counted @ nats), float(counted @ token_bytes.astype(np.int64)))


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """nats / (ln 2 * bytes), inf without bytes"""
    return nats / (math.log(2) * n_bytes) if n_bytes > 0 else math.inf


def _counted(y: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets count, (B, T) bool, and their bytes, (B, T) int64 with 0 elsewhere."""
    y_bytes = lengths[y.clamp(min=0)] * (y >= 0)
    return y_bytes > 0, y_bytes
