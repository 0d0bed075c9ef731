"""rustbpe against rustbpe 0.1.0 (in a process of its own), tiktoken and Hugging Face's tokenizers. Fails when a peer is
not installed; `bash scripts/setup.sh` installs them."""

import itertools
import random
import re
import unicodedata

import pyarrow
import pytest
import regex
import rustbpe
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import tokenizer_corpus
from bench.tokenizer_peer import ask, write_texts
from nanochat import peers
from scripts import tok_eval

SPECIALS = ["<|bos|>", "<|end|>", "|>a<|"]  # the last overlaps the others, where the leftmost wins
# characters at the edges of the pattern's classes, of 1 to 4 bytes, and strings that pair them
ADVERSARIAL = [*" \t\r\n\v\x1c\x85\xa0\u2003\u2028\u3000\u200b'\u2019sdmtSLVExyzé\u017f\u212aßǅʰ一한٣²½Ⅷ01.,-_<|>\"\\",
               *"\u0300\u0903\u20dd$©🙂\u200d\ufe0f\x00\U00010400", "'ll", "'VE", "\r\n", " \n ", "   ", "x\u0301",
               *SPECIALS, "<|bos", "|>", " the", "tion", "123", "...\n"]
adversarial_text = st.lists(st.sampled_from(ADVERSARIAL), max_size=40).map("".join)


# --- corpora: documentation, code, and scripts of the world -----------------------------------------


def english(max_bytes):
    """Docstrings of the standard library and of installed packages."""
    found = (text for source in tokenizer_corpus.documents(".py", ".md", ".rst")
             for text in re.findall(r'"""(.{60,}?)"""', source, re.DOTALL))
    return up_to(max_bytes, found)


def code(max_bytes):
    return list(tokenizer_corpus.documents(".py", max_bytes=max_bytes))


