"""rustbpe's texts: Arrow arrays and streams, and counts that go through runs on disk, give what a list of str gives."""

import os
import random
import string
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from bpe_texts import CODE, PROSE, WORLD, ids_of, train, words

TEXTS = [PROSE, "", WORLD, "twelve bytes", "thirteen byte", CODE, "a", "", WORLD * 3, PROSE]


@pytest.fixture(scope="module")
def tokenizer():
    return train([PROSE, WORLD, CODE], 300)


# --- Arrow ------------------------------------------------------------------------------------------


def forms(texts):
    """Every way to hand over `texts` as Arrow."""
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        array = pa.array(texts, kind)
        yield array
        yield pa.array(["no", None, *texts, "no"], kind)[2:-1]
        yield pa.chunked_array([array[:3], array[3:3], array[3:]])
        yield [array[:4], array[4:]]
        yield iter([texts[0], array[1:]])
    yield pa.chunked_array([[text] for text in texts])
    yield Capsules(pa.array(texts))


class Capsules:
    """An object that has nothing but the method."""

    def __init__(self, array):
        self.array = array

    def __arrow_c_array__(self, requested_schema=None):
        return self.array.__arrow_c_array__(requested_schema)


def test_arrow_arrays_and_streams_encode_like_lists(tokenizer):
    expected = [tokenizer.encode(text) for text in TEXTS]
    for form in forms(TEXTS):
        assert ids_of(tokenizer, form, num_threads=2) == expected
    for form in (pa.array([], pa.string()), pa.array([], pa.string_view()), pa.chunked_array([], pa.large_string())):
        assert ids_of(tokenizer, form) == []


def test_arrow_arrays_and_streams_train_like_lists():
    expected = train(TEXTS, 200)
    for form in forms(TEXTS):
        tokenizer = train(form, 200)
        assert tokenizer == expected
        assert (tokenizer.report["documents"], tokenizer.report["bytes"]) == (10, expected.report["bytes"])


def test_a_file_of_parquet_trains_without_python_strings(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "texts.parquet", row_group_size=3)
    file = pq.ParquetFile(tmp_path / "texts.parquet")
    groups = (file.read_row_group(index, ["text"])["text"].chunk(0) for index in range(file.num_row_groups))
    assert train(groups, 200) == train(TEXTS, 200)


def broken(offsets, data=b"abc"):
    """A string array whose offsets or bytes nobody has checked."""
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1,
                                 [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(data)])


def broken_view(length, buffer, offset):
    """The same with a view (length, four bytes of prefix, buffer, offset) into one buffer of 26 bytes."""
    view = pa.py_buffer(np.array([length, 0, buffer, offset], np.int32))
    return pa.Array.from_buffers(pa.string_view(), 1, [None, view, pa.py_buffer(string.ascii_lowercase.encode())])


KINDS = "an Arrow array of texts must be utf8, large_utf8 or string_view, got the"


@pytest.mark.parametrize("texts, error, sentence", [
    (pa.array(["a", None]), ValueError, "text 1 must be str, got null"),
    ([pa.array(["a", "b"]), "c", pa.array(["d", None], pa.string_view())], ValueError, "text 4 must be str, got null"),
    (broken([0, 1, 3], b"a\xff\xfe"), ValueError, "text 1 must be UTF-8, its byte 0 is not"),
    (broken([0, 2, 1, 3]), ValueError, "text 1 must be inside its Arrow buffers, it is not"),
    *((broken_view(*view), ValueError, "text 0 must be inside its Arrow buffers, it is not")
      for view in ((20, 0, 1000), (20, 0, 10), (20, 5, 0), (20, 0, -4), (-1, 0, 0), (2**31 - 1, 0, 2**31 - 1))),
    (pa.array([1, 2]), TypeError, f'{KINDS} format "l"'),
    (pa.array([b"a"]), TypeError, f'{KINDS} format "z"'),
    (pa.table({"text": ["a"]}), TypeError, f'{KINDS} format "+s"'),
    (pa.array(["a", "a"]).dictionary_encode(), TypeError, f'{KINDS} dictionary-encoded format "i"'),
])
def test_an_arrow_array_of_anything_else_is_one_sentence(tokenizer, texts, error, sentence):
    for call in (tokenizer.encode_batch, lambda texts: train(texts, 5)):
        with pytest.raises(error) as raised:
            call(texts)
        assert str(raised.value) == sentence


