"""rustbpe's ids: encoding in all its forms, special tokens, decoding, and what is refused with a sentence."""

import random
import string
import threading

import bpe_oracle
import numpy as np
import pytest
import rustbpe
import torch
from bpe_texts import CODE, PROSE, SPECIALS, WORLD, adversarial_text, file_of, ids_of, train
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def tokenizer():
    return train([PROSE, WORLD, CODE], 300)


def test_every_token_encodes_to_itself(tokenizer):
    for id in range(256, 556):
        token = tokenizer.decode_bytes([id])
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.encode(text) == [id]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30), max_size=5))
def test_batches_equal_single_texts_and_round_trip(tokenizer, texts):
    expected = [tokenizer.encode_ordinary(text) for text in texts]
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


UNITS = [" ", "\n", "\t", "a", "0", "^", "'s", "ab", "\xa0", "\u0301", "🙂", " \n", "\r"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_million_of_anything_encodes_and_comes_back(tokenizer, unit):
    # a quadratic encoder would need hours for one of these; regular expression engines give up on the spaces
    for text in (unit * 1_000_000, unit * 1_000_000 + "x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert len(ids) == tokenizer.count(text)


def test_the_names_of_special_tokens_are_ordinary_text(tokenizer):
    first = tokenizer.vocab_size - len(SPECIALS)
    for name in SPECIALS:
        ids = tokenizer.encode_ordinary(f"a {name}{name}\n{name}")
        assert max(ids) < first
        assert tokenizer.decode_bytes([*ids, first]) == f"a {name}{name}\n{name}<|bos|>".encode()


def test_all_ways_to_encode_give_the_same_ids(tokenizer):
    for text in (PROSE, WORLD, CODE, "", "a"):
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode_ordinary(text) == tokenizer.batch_encode([text])[0]
        assert tokenizer.count(text) == len(ids)
        for dtype in ("uint16", "uint32"):
            array = tokenizer.encode_to_numpy(text, dtype)
            assert array.dtype == dtype and array.tolist() == ids
    assert tokenizer.encode_to_numpy("a").dtype == np.uint32


def test_one_long_text_is_cut_between_threads_where_it_changes_nothing(tokenizer):
    pieces = [PROSE, WORLD, CODE, "\n\n  x", ".\r\n", "\n.\n", " \n\t\n12", "\n\u00e9\n\u00a0\n1"]
    text = "".join(random.Random(4).choices(pieces, k=30_000))
    assert len(text) > 2**21
    expected = tokenizer.encode_ordinary(text)
    texts = ["", text, "a", text[5:], ""]
    assert ids_of(tokenizer, texts, num_threads=4) == [[], expected, [97], tokenizer.encode_ordinary(text[5:]), []]
    merges = train([text], 50, num_threads=1).merges
    assert train([text], 50, num_threads=4).merges == merges


def test_threads_may_share_a_tokenizer_while_it_is_trained_anew():
    tokenizer, wrong = rustbpe.Tokenizer(), []

    def work():
        for _ in range(50):
            if tokenizer.decode(tokenizer.encode(PROSE)) != PROSE:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        tokenizer.train_from_iterator([PROSE], 300)
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=6), adversarial_text.map(str.encode)), max_size=5).map(b"".join))
def test_any_bytes_come_back_and_valid_ones_encode_as_text(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    try:
        assert ids == tokenizer.encode_ordinary(data.decode())
    except UnicodeDecodeError:
        pass


def test_an_invalid_byte_sequence_is_a_piece_of_its_own(tokenizer):
    # cut off after two of three bytes, then a byte that begins nothing
    assert tokenizer.encode_bytes(b"the \xe2\x82 the\xff") == [
        *tokenizer.encode("the "), 0xE2, 0x82, *tokenizer.encode(" the"), 0xFF]


# --- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
def test_a_row_gets_prepended_text_and_appended_ids_and_nothing_else(tokenizer, dtype):
    row = np.full(100, 7, dtype=dtype)
    ids = tokenizer.encode("the river")
    end = tokenizer.encode_into(row, "the river", start=3, prepend=[556, 0], append=np.array([557]))
    assert end == 3 + len(ids) + 3
    assert row.tolist() == [7] * 3 + [556, 0, *ids, 557] + [7] * (100 - end)
    exact = torch.zeros(len(ids), dtype=torch.int64)
    assert tokenizer.encode_into(exact.numpy(), "the river") == len(ids)
    assert exact.tolist() == ids


def frozen_row():
    row = np.zeros(9, np.int64)
    row.flags.writeable = False
    return row


@pytest.mark.parametrize("row, options, error, sentence", [
    (np.zeros(3, np.int32), {}, ValueError, "the ids must fit into the row of 3, 4 from place 0 on do not"),
    (np.zeros(9, np.int32), {"start": 6}, ValueError, "the ids must fit into the row of 9, 4 from place 6 on do not"),
    (np.zeros(9, np.int32), {"start": 10**30}, ValueError,
     f"the ids must fit into the row of 9, 4 from place {2**63 - 1} on do not"),
    (np.zeros(9, np.int32), {"start": -1}, ValueError, "start must be at least 0, got -1"),
    (np.zeros(9, np.int32), {"append": [558]}, ValueError, "a token id must be 0 to 557, got 558 at index 0"),
    (np.zeros((3, 3), np.int32), {}, ValueError, "row must have one dimension, got 2"),
    (np.zeros(18, np.int32)[::2], {}, ValueError, "row must be writable and contiguous, this one is not"),
    (frozen_row(), {}, ValueError, "row must be writable and contiguous, this one is not"),
    *((row, {}, TypeError, f"row must be a buffer of uint16, uint32, int32 or int64, this {type(row).__name__} is not")
      for row in (np.zeros(9, np.float32), [0] * 9)),
])
def test_a_row_that_does_not_do_stays_as_it_was(tokenizer, row, options, error, sentence):
    with pytest.raises(error) as raised:
        tokenizer.encode_into(row, "\x00\x01\x02\x03", **options)
    assert str(raised.value) == sentence
    assert not np.any(row)


def test_ids_beyond_16_bits_are_refused_where_they_would_not_fit():
    # a small and a capital letter, then two of these: 65,281 tokens that no other merges disturb
    merges = [(ord(small), ord(capital)) for small in string.ascii_lowercase for capital in string.ascii_uppercase]
    merges += [(256 + index // 676, 256 + index % 676) for index in range(65_281 - 676)]
    tokenizer = rustbpe.Tokenizer.from_bytes(file_of(merges, []))
    assert tokenizer.vocab_size == 65_537
    last = tokenizer.decode([65_536])
    assert tokenizer.encode_to_numpy(last).tolist() == [65_536]
    with pytest.raises(ValueError, match="^a vocabulary must have at most 65536 ordinary tokens for uint16, this one"):
        tokenizer.encode_to_numpy("a", "uint16")
    row = np.zeros(4, np.uint16)
    with pytest.raises(ValueError, match="^ids in a row of 2-byte integers must fit, some do not$"):
        tokenizer.encode_into(row, "a " + last)
    assert not row.any()
    smaller = rustbpe.Tokenizer.from_bytes(file_of(merges[:-1], ["<|s|>"]))
    assert smaller.encode_to_numpy(tokenizer.decode([65_535]), "uint16").tolist() == [65_535]


# --- special tokens ---------------------------------------------------------------------------------

NESTED = ["<|a|>", "<|a|><|b|>", "|>", "<|b|>x"]


@pytest.fixture(scope="module")
def nested():
    return train([PROSE], 10, NESTED)


def test_allowed_special_tokens_become_their_ids_leftmost_then_longest(nested):
    first = nested.vocab_size - 4
    a, ab, end, bx = range(first, first + 4)
    text = "<|a|><|b|>x|>"
    assert nested.encode(text, allowed_special="all") == [ab, 120, end]
    assert nested.encode(text, allowed_special={"<|a|>", "<|b|>x"}, disallowed_special=()) == [a, bx, 124, 62]
    assert nested.encode(text, allowed_special=["|>"], disallowed_special=[]) == [
        *b"<|a", end, *b"<|b", end, 120, end]
    assert nested.encode(text, allowed_special=["never heard of"], disallowed_special=()) == list(text.encode())
    assert nested.decode([a, ab, end]) == "<|a|><|a|><|b|>|>"


@pytest.mark.parametrize("options, name", [
    ({}, "<|a|><|b|>"),
    ({"allowed_special": {"<|a|><|b|>"}}, "<|a|>"),
    ({"allowed_special": "all", "disallowed_special": ["x|"]}, "x|"),  # no special token, forbidden all the same
    ({"allowed_special": "all", "disallowed_special": {"|>"}}, "|>"),  # what is both is disallowed
    ({"disallowed_special": [""]}, ""),
])
def test_disallowed_text_is_an_error_that_names_it(nested, options, name):
    with pytest.raises(ValueError) as error:
        nested.encode("a <|a|><|b|>x|>", **options)
    assert str(error.value) == (f'text must not hold the special token "{name}", it does: allow it, or pass '
                                "disallowed_special=() to encode it as text")


# --- decoding ---------------------------------------------------------------------------------------


def test_ids_come_as_lists_arrays_tensors_and_iterators(tokenizer):
    ids = tokenizer.encode(PROSE)
    kinds = [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
    for same in (ids, tuple(ids), iter(ids), torch.tensor(ids), np.array(ids * 2)[: len(ids)],
                 np.repeat(ids, 2)[::2], *(np.array(ids, dtype=kind) for kind in kinds[1:])):
        assert tokenizer.decode(same) == PROSE
    assert tokenizer.decode(np.array([97, 98], np.uint8)) == tokenizer.decode(b"ab") == "ab"
    assert tokenizer.decode([]) == tokenizer.decode(np.array([], np.int64)) == ""


def test_batches_decode_like_single_texts(tokenizer):
    texts = [PROSE, "", WORLD, CODE] * 5
    flat = tokenizer.encode_batch(texts)
    for num_threads in (1, 3, None):
        assert tokenizer.decode_batch(flat, num_threads=num_threads) == texts
        assert tokenizer.decode_batch(tokenizer.batch_encode(texts), num_threads=num_threads) == texts
    assert tokenizer.decode_batch([]) == tokenizer.decode_batch(tokenizer.encode_batch([])) == []
    assert tokenizer.decode_batch(([97, 98], [0, 2])) == ["ab"]


def test_what_is_no_utf8_is_decoded_as_python_decodes_it(tokenizer):
    ids = [97, 0xE2, 0x82, 98, 0xFF]
    for errors in ("replace", "ignore", "backslashreplace", "surrogateescape"):
        assert tokenizer.decode(ids, errors) == bytes(ids).decode(errors=errors)
        assert tokenizer.decode_batch([ids, [97]], errors=errors) == [bytes(ids).decode(errors=errors), "a"]
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(ids, "strict")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 557), max_size=40))
def test_a_stream_gives_what_decode_gives_but_the_special_tokens(tokenizer, ids):
    stream = rustbpe.StreamDecoder(tokenizer)
    parts = [stream.push(id) for id in ids]
    ordinary = [id for id in ids if id < 556]
    assert "".join(parts) + stream.flush() == tokenizer.decode(ordinary)
    assert all(part == "" for id, part in zip(ids, parts, strict=True) if id >= 556)


def test_a_stream_never_splits_a_character(tokenizer):
    stream = rustbpe.StreamDecoder(tokenizer, errors="strict")
    text = "né한🙂"
    assert [part for byte in text.encode() if (part := stream.push(byte))] == list(text)
    stream.push(0xE2)
    with pytest.raises(UnicodeDecodeError):
        stream.flush()
    with pytest.raises(LookupError):
        rustbpe.StreamDecoder(tokenizer, errors="no such handler")


def test_token_bytes_are_lengths_and_0_for_special_tokens(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (558,)
    assert lengths.tolist() == [len(tokenizer.decode_single_token_bytes(id)) for id in range(556)] + [0, 0]
    assert tokenizer.decode_single_token_bytes(556) == b"<|bos|>"


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, sentence", [
    *((call, "text must be valid Unicode, it holds a lone surrogate") for call in (
        lambda t: t.encode("a\ud800b"), lambda t: t.count("\ud800"), lambda t: t.encode_to_numpy("\ud800"))),
    (lambda t: t.encode_batch(["a", "\udfff"]), "text 1 must be valid Unicode, it holds a lone surrogate"),
    (lambda t: train(["a", "b\ud83d"], 5), "text 1 must be valid Unicode, it holds a lone surrogate"),
    (lambda t: train([PROSE], -3), "vocab_size must be 258 to 1048576, got 255"),
    (lambda t: train([PROSE], 2**40), f"vocab_size must be 258 to 1048576, got {2**40 + 258}"),
    (lambda t: train([PROSE], 10**30), f"vocab_size must be 258 to 1048576, got {2**63 - 1}"),
    (lambda t: t.encode_batch(["a"], num_threads=0), "num_threads must be 1 to 1024, got 0"),
    (lambda t: t.encode_batch(["a"], num_threads=-1), "num_threads must be 1 to 1024, got -1"),
    (lambda t: t.encode_to_numpy("a", "int8"), "dtype must be uint32 or uint16, got int8"),
    (lambda t: t.encode("a", allowed_special="<|b|>"), 'allowed_special must be "all" or a collection, got "<|b|>"'),
    (lambda t: t.decode_bytes([97, 558]), "a token id must be 0 to 557, got 558 at index 1"),
    (lambda t: t.decode_bytes(np.array([97, 558])), "a token id must be 0 to 557, got 558 at index 1"),
    (lambda t: t.decode_bytes([-1]), "a token id must be 0 to 557, got -1 at index 0"),
    (lambda t: t.decode_bytes(np.array([-1])), "a token id must be 0 to 557, got -1 at index 0"),
    (lambda t: t.decode_bytes([10**30]), f"a token id must be 0 to 557, got {10**30} at index 0"),
    (lambda t: t.decode_single_token_bytes(558), "a token id must be 0 to 557, got 558"),
    (lambda t: t.decode(np.zeros((2, 2), np.int64)), "token ids must be in one dimension, got 2"),
    *((lambda t, offsets=offsets: t.decode_batch(([97] * 4, offsets)),
       "offsets must rise from 0 to the number of ids 4, these do not")
      for offsets in ([0, 2], [0, 5], [1, 4], [0, 3, 1, 4], [])),
    (lambda t: train([], 5, ["<|a|>", "<|a|>"]), 'special tokens must differ, "<|a|>" comes twice'),
    (lambda t: train([], 5, ["a\nb"]), 'a special token must be one line of text, got "a\\nb"'),
    (lambda t: t.train_from_iterator([], 300, buffer_size=0), "buffer_size must be at least 1, got 0"),
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
    (lambda t: t.decode(5), "'int' object is not iterable"),
    (lambda t: t.encode("a", disallowed_special=[5]), "an item of disallowed_special must be str, got int"),
])
def test_a_wrong_type_is_one_sentence(tokenizer, call, sentence):
    with pytest.raises(TypeError) as error:
        call(tokenizer)
    assert str(error.value) == sentence
