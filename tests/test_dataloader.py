"""PretrainLoader: every row whole and starting with BOS, each document once per epoch, any world size, exact resume."""

import gc
import json
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader as dataloader_module
from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Dataset, prepare
from nanochat.packing import Prefetcher, Row, RowPacker

BOS = 0


class CharTokenizer:
    """One token per character: its code point, BOS is 0."""

    bos_id = BOS

    def encode_batch(self, texts):
        ids = np.array([ord(char) for text in texts for char in text], np.uint32)
        return ids, np.cumsum([0] + [len(text) for text in texts], dtype=np.int64)


def write_dataset(folder, shards, val=("validation",)):
    """Write shards, each a list of row groups of texts, as prepared data."""
    files = {}
    contents = {f"shard_{i:05d}.parquet": groups for i, groups in enumerate(shards)} | {"val.parquet": [val]}
    for name, groups in contents.items():
        with pq.ParquetWriter(folder / name, pa.schema([("text", pa.large_string())])) as writer:
            for group in groups:
                writer.write_table(pa.table({"text": pa.array(group, pa.large_string())}))
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": f"{groups}", "rows": sum(map(len, groups)),
                       "row_groups": [len(group) for group in groups]}
    return Dataset("test", folder, {"files": files})


def words(n, longest=12, seed=0):
    rng = np.random.RandomState(seed)
    return ["".join(chr(97 + rng.randint(26)) for _ in range(rng.randint(1, longest))) for _ in range(n)]


@pytest.fixture
def dataset(tmp_path):
    texts = words(300)
    return write_dataset(tmp_path, [[texts[:100], texts[100:130]], [texts[130:]]], val=texts[:3])


@pytest.fixture
def load(dataset):
    """Build loaders of 2 rows of 16 tokens and close them afterwards."""
    loaders = []

    def build(split="train", **kwargs):
        loaders.append(PretrainLoader(kwargs.pop("dataset", dataset), split, CharTokenizer(), kwargs.pop("B", 2),
                                      kwargs.pop("T", 16), **kwargs))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def take(loader, n):
    return [(x.tolist(), y.tolist()) for x, y in islice(loader, n)]


# --- packing ----------------------------------------------------------------------------------------


