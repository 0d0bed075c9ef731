"""rustbpe against the oracle in bpe_oracle.py, on hostile text and hostile files. Fails when it is not built."""

import hashlib
import random
import shutil
import signal
import subprocess
import unicodedata
from pathlib import Path

import bpe_oracle
import numpy as np
import pytest
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
SPECIALS = ["<|bos|>", "<|end|>"]

PROSE = """The river rose through the night, and by morning the lower fields were a lake. "It's the third time," said
the farmer; "we'll move the hay, we'd better, before it's 1,250 bales short."  They'd counted 37 of them -- no, 38!
He had seen worse: in 1987 the water stood 2.5 metres deep   where the gate is now.\r\n\r\nNobody moved.\n\t\n"""
WORLD = ("Straße naïve façade; Ελληνικά και русский язык, 한국어 문장입니다. 日本語の文章、中文也有。 ١٢٣٤ ⅷ½ हिन्दी "
         "🙂👩\u200d🚀 e\u0301 l'été I\u2019ll")
CODE = '''def area(width: float, height: float) -> float:
    """Return width * height."""
    if width < 0 or height < 0:
        raise ValueError(f"sides must be >= 0, got {width}, {height}")
    return width * height\n\n\nprint(area(2.0, 10)); x = [i ** 2 for i in range(100) if i % 7 == 0]\n'''
CORPORA = {"prose": [PROSE, PROSE[40:300]], "world": [WORLD], "code": [CODE, CODE.upper(), PROSE]}

# every class of the pattern and its edges: what folds to s, what is white space in one table and not in another,
# numbers that are no digits, marks that combine, characters of 1 to 4 bytes
ADVERSARIAL = (" \t\r\n\v\f\x1c\x85\xa0\u1680\u2003\u2028\u2029\u3000\u200b\u180e'\u2019sdmtlveSTLVRxyzé\u017f\u212a"
               "ßǅʰ一한0189٣²½Ⅷ๕.,-_<|>\"\\\u0300\u0301\u0903\u20dd_$€©🙂\u200d\ufe0f\x00\x7f\U00010400\U0001d7ce")
CLUSTERS = ["'\u017f", "'LL", "'ve", "'rE", "\r\n", " \n ", "  ", "...", "x\u0301", "👩\u200d🚀"]
adversarial_text = st.lists(st.sampled_from([*ADVERSARIAL, *CLUSTERS]), max_size=40).map("".join)


def train(texts, n_merges, **options):
    return rustbpe.Tokenizer.train(texts, 256 + n_merges + len(SPECIALS), SPECIALS, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return train([PROSE, WORLD, CODE], 300)


def ids_of(tokenizer, texts, **options):
    ids, offsets = tokenizer.encode_batch(texts, **options)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    return [ids[first:last].tolist() for first, last in zip(offsets[:-1], offsets[1:], strict=True)]


def test_the_build_is_optimized_and_says_which_unicode_tables_it_has():
    assert rustbpe.__build__["profile"] == "release"
    assert rustbpe.__build__["unicode"] == "16.0.0"
    assert rustbpe.PATTERN == bpe_oracle.PATTERN.pattern


# --- the splitter -----------------------------------------------------------------------------------


@settings(max_examples=1000, deadline=None)
@given(adversarial_text)
def test_pieces_equal_the_regular_expression_and_lose_nothing(text):
    pieces = rustbpe.split(text)
    assert pieces == bpe_oracle.split(text)
    assert "".join(pieces) == text


@pytest.mark.parametrize("text, pieces", [
    ("it's I'LLx 'sure", ["it", "'s", " I", "'LL", "x", " '", "sure"]),
    ("a'\u017ft 'rer", ["a", "'\u017f", "t", " '", "rer"]),  # the long s folds to s
    ("today\n \n  on", ["today", "\n \n", " ", " on"]),
    ("12345\t\t6 ", ["12", "34", "5", "\t", "\t", "6", " "]),
    ("x\u0300y\x1c\x1c.\r\n", ["x", "\u0300y", "\x1c\x1c.\r\n"]),
])
def test_the_pattern_by_example(text, pieces):
    assert rustbpe.split(text) == bpe_oracle.split(text) == pieces


def test_every_assigned_character_is_split_like_the_regular_expression_splits_it():
    # assigned in this Python, whose tables are never newer than ours; surrogates are no text
    chars = [char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cn", "Cs", "Co")]
    assert len(chars) > 140_000
    for start in range(0, len(chars), 4096):
        text = "".join(f"x{char}y 1{char}2. {char}{char}'{char}\n" for char in chars[start:start + 4096])
        if rustbpe.split(text) != bpe_oracle.split(text):
            differing = [f"U+{ord(char):04X}" for char in chars[start:start + 4096]
                         if rustbpe.split(f"x{char}y 1{char}2. {char}{char}'{char}\n")
                         != bpe_oracle.split(f"x{char}y 1{char}2. {char}{char}'{char}\n")]
            pytest.fail(f"split differently: {differing[:20]}")


# --- training ---------------------------------------------------------------------------------------


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
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(400)]
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(200)]
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