def world(max_bytes):
    """Our ten texts, then made-up words in fourteen scripts, frequent ones and rare ones, with marks and digits."""
    rng = random.Random(7)
    scripts = {}
    for char in map(chr, range(0x80, 0x2_0000)):
        scripts.setdefault(unicodedata.name(char, "?").split()[0], []).append(char)
    alphabets = [scripts[name][:300] for name in (
        "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "TAMIL", "THAI",
        "HANGUL", "HIRAGANA", "KATAKANA", "CJK")]
    words = [["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(4000)] for letters in alphabets]
    frequency = list(itertools.accumulate(1 / rank for rank in range(1, 4001)))

    def document():
        chosen = rng.choices(rng.choice(words), cum_weights=frequency, k=150)
        return "".join(word + rng.choice((" ", " ", " ", "、", ", ", ".\n", " 12", "\u3000")) for word in chosen)

    return up_to(max_bytes, itertools.chain(tok_eval.TEXTS.values(), (document() for _ in itertools.count())))


def up_to(max_bytes, texts):
    taken, size = [], 0
    for text in texts:
        if size >= max_bytes:
            break
        taken.append(text)
        size += len(text.encode())
    return taken


CORPORA = {"english": english, "code": code, "world": world}


def ranks_of(tokenizer):
    return [token.hex() for token in tokenizer.to_tiktoken()["mergeable_ranks"]]


def train(texts, vocab_size, specials=(), **options):
    return rustbpe.Tokenizer.train(texts, vocab_size, list(specials), **options)


@pytest.fixture(scope="module")
def texts():
    """A megabyte of each corpus."""
    return {name: corpus(1_000_000) for name, corpus in CORPORA.items()}


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train([text for some in texts.values() for text in some], 4096, SPECIALS)


@pytest.fixture(scope="module")
def tiktokenizer(tokenizer):
    return tiktoken.Encoding(**tokenizer.to_tiktoken())


@pytest.fixture(scope="module")
def huggingface(tokenizer):
    return tokenizers.Tokenizer.from_str(tokenizer.to_huggingface())


# --- the regex module -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [rustbpe.PATTERN, rustbpe.GPT4_PATTERN], ids=["nanochat", "GPT-4"])
def test_twenty_thousand_random_strings_are_split_like_the_regex_module_splits_them(pattern):
    rng, expected = random.Random(11), regex.compile(pattern)
    # assigned in this Python, whose tables are never newer than ours; surrogates are no text
    assigned = [char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cn", "Cs", "Co")]
    for index in range(20_000):
        hostile, anything = rng.choices(ADVERSARIAL, k=rng.randrange(20)), rng.choices(assigned, k=rng.randrange(20))
        text = "".join(rng.sample(hostile + anything, len(hostile + anything)))
        assert rustbpe.split(text, pattern) == expected.findall(text), f"string {index}: {text!a}"


# --- rustbpe 0.1.0 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_merges_equal_rustbpe_0_1_0(texts, name, tmp_path):
    path = write_texts(tmp_path / "texts", texts[name])
    for vocab_size in (300, 8192):
        theirs = ask({"texts": path, "vocab_size": vocab_size, "pattern": rustbpe.PATTERN}, ours=False)
        assert theirs["vocab_size"] == vocab_size and str(peers.FOLDER) in theirs["file"]
        assert ranks_of(train(texts[name], vocab_size)) == theirs["ranks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPORA)
def test_merges_of_a_whole_vocabulary_equal_rustbpe_0_1_0_however_the_text_comes(name, tmp_path):
    texts = CORPORA[name](15_000_000)
    path = write_texts(tmp_path / "texts", texts)
    theirs = ask({"texts": path, "vocab_size": 65536, "pattern": rustbpe.PATTERN}, ours=False)
    assert theirs["vocab_size"] == 65536
    assert ranks_of(train(texts, 65536)) == theirs["ranks"]
    for same in (reversed(texts), pyarrow.array(texts, pyarrow.large_string()), pyarrow.chunked_array(
            [texts[:7], texts[7:]])):
        assert ranks_of(train(same, 65536, num_threads=3)) == theirs["ranks"]
    spilled = train(texts, 65536, num_threads=1, memory_limit=1 << 20, spill_dir=str(tmp_path))
    assert ranks_of(spilled) == theirs["ranks"] and spilled.report["spilled_runs"] > 0
    assert ranks_of(train(texts, 8192)) == theirs["ranks"][:8192]


PATTERNS = [None, rustbpe.PATTERN, peers.VOCABULARIES["GPT-2"].pattern, r"\s+|\S+", r"\p{L}|\P{L}+"]


@pytest.mark.parametrize("vocab_size, pattern", [(256, None), (257, None), *((1500, pattern) for pattern in PATTERNS)])
def test_the_methods_of_rustbpe_0_1_0_give_its_results(texts, tmp_path, vocab_size, pattern):
    some = [text[:20_000] for name in CORPORA for text in texts[name][:5]]
    request = {"texts": write_texts(tmp_path / "texts", some), "vocab_size": vocab_size, "pattern": pattern,
               "rounds": 2, "encode": ["", *some, "".join(ADVERSARIAL)]}
    theirs, ours = ask(request, ours=False), ask(request, ours=True)
    assert theirs["file"] != ours["file"]
    for said in ("pattern", "vocab_size", "ranks", "ids", "batch", "decoded"):
        assert ours[said] == theirs[said], said
    assert ours["decoded"] == request["encode"]


# --- tiktoken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_ids_of_text_equal_tiktokens(texts, tokenizer, tiktokenizer, name):
    for text in texts[name]:
        ids = tiktokenizer.encode_ordinary(text)
        assert tokenizer.encode_ordinary(text) == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_ids_of_ten_megabytes_equal_tiktokens_with_a_whole_vocabulary():
    texts = code(15_000_000) + english(4_000_000) + world(3_000_000)
    learned, held_out = texts[::2], texts[1::2]
    assert sum(len(text.encode()) for text in held_out) > 10_000_000
    tokenizer = train(learned, 65536, SPECIALS)
    tiktokenizer = tiktoken.Encoding(**tokenizer.to_tiktoken())
    ids, offsets = tokenizer.encode_batch(held_out, num_threads=2)
    for text, first, last in zip(held_out, offsets[:-1], offsets[1:], strict=True):
        assert ids[first:last].tolist() == tiktokenizer.encode_ordinary(text)


@settings(max_examples=1000, deadline=None)
@given(adversarial_text)
def test_ids_of_adversarial_text_equal_tiktokens(tokenizer, tiktokenizer, text):
    assert tokenizer.encode_ordinary(text) == tiktokenizer.encode_ordinary(text)
    assert tokenizer.encode(text, allowed_special="all") == tiktokenizer.encode(text, allowed_special="all")
    assert tokenizer.count(text) == len(tiktokenizer.encode_ordinary(text))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30))
def test_ids_of_strings_made_of_tokens_equal_the_peers(tokenizer, tiktokenizer, huggingface, ids):
    # what tokens make when they meet finds more than random characters do
    assert tokenizer.decode(ids) == tiktokenizer.decode(ids)
    assert tokenizer.decode_bytes(ids) == tiktokenizer.decode_bytes(ids)
    text = tokenizer.decode(ids, errors="ignore")
    expected = tiktokenizer.encode_ordinary(text)
    assert tokenizer.encode_ordinary(text) == expected
    with_specials = tokenizer.encode(text, allowed_special="all")
    assert with_specials == tiktokenizer.encode(text, allowed_special="all") == huggingface.encode(text).ids


def outcome(encode, text, **options):
    """The ids, or the word that the call refuses text."""
    try:
        return list(encode(text, **options))
    except ValueError:
        return "refused"


SUBSETS = [set(names) for size in range(len(SPECIALS) + 1) for names in itertools.combinations(SPECIALS, size)]
CHOICES = ["all", *SUBSETS, {"the", "<|x|>"}]  # the last are no special tokens, and may be disallowed all the same
SPECIAL_TEXTS = ["", "the plain", "<|bos|>", "a <|bos|>\n<|end|><|end|>b", "<|bos|>a<|end|>", " |>a<| <|bos",
                 "<|x|> the", "<<|bos|>>", "  <|end|>  x"]


@pytest.mark.parametrize("allowed", CHOICES, ids=lambda choice: choice if choice == "all" else "|".join(sorted(choice)))
def test_allowed_and_disallowed_special_tokens_mean_what_they_mean_in_tiktoken(tokenizer, tiktokenizer, allowed):
    for disallowed in [*CHOICES, [*SPECIALS], (), frozenset(SPECIALS[:1])]:
        for text in SPECIAL_TEXTS:
            options = {"allowed_special": allowed, "disallowed_special": disallowed}
            expected = outcome(tiktokenizer.encode, text, **options)
            assert outcome(tokenizer.encode, text, **options) == expected, (text, disallowed)


def test_special_text_is_refused_by_default_and_named(tokenizer, tiktokenizer):
    for text in SPECIAL_TEXTS:
        assert outcome(tokenizer.encode, text) == outcome(tiktokenizer.encode, text)
    with pytest.raises(ValueError, match=r"<\|end\|>"):
        tokenizer.encode("a<|end|>")


# --- Hugging Face's tokenizers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_ids_of_text_equal_those_of_the_huggingface_export(texts, tokenizer, huggingface, name):
    for text in texts[name][:60]:
        encoding = huggingface.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, allowed_special="all") == encoding.ids
        assert huggingface.decode(encoding.ids, skip_special_tokens=False) == text


@settings(max_examples=1000, deadline=None)
@given(adversarial_text)
def test_ids_of_adversarial_text_equal_those_of_the_huggingface_export(tokenizer, huggingface, text):
    assert tokenizer.encode(text, allowed_special="all") == huggingface.encode(text, add_special_tokens=False).ids


def test_the_vocabulary_is_that_of_huggingface_training_but_for_ties(texts):
    # it breaks ties by another order of the bytes, so that ids differ and a few tokens of the rarest do
    some = [text for part in texts.values() for text in part]
    ours = train(some, 8192)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(rustbpe.PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator(some, tokenizers.trainers.BpeTrainer(
        vocab_size=8192, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    ours_in_their_spelling = tokenizers.Tokenizer.from_str(ours.to_huggingface()).get_vocab()
    common = len(ours_in_their_spelling.keys() & theirs.get_vocab().keys())
    assert len(theirs.get_vocab()) == 8192 and common >= 0.999 * 8192
    sample = [text[:2000] for part in texts.values() for text in part[-40:]]
    n_ours, n_theirs = sum(map(ours.count, sample)), sum(len(theirs.encode(text).ids) for text in sample)
    assert abs(n_ours / n_theirs - 1) < 0.001
