"""rustbpe's training against the oracle in bpe_oracle.py, and how it ends. Fails when rustbpe is not built."""

import functools
import random
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import bpe_oracle
import pytest
import rustbpe
from bpe_texts import CODE, CORPORA, PROSE, SPECIALS, WORLD, adversarial_text, train, words
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent


def test_the_build_is_optimized_and_says_which_unicode_tables_it_has():
    assert rustbpe.__build__["profile"] == "release"
    assert rustbpe.__build__["unicode"] == "16.0.0"
    assert rustbpe.PATTERN == bpe_oracle.PATTERN.pattern


@pytest.mark.parametrize("name", CORPORA)
def test_merges_and_ids_equal_the_oracle(name):
    texts = CORPORA[name]
    merges = bpe_oracle.train(texts, 200)
    tokenizer = train(texts, 200)
    assert tokenizer.merges == merges
    for text in (PROSE, WORLD, CODE):
        assert tokenizer.encode(text) == bpe_oracle.encode(text, merges)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="aab bé'1\n", max_size=30), max_size=4), st.integers(0, 12), adversarial_text)
def test_merges_and_ids_equal_the_oracle_on_random_runs_and_ties(texts, n_merges, other):
    merges = bpe_oracle.train(texts, n_merges)
    tokenizer = train(texts, n_merges)
    assert tokenizer.merges == merges
    for text in (*texts, other):
        assert tokenizer.encode(text) == bpe_oracle.encode(text, merges)


def test_the_result_depends_on_neither_threads_nor_order_nor_batches():
    rng, vocabulary = random.Random(1), words(1, 400)
    texts = [" ".join(rng.choices(vocabulary, k=50)) for _ in range(200)]
    expected = train(texts, 500, num_threads=1).to_bytes()
    assert train(texts[::-1], 500, num_threads=1).to_bytes() == expected
    assert train(iter(texts), 500, num_threads=3).to_bytes() == expected
    # more than one batch of 16 MiB
    assert train((text for _ in range(2000) for text in texts), 500).to_bytes() == expected


def test_a_smaller_vocabulary_is_a_prefix_of_a_larger_one():
    assert train([PROSE, CODE], 50).merges == train([PROSE, CODE], 150).merges[:50]


def test_training_ends_early_when_no_pair_is_left():
    tokenizer = train(["ab ab"], 100)
    assert tokenizer.merges == [(97, 98), (32, 256)]
    assert tokenizer.vocab_size == 258 + len(SPECIALS)
    assert train([], 100).vocab_size == 256 + len(SPECIALS)


def test_progress_hears_of_both_phases_and_its_exception_ends_the_training():
    heard = []
    train([PROSE], 20, progress=lambda *event: heard.append(event))
    size = len(PROSE.encode())
    assert heard[-2:] == [("count", size, size), ("merge", 20, 20)]

    def fail(phase, done, total):
        raise RuntimeError(f"no more {phase}")

    with pytest.raises(RuntimeError, match="no more count"):
        train([PROSE], 20, progress=fail)


def test_an_exception_of_the_texts_passes_through():
    def texts():
        yield PROSE
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train(texts(), 20)


def test_training_on_a_million_equal_letters():
    tokenizer = train(["a" * 1_000_000], 30)
    assert tokenizer.merges[:3] == [(97, 97), (256, 256), (257, 257)]
    ids = tokenizer.encode("a" * 1_000_000)
    assert ids == [tokenizer.vocab_size - len(SPECIALS) - 1]
    assert tokenizer.decode(ids * 2) == "a" * 2_000_000

# --- what it tells ----------------------------------------------------------------------------------


def test_fewer_merges_than_asked_for_are_a_warning():
    with pytest.warns(UserWarning, match="^the texts gave a vocabulary of 258 tokens, 300 were asked for: every piece"):
        tokenizer = rustbpe.Tokenizer.train(["ab ab"], 300)
    assert tokenizer.vocab_size == 258
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rustbpe.Tokenizer.train(["ab ab"], 258)


def test_the_report_counts_what_was_read_and_names_every_phase():
    report = train(iter([PROSE, WORLD, "", PROSE]), 40).report
    seconds = report.pop("seconds")
    assert report == {"documents": 4, "bytes": len((PROSE + WORLD + PROSE).encode()), "merges": 40, "asked_merges": 40,
                      "unique_pieces": len({*bpe_oracle.split(PROSE), *bpe_oracle.split(WORLD)}), "spilled_runs": 0}
    assert list(seconds) == ["read", "split", "count", "init", "merge"]
    assert all(0 <= value < 60 for value in seconds.values())
    assert rustbpe.Tokenizer().report is None


def test_the_seconds_of_reading_are_those_of_the_iterable():
    def slow():
        yield PROSE
        time.sleep(0.2)

    seconds = train(slow(), 20).report["seconds"]
    assert seconds["read"] >= 0.2 > seconds["split"] + seconds["count"]


# --- as rustbpe 0.1.0 -------------------------------------------------------------------------------


def test_a_new_tokenizer_has_the_bytes_and_can_be_trained_again_and_again():
    tokenizer = rustbpe.Tokenizer()
    assert (tokenizer.vocab_size, tokenizer.get_pattern(), tokenizer.encode("hé")) == (256, rustbpe.GPT4_PATTERN,
                                                                                     [104, 195, 169])
    for texts, pattern in (([PROSE], None), ([CODE, WORLD], rustbpe.PATTERN)):
        tokenizer.train_from_iterator(iter(texts), 300, buffer_size=7, pattern=pattern)
        expected = rustbpe.Tokenizer.train(texts, 300, pattern=pattern or rustbpe.GPT4_PATTERN)
        assert tokenizer == expected and tokenizer.report["merges"] == 44
    ranks = tokenizer.get_mergeable_ranks()
    assert ranks == [(tokenizer.decode_bytes([id]), id) for id in range(300)]
    assert tokenizer.batch_encode([CODE, "", WORLD]) == [tokenizer.encode(text) for text in (CODE, "", WORLD)]


def test_training_that_fails_leaves_the_tokenizer_as_it_was():
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([PROSE], 280)
    before = tokenizer.fingerprint
    with pytest.raises(TypeError, match="^text 1 must be str, got int$"):
        tokenizer.train_from_iterator([PROSE, 5], 290)
    assert tokenizer.fingerprint == before


# --- Ctrl-C -----------------------------------------------------------------------------------------


TEXT = " ".join(words(2, 200_000, "abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize("phase, num_threads", [("count", 1), ("count", 2), ("merge", 1)])
def test_ctrl_c_stops_counting_and_merging(phase, num_threads):
    def texts():
        if phase == "merge":  # which takes seconds
            yield TEXT
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        if phase == "count":  # as this one text does
            yield TEXT * 100

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    finished = []
    try:
        with pytest.raises(KeyboardInterrupt):
            # a map inside extend: had the training come to its end, its result would be in before a signal is seen
            learn = functools.partial(rustbpe.Tokenizer.train, vocab_size=1_000_000, num_threads=num_threads)
            finished.extend(map(learn, [texts()]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not finished


@pytest.mark.slow
def test_the_unit_tests_of_the_core_crate():
    cargo = shutil.which("cargo") or str(Path.home() / ".cargo/bin/cargo")
    run = subprocess.run([cargo, "test", "--quiet", "--offline", "-p", "rustbpe-core"], cwd=ROOT / "rustbpe",
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
