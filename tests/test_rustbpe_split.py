"""rustbpe's splitter, by hand and by the generic engine, against the regular expression it stands for."""

import unicodedata

import bpe_oracle
import pytest
import regex
import rustbpe
from bpe_texts import CODE, PROSE, WORLD, adversarial_text, train
from hypothesis import given, settings

# the same in parentheses is another string, so the generic engine runs it
PATTERNS = {1: rustbpe.PATTERN.replace("{1,2}", "{1}"), 2: rustbpe.PATTERN, 3: rustbpe.GPT4_PATTERN}


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


@pytest.mark.parametrize("digits", PATTERNS)
def test_by_hand_equals_the_regular_expression_for_any_number_of_digits(digits):
    text = "".join(f"{'7' * n} x{'3' * n}\u0663\u2167y{'9' * n}.\n" for n in range(9))
    assert rustbpe.split(text, PATTERNS[digits]) == regex.findall(PATTERNS[digits], text)


@pytest.mark.parametrize("digits", PATTERNS)
@settings(max_examples=300, deadline=None)
@given(adversarial_text)
def test_the_generic_engine_equals_the_hand(digits, text):
    assert rustbpe.split(text, f"(?:{PATTERNS[digits]})") == rustbpe.split(text, PATTERNS[digits])


@pytest.mark.slow
def test_the_generic_engine_has_the_same_unicode_tables_for_every_code_point():
    chars = [char for char in map(chr, range(0x110000)) if not "\ud800" <= char <= "\udfff"]
    text = "".join(f"x{char}1{char}. {char}{char}" for char in chars)
    assert rustbpe.split(text, f"(?:{rustbpe.PATTERN})") == rustbpe.split(text)


# --- other patterns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, pieces", [
    (r"\w+|\s+", ["Hi", ",", " ", "you", "!?"]),
    (r"[a-z]+", ["H", "i", ", ", "you", "!?"]),
    (r"x*", ["Hi, you!?"]),  # matches of nothing are none
    (r"(?=y)|(?<=,) |.", ["H", "i", ",", " ", "y", "o", "u", "!", "?"]),
    (r"i\K, ", ["Hi", ", ", "you!?"]),
    ("", ["Hi, you!?"]),
])
def test_what_no_match_covers_is_a_piece_of_its_own(pattern, pieces):
    assert rustbpe.split("Hi, you!?", pattern) == pieces


@pytest.fixture(scope="module")
def partial():
    return train([PROSE, WORLD, CODE], 60, pattern=r"(?<!\d)\p{L}+(?!\d)|\d+")


@settings(max_examples=200, deadline=None)
@given(adversarial_text)
def test_text_comes_back_under_a_pattern_that_matches_only_some_of_it(partial, text):
    assert partial.decode(partial.encode(text)) == text
    assert rustbpe.split(text, partial.pattern) == bpe_oracle.split(text, regex.compile(partial.pattern))


def test_training_with_another_pattern_equals_the_oracle_on_any_number_of_threads():
    pattern = r"\p{L}+|[^\p{L}\s]+"
    merges = bpe_oracle.train([PROSE, WORLD], 80, regex.compile(pattern))
    for num_threads in (1, 3):
        tokenizer = train([PROSE, WORLD], 80, pattern=pattern, num_threads=num_threads)
        assert tokenizer.merges == merges
        assert tokenizer.pattern == tokenizer.get_pattern() == pattern
    assert tokenizer.encode(CODE) == bpe_oracle.encode(CODE, merges, regex.compile(pattern))


@pytest.mark.parametrize("call, sentence", [
    (lambda: rustbpe.split("a", "(a"), r'a pattern must be a regular expression, "\(a" is not \(Parsing error.*'),
    (lambda: rustbpe.split("a", "a" * 8193), "a pattern must have at most 8192 bytes, got 8193"),
    (lambda: train(["a"], 1, pattern="a\nb"), r'a pattern must be one line, got "a\\nb"'),
    # the engine gives up on a million spaces: nobody gets pieces with a hole in them
    (lambda: rustbpe.split(" " * 1_000_000 + "x", r"\s+(?!\S)|\S+"),
     r"the pattern must split every text, its engine gives up behind byte 0 \(.*"),
    (lambda: train(["x", " " * 1_000_000 + "x"], 5, pattern=r"\s+(?!\S)|\S+"), "the pattern must split every text, .*"),
])
def test_a_pattern_that_does_not_work_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        call()
