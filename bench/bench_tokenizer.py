"""The tokenizer against rustbpe 0.1.0, Hugging Face's tokenizers and tiktoken, on two cores, in one run.

    .venv/bin/python -m pytest bench/bench_tokenizer.py                       # about five minutes, the table at the end
    .venv/bin/python -m pytest bench/bench_tokenizer.py --benchmark-json tokenizer.json

Rounds of ours and of a peer take turns, so that a machine that slows down slows both. A ratio is the peer's median time
over ours. A target that is missed is printed as missed and fails nothing.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import rustbpe
import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

from bench import tokenizer_corpus
from bench.tokenizer_peer import ask, write_texts
from nanochat.tokenizer import SPECIAL_TOKENS

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 65_536
SAMPLE_BYTES = 10_000_000  # encoded in one round
MB = 1e6


class Target(NamedTuple):
    """What a ratio should be: at least this, or the aim. Of memory at most."""
    at_least: float
    aim: float


@dataclass
class Table:
    """What was measured so far, as lines of text."""
    rows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, ours: list[float], peer: str, theirs: list[float], target: Target | None,
            unit: str = "s") -> dict:
        """Add a row and return it for extra_info. ours, theirs: seconds of each round, or MB."""
        mine, yours = statistics.median(ours), statistics.median(theirs)
        ratio = yours / mine if unit == "s" else mine / yours
        pairs = sorted(y / m if unit == "s" else m / y for m, y in zip(ours, theirs, strict=False))
        figure = f"{what:<37} {mine:>9.3f} {spread(ours):>5} {peer:<34} {yours:>9.3f} {spread(theirs):>5} {unit:<2}"
        reached = " / ".join(verdict(ratio, goal, unit) for goal in target or ())
        self.rows.append(f"{figure} {ratio:>6.2f}x {pairs[0]:>6.2f}..{pairs[-1]:<6.2f} {reached}")
        return {"what": what, "ours": ours, "peer": peer, "theirs": theirs, "unit": unit, "ratio": ratio,
                "at_least": target and target.at_least, "aim": target and target.aim}

    def text(self) -> str:
        head = (f"{'':<37} {'ours':>9} {'+-':>5} {'peer':<34} {'median':>9} {'+-':>5} {'':<2} {'ratio':>7} "
                f"{'of rounds':>14} at least / aim")
        return "\n".join(["", *self.notes, *([head] if self.rows else []), *self.rows])


def spread(values: list[float]) -> str:
    """Return half the range of the rounds in percent of their median."""
    return f"{50 * (max(values) - min(values)) / statistics.median(values):.0f} %"


def verdict(ratio: float, target: float, unit: str) -> str:
    return f"{target:g}x {met(ratio >= target if unit == 's' else ratio <= target)}"


def met(reached: bool) -> str:
    return "met" if reached else "NOT MET"


# --- what is measured on ----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    """Keep to two cores, as every figure of this file says; children and threads inherit it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def table(request):
    table = Table()
    yield table
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(table.text(), flush=True)


@pytest.fixture(scope="module")
def corpus(table):
    texts = list(tokenizer_corpus.documents())
    size = sum(len(text.encode()) for text in texts)
    assert rustbpe.__build__["profile"] == "release", "a debug build is not worth measuring"
    peers = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "tiktoken"))
    table.notes += [
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}; rustbpe 0.1.0, {peers}; ours "
        f"{rustbpe.__build__['version']}, Unicode {rustbpe.__build__['unicode']}",
        f"corpus: {len(texts):,} files (.py, .md, .rst), {size / MB:.1f} MB{' (UNDER 50)' * (size < 50 * MB)}, sha256 "
        f"{tokenizer_corpus.sha256(texts)}"]
    return texts