def test_a_used_up_capsule_and_a_failing_stream_are_refused(tokenizer):
    capsules = pa.array(["a"]).__arrow_c_array__()
    used = type("Used", (), {"__arrow_c_array__": lambda self: capsules})()
    assert ids_of(tokenizer, used) == [[97]]
    with pytest.raises(ValueError, match="^an Arrow capsule must be used once, this one is used up$"):
        tokenizer.encode_batch(used)

    def batches():
        yield pa.record_batch({"text": ["a"]})
        raise OSError("disk gone")

    reader = pa.RecordBatchReader.from_batches(pa.schema({"text": pa.string()}), batches())
    with pytest.raises(TypeError, match="got the format"):
        tokenizer.encode_batch(reader)
    with pytest.raises((TypeError, ValueError)):
        tokenizer.encode_batch(type("Wrong", (), {"__arrow_c_stream__": lambda self: "no capsule"})())


# --- spilling ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """Texts with far more different pieces than a table of 128 KiB holds, some of them in every run."""
    rng, common, rare = random.Random(5), words(5, 50), words(6, 40_000, "abcdefghijklmnopqrstuvwxyz", 14)
    return [" ".join(rng.choices(common, k=40) + rng.choices(rare, k=200)) for _ in range(500)]


@pytest.mark.parametrize("num_threads, limit", [(1, 1 << 17), (3, 3 << 17), (2, 1 << 20)])
def test_spilled_counts_give_the_same_tokenizer_and_leave_no_file(many, tmp_path, num_threads, limit):
    expected = train(many, 400, num_threads=1)
    tokenizer = train(many, 400, num_threads=num_threads, memory_limit=limit, spill_dir=tmp_path)
    assert tokenizer.to_bytes() == expected.to_bytes()
    report, whole = tokenizer.report, expected.report
    assert report["spilled_runs"] > 2 and whole["spilled_runs"] == 0
    assert report["unique_pieces"] == whole["unique_pieces"] > 20_000
    assert os.listdir(tmp_path) == []


def test_enough_memory_spills_nothing_even_where_nothing_could_be_written(many):
    assert train(many, 400, memory_limit=1 << 30, spill_dir="/no/such/folder") == train(many, 400)


def test_more_runs_than_files_may_be_open_are_merged_on_the_way(many):
    # 256 runs are the most one thread keeps
    texts = [" ".join(words(seed, 9_000, "abcdefghijklmnopqrstuvwxyz", 14)) for seed in range(40)] * 3
    tokenizer = train(texts, 50, num_threads=1, memory_limit=1 << 17)
    assert tokenizer.report["spilled_runs"] > 300
    assert tokenizer.merges == train(texts, 50).merges


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_a_training_that_ends_early_leaves_no_file(many, tmp_path, end):
    seen = []

    def texts():
        yield from many * 20  # more than a batch, which is counted and spilled before the next text is asked for
        seen.append(os.listdir(tmp_path))
        raise end("enough")

    with pytest.raises(end, match="enough"):
        train(texts(), 50, num_threads=1, memory_limit=1 << 17, spill_dir=tmp_path)
    assert seen == [[]] and os.listdir(tmp_path) == []


def test_a_spill_folder_that_cannot_be_written_is_an_os_error(many, tmp_path):
    with pytest.raises(OSError, match=rf"^the spill folder {tmp_path}/none must let runs be written \(No such file"):
        train(many, 50, memory_limit=1 << 18, num_threads=2, spill_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="^memory_limit must be at least 262144 bytes for 2 threads, got 99$"):
        train(many, 50, memory_limit=99, num_threads=2)


MEMORY = """
import re, sys, rustbpe
def texts():
    for document in range(600):
        yield " ".join(f"{document * 10_000 + index:x}".translate(LETTERS) for index in range(10_000))
LETTERS = str.maketrans("0123456789abcdef", "ghijklmnopqrstuv")
limit = int(sys.argv[1])
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
heard = []
def progress(phase, done, total):
    if phase == "count":
        heard[:] = [peak()]
before = peak()
tokenizer = rustbpe.Tokenizer.train(texts(), 256, num_threads=2, memory_limit=limit or None, progress=progress)
print(heard[0] - before, tokenizer.report["spilled_runs"])
"""


@pytest.mark.slow
def test_the_limit_bounds_the_memory_of_counting():
    def megabytes(limit):
        run = subprocess.run([sys.executable, "-c", MEMORY, str(limit)], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return map(int, run.stdout.split())

    # six million different pieces
    unlimited, none = megabytes(0)
    limited, runs = megabytes(16 << 20)
    assert none == 0 and unlimited > 300
    assert runs > 10 and limited < 16 + 2 * 16 + 40  # the limit, a batch of texts and their str objects, the rest


# --- processes --------------------------------------------------------------------------------------


def test_a_forked_child_encodes_and_trains_with_threads():
    tokenizer = train(TEXTS, 100)
    expected = tokenizer.encode_batch(TEXTS, num_threads=2)[0].tolist()
    child = os.fork()
    if child == 0:
        same = tokenizer.encode_batch(TEXTS, num_threads=2)[0].tolist() == expected
        os._exit(0 if same and train(TEXTS, 100, num_threads=2) == tokenizer else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
