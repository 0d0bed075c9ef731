"""Texts, strategies and helpers that the tests of rustbpe share."""

import hashlib
import random
import warnings

import numpy as np
import rustbpe
from hypothesis import strategies as st

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


def train(texts, n_merges, specials=SPECIALS, **options):
    """Train on texts that may well be too few for `n_merges`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the texts gave a vocabulary of")
        return rustbpe.Tokenizer.train(texts, 256 + n_merges + len(specials), specials, **options)


def ids_of(tokenizer, texts, **options):
    """The ids of each text, through encode_batch."""
    ids, offsets = tokenizer.encode_batch(texts, **options)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    return [ids[first:last].tolist() for first, last in zip(offsets[:-1], offsets[1:], strict=True)]


def words(seed, n, letters="abcdefgh", longest=9):
    """`n` random words."""
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(n)]


def signed(body):
    """The lines of a tokenizer file with their right checksum."""
    return body + f"sha256 {hashlib.sha256(body).hexdigest()}\n".encode()


def file_of(merges, specials=("<|bos|>",), pattern=rustbpe.PATTERN):
    """A file with a right checksum and any content."""
    lines = ["rustbpe tokenizer 1", "unicode 16.0.0", f"pattern {pattern}", f"specials {len(specials)}",
             *specials, f"merges {len(merges)}", *(f"{left} {right}" for left, right in merges)]
    return signed(("\n".join(lines) + "\n").encode())