@pytest.fixture(scope="module")
def corpus_file(corpus, tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts.jsonl", corpus)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    # With special tokens: without any, tiktoken's search for them finds the empty string everywhere and slows it down.
    return rustbpe.Tokenizer.train(corpus, VOCAB_SIZE, list(SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def tiktokenizer(tokenizer):
    return tiktoken.Encoding(**tokenizer.to_tiktoken())


@pytest.fixture(scope="module")
def sample(corpus):
    """Ten megabytes from all over the corpus."""
    step = max(1, round(sum(len(text.encode()) for text in corpus) / SAMPLE_BYTES))
    return corpus[::step]


def train(texts, **options):
    return rustbpe.Tokenizer.train(texts, VOCAB_SIZE, [], **options)


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(benchmark, ours: Callable, peers: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Time ours with pytest-benchmark, and before each of its rounds every peer once; return seconds by name.

    A peer returns its seconds, or None for the time of the call. With five rounds or more one is not counted."""
    times = {name: [] for name in peers}

    def setup():
        for name, call in peers.items():
            start = time.perf_counter()
            said = call()
            times[name].append(time.perf_counter() - start if said is None else said)

    warm_up = int(rounds >= 5)
    benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=warm_up)
    return {"ours": list(benchmark.stats.stats.data)} | {name: values[warm_up:] for name, values in times.items()}


# --- training ---------------------------------------------------------------------------------------


def bench_training(benchmark, table, corpus, corpus_file):
    reports = []
    request = {"texts": corpus_file, "vocab_size": VOCAB_SIZE, "pattern": rustbpe.PATTERN}

    def ours():
        reports.append(train(corpus).report)

    def huggingface():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(rustbpe.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))

    peer, hf = "rustbpe 0.1.0", f"tokenizers {version('tokenizers')}"
    times = in_turns(benchmark, ours, {peer: lambda: ask(request, ours=False)["seconds"][0], hf: huggingface}, rounds=3)
    rows = [table.add("train 65,536", times["ours"], name, times[name], target)
            for name, target in ((peer, Target(4, 7)), (hf, Target(8, 14)))]
    table.notes += phases(reports, 2)
    reports.clear()
    for _ in range(3):
        reports.append(train(corpus, num_threads=1).report)
    table.notes += phases(reports, 1)
    benchmark.extra_info.update(rows=rows, report=reports[0])


def phases(reports: list[dict], threads: int) -> list[str]:
    """Return the lines of the phase table; the median of each phase by itself."""
    medians = {phase: statistics.median(report["seconds"][phase] for report in reports)
               for phase in reports[0]["seconds"]}
    first = reports[0]
    cells = ", ".join(f"{phase} {value:.3f}" for phase, value in medians.items())
    return [f"phases, {threads} thread{'s' * (threads > 1)}: {cells} s; {first['unique_pieces']:,} unique pieces, "
            f"{first['merges']:,} merges"]


def bench_training_memory(benchmark, table, corpus_file):
    request = {"texts": corpus_file, "vocab_size": VOCAB_SIZE, "pattern": rustbpe.PATTERN}
    mine, yours = [], []

    def both():
        mine.append(ask(request, ours=True)["peak_bytes"] / MB)
        yours.append(ask(request, ours=False)["peak_bytes"] / MB)

    benchmark.pedantic(both, rounds=3)
    benchmark.extra_info["row"] = table.add("peak memory above the input, training", mine, "rustbpe 0.1.0", yours,
                                            Target(1, 0.7), unit="MB")


# --- encoding and decoding --------------------------------------------------------------------------


def bench_encoding_to_numpy(benchmark, table, tokenizer, tiktokenizer, sample):
    def ours():
        for text in sample:
            tokenizer.encode_to_numpy(text)

    def peer():
        for text in sample:
            tiktokenizer.encode_to_numpy(text, disallowed_special=())

    name = f"tiktoken {version('tiktoken')} encode_to_numpy"
    times = in_turns(benchmark, ours, {name: peer}, rounds=7)
    benchmark.extra_info["row"] = table.add("encode to numpy, one thread", times["ours"], name, times[name],
                                            Target(3, 5))


def bench_encoding_to_lists(benchmark, table, tokenizer, tiktokenizer, sample):
    export = tokenizers.Tokenizer.from_str(tokenizer.to_huggingface())
    few = sample[::5]

    def ours():
        for text in sample:
            tokenizer.encode_ordinary(text)

    def tiktokens():
        for text in sample:
            tiktokenizer.encode_ordinary(text)

    def huggingface():  # of a fifth of the text, which takes as long as the rest
        return 5 * seconds(lambda: [export.encode(text).ids for text in few])

    names = [f"tiktoken {version('tiktoken')} encode_ordinary", f"tokenizers {version('tokenizers')} encode"]
    times = in_turns(benchmark, ours, dict(zip(names, (tiktokens, huggingface), strict=True)), rounds=5)
    benchmark.extra_info["rows"] = [table.add("encode to lists, one thread", times["ours"], name, times[name], None)
                                    for name in names]


def bench_encoding_batches(benchmark, table, tokenizer, tiktokenizer, sample):
    peers = {f"tiktoken batch, {threads} threads": lambda threads=threads: seconds(
        lambda: tiktokenizer.encode_ordinary_batch(sample, num_threads=threads)) for threads in (1, 2, 4, 8)}
    times = in_turns(benchmark, lambda: tokenizer.encode_batch(sample, num_threads=2), peers, rounds=5)
    best = min(peers, key=lambda name: statistics.median(times[name]))
    benchmark.extra_info["row"] = table.add("encode_batch, two threads", times["ours"], best, times[best], Target(4, 8))
    benchmark.extra_info["tiktoken"] = {name: times[name] for name in peers}


def bench_decoding(benchmark, table, tokenizer, tiktokenizer, sample):
    ids = [id for text in sample for id in tokenizer.encode_ordinary(text)][:1_000_000]
    assert len(ids) == 1_000_000 and tokenizer.decode(ids) == tiktokenizer.decode(ids)
    name = f"tiktoken {version('tiktoken')} decode"
    array = np.array(ids, np.uint32)
    others = {name: lambda: seconds(lambda: tiktokenizer.decode(ids)),
              "array": lambda: seconds(lambda: tokenizer.decode(array))}
    times = in_turns(benchmark, lambda: tokenizer.decode(ids), others, rounds=15)
    benchmark.extra_info["rows"] = [
        table.add("decode a list of 1M tokens", times["ours"], name, times[name], Target(1, 2)),
        table.add("decode an array, tiktoken a list", times["array"], name, times[name], None)]


def bench_rates(benchmark, table, tokenizer, sample, tmp_path):
    """What Python costs: the same text through the bare Rust core and through each call."""
    row = np.empty(3 * tokenizer_corpus.DOCUMENT_CHARS * 4, np.uint16)
    calls = {
        "encode_ordinary": lambda: [tokenizer.encode_ordinary(text) for text in sample],
        "encode_to_numpy": lambda: [tokenizer.encode_to_numpy(text) for text in sample],
        "encode_into uint16": lambda: [tokenizer.encode_into(row, text) for text in sample],
        "encode_batch 1 thread": lambda: tokenizer.encode_batch(sample, num_threads=1),
        "encode_batch 2 threads": lambda: tokenizer.encode_batch(sample, num_threads=2),
        "count": lambda: [tokenizer.count(text) for text in sample],
    }
    peers = {name: lambda call=call: seconds(call) for name, call in calls.items()}
    times = in_turns(benchmark, lambda: tokenizer.encode_batch(sample, num_threads=1), peers, rounds=5)
    size = sum(len(text.encode()) for text in sample) / MB
    bare = bare_rust(tokenizer, sample, tmp_path)
    rates = {f"bare Rust {name}": size / statistics.median(values) for name, values in bare.items()}
    rates |= {name: size / statistics.median(times[name]) for name in calls}
    table.notes.append(f"MB/s of {size:.1f} MB: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
                       + ("" if bare else "; no bare Rust, cargo was not found"))
    benchmark.extra_info["mb_per_s"] = rates


def bare_rust(tokenizer, texts, folder) -> dict[str, list[float]]:
    """Return seconds of "split" and "encode" in the core's own program; nothing where there is no cargo."""
    cargo = shutil.which("cargo", path=f"{os.environ['PATH']}:{Path.home() / '.cargo' / 'bin'}")
    if cargo is None:
        return {}
    (folder / "tokenizer.bpe").write_bytes(tokenizer.to_bytes())
    (folder / "texts").write_text("\0".join(texts), encoding="utf-8")
    done = subprocess.run([cargo, "run", "--quiet", "--release", "--example", "rates", "--", folder / "tokenizer.bpe",
                           folder / "texts", "5"], cwd=ROOT / "rustbpe" / "core", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the worst texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [" ", "\n", "\t", "a", "0", "^", "'s", "\xa0", "\u0301", "🙂"], ids=ascii)
def bench_a_million_of_one_thing(benchmark, table, tokenizer, tiktokenizer, unit):
    texts = [unit * (1_000_000 // len(unit)) + tail for tail in ("", "x")]
    said = [tiktoken_says(tiktokenizer, text) for text in texts]
    took = []
    benchmark.pedantic(lambda: took.extend(seconds(lambda: tokenizer.encode_ordinary(text)) for text in texts),
                       rounds=5, warmup_rounds=1)
    first, second = (statistics.median(took[2 + i::2]) for i in (0, 1))
    table.notes.append(f"a million {ascii(unit):<13} {first:.3f} s (under 1 s {met(first < 1)}), tiktoken {said[0]}; "
                       f"with a letter behind {second:.3f} s ({met(second < 1)}), tiktoken {said[1]}")
    benchmark.extra_info.update(ours=[first, second], tiktoken=said)


def tiktoken_says(encoding, text: str) -> str:
    """Return the seconds of tiktoken, or how it fails: a panic of Rust passes every `except Exception`."""
    try:
        return f"{seconds(lambda: encoding.encode_ordinary(text)):.3f} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__