def test_every_token_encodes_to_itself(tokenizer):
    for id in range(256, 556):
        token = tokenizer.decode_bytes([id])
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.encode(text) == [id]


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


def test_ctrl_c_stops_the_merging():
    rng = random.Random(2)
    text = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(200_000))

    def texts():
        yield text
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # the merging takes seconds

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    finished = []
    try:
        with pytest.raises(KeyboardInterrupt):
            # a map inside extend: had the training come to its end, its result would be in before a signal is seen
            finished.extend(map(rustbpe.Tokenizer.train, [texts()], [1_000_000], [SPECIALS]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not finished


# --- encoding and decoding --------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30), max_size=5))
def test_batches_equal_single_texts_and_round_trip(tokenizer, texts):
    expected = [tokenizer.encode(text) for text in texts]
    for num_threads in (1, 3):
        assert ids_of(tokenizer, texts, num_threads=num_threads) == expected
    assert [tokenizer.decode_bytes(ids).decode() for ids in expected] == texts


def test_pieces_of_every_length_equal_the_oracle(tokenizer):
    # 64 bytes is where the encoder changes its way to merge
    rng = random.Random(3)
    merges = tokenizer.merges
    for length in [*range(1, 70), 127, 128, 129, 500]:
        for text in ("e" * length, "the" * length, "".join(rng.choices("aeinorst", k=length))):
            assert tokenizer.encode(text) == bpe_oracle.encode(text, merges)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "0", "^", "'s", "ab", "\xa0", "\u0301", "🙂", " \n", "\r"])
def test_a_million_of_anything_encodes_and_comes_back(tokenizer, unit):
    # a quadratic encoder would need hours for one of these; regular expression engines give up on the spaces
    text = unit * (1_000_000 // len(unit)) + "x"
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_training_on_a_million_equal_letters():
    tokenizer = train(["a" * 1_000_000], 30)
    assert tokenizer.merges[:3] == [(97, 97), (256, 256), (257, 257)]
    assert tokenizer.encode("a" * 1_000_000) == [tokenizer.vocab_size - len(SPECIALS) - 1]


def test_the_names_of_special_tokens_are_ordinary_text(tokenizer):
    first = tokenizer.vocab_size - len(SPECIALS)
    for name in SPECIALS:
        ids = tokenizer.encode_ordinary(f"a {name}{name}\n{name}")
        assert max(ids) < first
        assert tokenizer.decode_bytes([*ids, first]) == f"a {name}{name}\n{name}<|bos|>".encode()


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, sentence", [
    (lambda t: t.encode("a\ud800b"), "text must be valid Unicode, it holds a lone surrogate"),
    (lambda t: t.encode_batch(["a", "\udfff"]), "text 1 must be valid Unicode, it holds a lone surrogate"),
    (lambda t: train(["a", "b\ud83d"], 5), "text 1 must be valid Unicode, it holds a lone surrogate"),
    (lambda t: train([PROSE], -3), "vocab_size must be 258 to 1048576, got 255"),
    (lambda t: train([PROSE], 2**40), f"vocab_size must be 258 to 1048576, got {2**40 + 258}"),
    (lambda t: t.encode_batch(["a"], num_threads=0), "num_threads must be 1 to 1024, got 0"),
    (lambda t: t.decode_bytes([97, 558]), "a token id must be 0 to 557, got 558 at index 1"),
    (lambda t: t.decode_bytes([-1]), "a token id must be 0 to 557, got -1 at index 0"),
    (lambda t: t.decode_bytes([10**30]), f"a token id must be 0 to 557, got {10**30} at index 0"),
    (lambda t: rustbpe.Tokenizer.train([], 300, ["<|a|>", "<|a|>"]), 'special tokens must differ, "<|a|>" comes twice'),
    (lambda t: rustbpe.Tokenizer.train([], 300, ["a\nb"]), 'a special token must be one line of text, got "a\\nb"'),
])
def test_a_wrong_value_is_one_sentence(tokenizer, call, sentence):
    with pytest.raises(ValueError) as error:
        call(tokenizer)
    assert str(error.value) == sentence


