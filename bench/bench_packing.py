"""What packing loses and costs: our RowPacker beside plain best fit, on lengths drawn like FineWeb-EDU's.

    python -m bench.bench_packing                        # a minute on one core
    python -m bench.bench_packing --documents 10000 --rounds 3

The peer is the loader that nanochat (Nov 2025) got later: always the largest document that fits, and when none does the
shortest, cropped; from as large a window. What is longer than a row never fits, and piles up in its window.
Lengths are log-normal with a mean of 1,000 tokens and 22.9 % of all tokens beyond 2,048 in their own document, the loss
that no packing saves. Rounds take turns; the last line is JSON.
"""

import argparse
import json
import statistics
import time
from bisect import bisect_right, insort

import numpy as np

from nanochat.common import run_script
from nanochat.packing import BUFFER_DOCUMENTS, CHUNK_DOCUMENTS, Row, RowPacker

MEAN, BEYOND = 1000, 0.229


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=50_000, help="documents of a round, an epoch")
    parser.add_argument("--sequence-len", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each, in turns")
    return parser.parse_args(argv)


def draw_lengths(n: int, seed: int) -> np.ndarray:
    """Return n document lengths in tokens, at least 2."""
    normal = np.random.RandomState(seed).randn(n)
    low, high = 0.1, 3.0
    while high - low > 1e-6:
        spread = (low + high) / 2
        lengths = np.exp(spread * normal)
        lengths *= MEAN / lengths.mean()
        low, high = (spread, high) if np.maximum(lengths - 2049, 0).sum() / lengths.sum() < BEYOND else (low, spread)
    return np.maximum(2, lengths).astype(np.int64)


class Stream:
    """Documents of given lengths; what is in them does not matter."""

    def __init__(self, lengths: np.ndarray):
        self._lengths, self._tokens = lengths, np.zeros(int(lengths.max()), np.int64)

    def __len__(self) -> int:
        return len(self._lengths)

    def fetch(self, numbers: list[int]) -> list[Row]:
        return [Row(self._tokens[:self._lengths[number % len(self)]]) for number in numbers]


def ours(stream: Stream, capacity: int) -> list[int]:
    """Pack every document once; return the tokens of each row."""
    packer, rows = RowPacker(stream, capacity, crop=True), []
    while packer.state_dict()["counters"]["documents"] < len(stream):
        rows.append(len(packer.next_row().ids))
    return rows


def best_fit(stream: Stream, capacity: int) -> list[int]:
    window: list[tuple[int, int]] = []  # length, number
    documents: dict[int, np.ndarray] = {}
    following, rows = 0, []
    while following < len(stream) or window:
        pieces, room = [], capacity
        while room and (following < len(stream) or window):
            while len(window) <= BUFFER_DOCUMENTS - CHUNK_DOCUMENTS and following < len(stream):
                for row in stream.fetch(list(range(following, min(len(stream), following + CHUNK_DOCUMENTS)))):
                    documents[following] = row.ids
                    insort(window, (len(row.ids), following))
                    following += 1
            _, number = window.pop(max(0, bisect_right(window, (room, following)) - 1))
            pieces.append(documents.pop(number)[:room])
            room -= len(pieces[-1])
        rows.append(len(np.concatenate(pieces)))
    return rows


def main(args: argparse.Namespace) -> dict[str, dict]:
    packers = {"ours": ours, "best fit": best_fit}
    found = {name: {"lost": [], "us_per_row": []} for name in packers}
    for seed in range(args.rounds):
        lengths = draw_lengths(args.documents, seed)
        for name, pack in packers.items():
            start = time.perf_counter()
            rows = pack(Stream(lengths), args.sequence_len + 1)
            found[name]["us_per_row"].append(1e6 * (time.perf_counter() - start) / len(rows))
            found[name]["lost"].append(1 - sum(rows) / int(lengths.sum()))
    for name, samples in found.items():
        lost, spent = sorted(samples["lost"]), sorted(samples["us_per_row"])
        print(f"{name:<8} loses {statistics.median(lost):.1%} ({lost[0]:.1%} to {lost[-1]:.1%}), "
              f"{statistics.median(spent):.0f} us a row ({spent[0]:.0f} to {spent[-1]:.0f})")
    print(json.dumps({"bench": "packing", **vars(args), "found": found}))
    return found


if __name__ == "__main__":
    run_script(parse_args, main)