class NumberedStream:
    """Token k of document n is 1000 n + k, so a row tells what is in it."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def length(self, number):
        return self.lengths[number % len(self)]

    def fetch(self, numbers):
        return [Row(1000 * n + np.arange(self.length(n), dtype=np.int64)) for n in numbers]


def pieces(row):
    """Split a row into (document number, tokens used), checking that each is a beginning of its document."""
    starts = [i for i, token in enumerate(row.ids) if token % 1000 == 0]
    found = []
    for start, stop in zip(starts, starts[1:] + [len(row.ids)], strict=True):
        number = int(row.ids[start]) // 1000
        assert row.ids[start:stop].tolist() == [1000 * number + k for k in range(stop - start)]
        found.append((number, stop - start))
    assert starts[0] == 0
    return found


packings = st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=25), st.integers(2, 14), st.integers(1, 9),
                     st.integers(1, 4))


@settings(max_examples=120, deadline=None)
@given(packings, st.booleans())
def test_each_document_is_in_one_row_per_epoch_and_crops_are_counted(packing, crop):
    lengths, capacity, buffer_size, chunk = packing
    stream = NumberedStream(lengths)
    packer = RowPacker(stream, capacity, crop=crop, buffer_size=buffer_size, chunk=chunk)
    rows, seen = 0, []
    cropped = {}
    while len(seen) < 3 * len(lengths):
        row = packer.next_row()
        rows += 1
        found = pieces(row)
        seen += [number for number, _ in found]
        for position, (number, used) in enumerate(found):
            if used < stream.length(number):
                cropped[number] = stream.length(number) - used
                assert used == capacity or (crop and position == len(found) - 1)
        if crop:
            assert len(row.ids) == capacity
        counters = packer.state_dict()["counters"]
        assert counters["rows"] == rows and counters["documents"] == len(seen)
        assert counters["cropped_tokens"] == sum(cropped.values())
        assert counters["cropped_documents"] == len(cropped)
        assert len(packer.state_dict()["buffer"]) <= buffer_size
    n = len(lengths)
    for epoch in range(3):
        assert sorted(seen[epoch * n: (epoch + 1) * n]) == list(range(epoch * n, (epoch + 1) * n))


@settings(max_examples=80, deadline=None)
@given(packings, st.booleans(), st.integers(0, 30))
def test_packer_resumes_after_any_row(packing, crop, n_rows):
    lengths, capacity, buffer_size, chunk = packing

    def build(state=None):
        return RowPacker(NumberedStream(lengths), capacity, crop=crop, buffer_size=buffer_size, chunk=chunk,
                         state=state)

    packer = build()
    for _ in range(n_rows):
        packer.next_row()
    resumed = build(json.loads(json.dumps(packer.state_dict())))
    for _ in range(10):
        assert packer.next_row().ids.tolist() == resumed.next_row().ids.tolist()
        assert packer.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("lengths, rows", [
    ([5, 9, 3, 2, 8, 4], [[(0, 5), (2, 3), (3, 2)], [(1, 9), (5, 1)]]),  # 3 and 2 end the row, not 4 and a rest of 1
    ([5, 9, 3, 2, 5], [[(0, 5), (4, 5)]]),  # one alone does, and is taken before two
    ([2, 4, 4, 6], [[(0, 2), (1, 4), (2, 4)]]),  # two of one length do, not 6 and a rest of 2
    ([2, 4, 5, 9], [[(0, 2), (2, 5), (1, 3)]]),  # one 4 is no pair: the largest, then the shortest cropped
])
def test_row_takes_the_oldest_then_what_ends_it_then_the_largest_that_fits(lengths, rows):
    packer = RowPacker(NumberedStream(lengths), 10, crop=True, chunk=len(lengths))
    assert [pieces(packer.next_row()) for _ in rows] == rows


def test_without_crop_a_row_ends_where_nothing_fits():
    packer = RowPacker(NumberedStream([5, 9, 4, 8]), 10, crop=False, chunk=4)
    assert pieces(packer.next_row()) == [(0, 5), (2, 4)]
    assert pieces(packer.next_row()) == [(1, 9)]


def test_no_document_waits_longer_than_the_window():
    lengths = [1] + [10] * 30  # largest first alone would leave the short one to the end
    packer = RowPacker(NumberedStream(lengths), 10, crop=True, buffer_size=8, chunk=2)
    assert pieces(packer.next_row())[0] == (0, 1)


# --- the loader -------------------------------------------------------------------------------------


def test_rows_start_with_bos_and_targets_are_the_next_tokens(load):
    for x, y in islice(load(), 40):
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (2, 16)
        assert x.is_contiguous() and y.is_contiguous()
        assert (x[:, 0] == BOS).all()
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert (y >= 0).all()


def test_every_document_appears_once_per_epoch_after_its_bos(tmp_path, load):
    texts = [chr(0x4E00 + i) * (1 + i % 5) for i in range(90)]  # a document is its own character
    dataset = write_dataset(tmp_path, [[texts[:50]], [[], texts[50:]]])
    loader = load(dataset=dataset, B=1, T=12)
    seen = []
    while loader.epoch < 2:
        x, y = next(loader)
        row = x[0].tolist() + y[0, -1:].tolist()
        seen += [row[i + 1] for i in range(12) if row[i] == BOS]
    # a document cropped to its BOS alone shows no character
    missing = loader.stats["documents"] - len(seen)
    assert missing < 30
    counts = np.bincount(np.array(seen) - 0x4E00, minlength=90)
    assert counts.max() <= 3 and (counts < 2).sum() <= missing + 1


corpora = st.lists(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
                                             max_size=12), max_size=8), max_size=4), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(corpora, st.sampled_from([1, 2, 3, 8]), st.integers(1, 3), st.integers(1, 9), st.integers(0, 5))
def test_any_world_size_reads_the_same_rows_and_resumes_anywhere(tmp_path_factory, shards, W, B, T, cut):
    dataset = write_dataset(tmp_path_factory.mktemp("data"), shards)

    def load(**kwargs):
        return PretrainLoader(dataset, "train", CharTokenizer(), B, T, **kwargs)

    if not any(group for shard in shards for group in shard):
        with pytest.raises(UserError, match="^data test must have at least one document to load from train"):
            load()
        return
    alone = load()
    ranks = [load(rank=rank, world_size=W) for rank in range(W)]
    for _ in range(cut):
        for loader in ranks:
            assert take(loader, 1) == take(alone, 1)
        assert all(loader.state_dict() == alone.state_dict() for loader in ranks)
    state = json.loads(json.dumps(ranks[-1].state_dict()))
    resumed = [load(rank=rank, world_size=W, state=state) for rank in range(W)]
    again_alone = load(state=state)
    for _ in range(3):
        batches = [take(loader, 1) for loader in resumed]
        assert batches == [take(loader, 1) for loader in ranks] == [take(alone, 1) for _ in range(W)]
        assert batches == [take(again_alone, 1) for _ in range(W)]
        assert resumed[0].state_dict() == ranks[0].state_dict() == alone.state_dict()
    for loader in [alone, again_alone, *ranks, *resumed]:
        loader.close()


def test_state_follows_the_batches_handed_out_and_not_those_prepared(load):
    loader = load()
    start = loader.state_dict()
    time.sleep(0.05)  # the thread works ahead
    assert loader.state_dict() == start
    batches = take(loader, 6)
    assert take(load(state=start), 6) == batches
    assert take(load(state=loader.state_dict()), 2) == take(loader, 2)


def test_state_is_small_and_json(load):
    loader = load(B=4)
    take(loader, 3)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert len(state["buffer"]) <= 1000 and all(isinstance(number, int) for number in state["buffer"])


def test_a_split_smaller_than_a_batch_is_repeated(load):
    loader = load("val", B=8)
    batches = take(loader, 3)
    assert loader.epoch > 3
    assert all(len(x) == 8 for x, _ in batches)


def test_stats_count_what_was_read_and_lost(load):
    loader = load()
    assert loader.stats == {"rows": 0, "documents": 0, "tokens": 0, "cropped_documents": 0, "cropped_tokens": 0,
                            "epoch": 0}
    total = sum(len(text) + 1 for text in words(300))
    while loader.epoch < 1:
        before = loader.stats
        next(loader)
    assert before["tokens"] == before["rows"] * 16
    read = before["tokens"] + before["rows"] + before["cropped_tokens"]
    assert 0.9 * total < read <= total
    assert 0 < before["cropped_documents"] <= before["cropped_tokens"]
    assert loader.epoch_fraction == (loader.stats["documents"] - 300) / 300


def test_long_documents_lose_what_is_beyond_the_row(tmp_path, load):
    loader = load(dataset=write_dataset(tmp_path, [[["a" * 100, "b" * 50]]]), B=1)
    x, y = next(loader)
    assert x[0].tolist() == [BOS] + [ord("a")] * 15 and y[0].tolist() == [ord("a")] * 16
    assert loader.stats["cropped_tokens"] == 101 - 17 and loader.stats["cropped_documents"] == 1
    next(loader)
    assert loader.stats["cropped_tokens"] == 101 - 17 + 51 - 17


def test_resuming_with_other_rows_or_data_is_refused(load, tmp_path):
    state = load().state_dict()
    with pytest.raises(UserError, match="^to resume, the loader must have the same seq_len as the checkpoint, "
                                        "32 is not 16$"):
        load(T=32, state=state)
    with pytest.raises(UserError, match="^to resume, the loader must have the same split as the checkpoint, "
                                        "val is not train$"):
        load("val", state=state)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="^to resume, the loader must have the same data as the checkpoint, "):
        load(dataset=write_dataset(tmp_path / "other", [[["other"]]]), state=state)


@pytest.mark.parametrize("wrong, sentence", [
    ({"B": 0}, "the batch size must be at least 1, got 0"),
    ({"T": 0}, "the sequence length must be at least 1, got 0"),
    ({"rank": 2, "world_size": 2}, "rank must be in 0..1, got 2"),
])
def test_impossible_shapes_are_refused(load, wrong, sentence):
    with pytest.raises(UserError) as error:
        load(**wrong)
    assert str(error.value) == sentence


def test_nulls_and_empty_files_of_a_folder_do_not_stop_an_epoch(tmp_path, load):
    schema = pa.schema([("text", pa.string())])
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table({"text": ["one", None, "", "two"]}, schema), source / "a.parquet", row_group_size=1)
    pq.write_table(pa.table({"text": []}, schema), source / "b.parquet")
    pq.ParquetWriter(source / "c.parquet", schema).close()  # no row group at all
    dataset = prepare(source)
    texts = set()
    for split in ("train", "val"):
        x, _ = next(load(split, dataset=dataset, B=1, T=3))
        texts.add("".join(map(chr, x[0, 1:])))
    assert texts == {"on", "tw"}


def test_an_error_while_reading_surfaces_in_next(dataset, load):
    dataset.train[1].write_bytes(b"")
    loader = load(B=1, T=8)
    for _ in range(2):
        with pytest.raises(UserError, match=r"shard_00001\.parquet must have \d+ bytes, it has 0"):
            take(loader, 1000)


# --- the thread -------------------------------------------------------------------------------------


def running():
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


def test_close_ends_the_thread_and_next_says_so(load):
    before = running()
    loader = load()
    take(loader, 1)
    assert len(running() - before) == 1
    loader.close()
    loader.close()
    assert not running() - before
    with pytest.raises(RuntimeError, match="^next\\(\\) on a closed loader$"):
        next(loader)


def test_a_forgotten_loader_ends_its_thread(dataset):
    before = running()
    loader = PretrainLoader(dataset, "train", CharTokenizer(), 1, 8)
    next(loader)
    del loader
    gc.collect()
    assert not running() - before


def test_a_program_ends_with_a_loader_still_open():
    code = "import itertools; from nanochat.packing import Prefetcher; p = Prefetcher(itertools.count()); next(p)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_prefetcher_stays_a_bounded_number_of_items_ahead():
    produced = []
    prefetcher = Prefetcher((produced.append(i) or i for i in range(100)), depth=3)
    assert [next(prefetcher) for _ in range(5)] == list(range(5))
    time.sleep(0.2)
    assert len(produced) <= 5 + 3 + 1  # handed out, queued, waiting to be queued
    prefetcher.close()


# --- devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_every_cuda_device_is_copied_to_through_pinned_memory(device, load, monkeypatch):
    staged = []
    monkeypatch.setattr(dataloader_module._DeviceCopy, "_through_pinned",
                        lambda self, block: staged.append(self._device.type) or block)
    take(load(device=device), 2)
    assert staged == ["cuda", "cuda"]


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_cpu(load):
    on_gpu, on_cpu = load(device="cuda"), load()
    kept = []
    for _ in range(20):  # kept, so a pinned buffer reused too early would change them
        kept.append((next(on_gpu), next(on_cpu)))
    for (x, y), (cpu_x, cpu_y) in kept:
        assert x.is_cuda and torch.equal(x.cpu(), cpu_x) and torch.equal(y.cpu(), cpu_y)