@pytest.mark.parametrize("call, sentence", [
    (lambda t: t.encode(b"abc"), "text must be str, got bytes"),
    (lambda t: t.encode_batch(["a", 3]), "text 1 must be str, got int"),
    (lambda t: t.encode_batch("abc"), "texts must be an iterable of str, got one str"),
    (lambda t: train("abc", 5), "texts must be an iterable of str, got one str"),
    (lambda t: train([None], 5), "text 0 must be str, got NoneType"),
    (lambda t: t.decode_bytes(["a"]), "a token id must be int, got str at index 0"),
])
def test_a_wrong_type_is_one_sentence(tokenizer, call, sentence):
    with pytest.raises(TypeError) as error:
        call(tokenizer)
    assert str(error.value) == sentence


# --- files ------------------------------------------------------------------------------------------


def signed(body):
    return body + f"sha256 {hashlib.sha256(body).hexdigest()}\n".encode()


def file_of(merges, specials=("<|bos|>",)):
    """A file with a right checksum and any content."""
    lines = ["rustbpe tokenizer 1", "unicode 16.0.0", f"pattern {rustbpe.PATTERN}", f"specials {len(specials)}",
             *specials, f"merges {len(merges)}", *(f"{left} {right}" for left, right in merges)]
    return signed(("\n".join(lines) + "\n").encode())


def test_a_file_comes_back_as_it_was(tokenizer):
    again = rustbpe.Tokenizer.from_bytes(tokenizer.to_bytes())
    assert again.to_bytes() == tokenizer.to_bytes() == file_of(tokenizer.merges, SPECIALS)
    assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer.to_bytes()[:-72]).hexdigest()
    assert again.encode(WORLD) == tokenizer.encode(WORLD)


def test_the_fingerprint_tells_vocabularies_and_special_tokens_apart(tokenizer):
    others = [train([PROSE, WORLD, CODE], 299), train([PROSE, WORLD], 300),
              rustbpe.Tokenizer.train([PROSE, WORLD, CODE], 558, SPECIALS[::-1])]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_no_cut_and_no_flipped_bit_is_accepted(tokenizer):
    data = train([PROSE], 20).to_bytes()
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"^a tokenizer file must .*"):
            rustbpe.Tokenizer.from_bytes(data[:end])
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"^a tokenizer file must .*"):
            rustbpe.Tokenizer.from_bytes(bytes(flipped))


DOUBLING = [(97, 97), *((id, id) for id in range(256, 286))]


@pytest.mark.parametrize("data, sentence", [
    (b"", 'a tokenizer file must start with "rustbpe tokenizer", this one does not'),
    (b"\x80\x04pickle", 'a tokenizer file must start with "rustbpe tokenizer", this one does not'),
    (signed(b"rustbpe tokenizer 2\nanything\n"), "a tokenizer file must have format version 1, this one has 2"),
    (file_of([(97, 98)])[:-1] + b" ", "a tokenizer file must match its checksum, this one is damaged or cut short"),
    (file_of([(97, 256)]), "a merge must join earlier tokens, token 256 joins 97 and 256"),
    (file_of([(97, 98), (97, 98)]), "every token must have its own bytes, token 257 repeats another"),
    (file_of([(97, 98), (98, 99), (97, 257)]), "a token's bytes must encode to that token, those of 258 do not"),
    (file_of(DOUBLING), "all tokens together must hold at most 16777216 bytes, token 278 passes that"),
    (file_of([], ["a", "a"]), 'special tokens must differ, "a" comes twice'),
    (signed(file_of([(97, 98)])[:-72].replace(b"merges 1", b"merges 99999999999")),
     'the number of merges must be 0 to 1048576, the file has "99999999999"'),
    (signed(file_of([(97, 98)])[:-72].replace(b"97 98", b"97 98 99")),
     "a merge must be two ids on one line, got another line"),
    (signed(file_of([(97, 98)])[:-72].replace(b"97 98", b"097 98")),
     "a tokenizer file must be exactly as it was written, this one has other lines"),
    (signed(file_of([(97, 98)])[:-72].replace(b"16.0.0", b"15.0.0")),
     'the tokenizer\'s unicode must be 16.0.0, the file has "15.0.0": train it again'),
])
def test_a_hostile_file_is_refused_with_a_sentence(data, sentence):
    with pytest.raises(ValueError) as error:
        rustbpe.Tokenizer.from_bytes(data)
    assert str(error.value) == sentence


@pytest.mark.slow
def test_the_unit_tests_of_the_core_crate():
    cargo = shutil.which("cargo") or str(Path.home() / ".cargo/bin/cargo")
    run = subprocess.run([cargo, "test", "--quiet", "--offline", "-p", "rustbpe-core"], cwd=ROOT / "rustbpe",
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
