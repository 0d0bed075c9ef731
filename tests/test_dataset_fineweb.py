"""FineWeb-EDU: shards by exact name, a validation shard that never moves, and what a run may rely on meanwhile."""

import io
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import running

from nanochat import download, fineweb, hub
from nanochat.common import UserError, run_script
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Documents, iter_texts, open_dataset, prepare, verify
from nanochat.tokenizer import Tokenizer
from scripts import dataset as dataset_script
from scripts import tok_train


def texts_of(shard):
    return [f"shard {shard} document {i} " + "word " * (i % 7) for i in range(40)]


def shard_bytes(texts, column="text", **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: texts}), buffer, row_group_size=10, **options)
    return buffer.getvalue()


def name_of(shard):
    return f"shard_{shard:05d}.parquet"


@pytest.fixture
def server(monkeypatch):
    with running() as faults:
        monkeypatch.setenv("HF_ENDPOINT", faults.url)
        monkeypatch.setattr(download, "BACKOFF_S", 0.001)
        for shard in (0, 1, 2, 3, 1822):
            faults.serve(fineweb.REPO, name_of(shard), shard_bytes(texts_of(shard)))
        yield faults


def refused(action, *args, **kwargs):
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    return str(error.value)


def test_shards_come_in_order_and_the_last_of_all_validates(server):
    dataset = prepare("fineweb-edu", shards=3)
    assert [path.name for path in dataset.train] == [name_of(0), name_of(1), name_of(2)]
    assert dataset.val.name == "shard_01822.parquet"
    assert list(iter_texts(dataset, "train")) == texts_of(0) + texts_of(1) + texts_of(2)
    assert list(iter_texts(dataset, "val")) == texts_of(1822)
    verify(dataset)
    assert prepare("fineweb-edu", shards=2).val == dataset.val


def test_more_shards_do_not_change_what_a_run_opened(server):
    first = prepare("fineweb-edu", shards=2)
    more = prepare("fineweb-edu", shards=4)
    assert open_dataset("fineweb-edu", shards=2).fingerprint == first.fingerprint != more.fingerprint
    assert open_dataset("fineweb-edu").fingerprint == more.fingerprint
    assert len(server.gets) == 5


def test_training_demands_its_shards_and_a_tokenizer_takes_what_is_there(server, capsys):
    prepare("fineweb-edu", shards=1)
    hub.fetch_all([(fineweb.REPO, name_of(3))])  # as when shards 1 and 2 are still under way
    assert refused(open_dataset, "fineweb-edu", shards=4) == (
        "data fineweb-edu must have 4 training shards and shard_01822.parquet, shard_00001.parquet and 1 more are "
        "missing or cut, run python -m scripts.dataset --data fineweb-edu --shards 4")
    assert [path.name for path in open_dataset("fineweb-edu").train] == [name_of(0)]
    tok_train.main(tok_train.parse_args(["--data", "fineweb-edu", "--vocab-size", "270"]))
    assert "on 40 documents" in capsys.readouterr().out


def test_without_the_validation_shard_nothing_opens(server):
    hub.fetch_all([(fineweb.REPO, name_of(0))])
    assert refused(open_dataset, "fineweb-edu") == (
        "data fineweb-edu must have 1 training shards and shard_01822.parquet, shard_01822.parquet is missing or cut, "
        "run python -m scripts.dataset --data fineweb-edu --shards 1")


def test_unprepared_fineweb_names_the_command():
    assert refused(open_dataset, "fineweb-edu").endswith("run python -m scripts.dataset --data fineweb-edu --shards 1")


def test_a_missing_shard_ends_the_program_with_its_name(server, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(lambda: dataset_script.parse_args(["--data", "fineweb-edu", "--shards", "5"]), dataset_script.main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err == (f"error: {server.url}/datasets/{fineweb.REPO}/resolve/main/shard_00004.parquet could not be "
                   "downloaded: the server answered 404 (there is no such file)\n")


def test_the_program_lists_what_it_has(server, capsys):
    dataset_script.main(dataset_script.parse_args(["--data", "fineweb-edu", "--shards", "2", "--workers", "3",
                                                   "--verify"]))
    out = capsys.readouterr().out
    assert out.startswith("data fineweb-edu: train 80 documents; val 40 documents; ")
    assert f"{hub.repo_folder(fineweb.REPO)} (verified)\n" in out
    assert "  shard_00001.parquet    train        40 documents" in out
    assert "  shard_01822.parquet    val          40 documents" in out


def test_a_shard_that_was_cut_or_deleted_is_named_and_fetched_again(server):
    dataset = prepare("fineweb-edu", shards=1)
    whole = dataset.train[0].read_bytes()
    dataset.train[0].write_bytes(whole[:-1])
    assert "shard_00000.parquet is missing or cut, run " in refused(open_dataset, "fineweb-edu")
    prepare("fineweb-edu", shards=1)
    dataset.train[0].unlink()
    assert "shard_00000.parquet is missing" in refused(open_dataset, "fineweb-edu")
    assert prepare("fineweb-edu", shards=1).train[0].read_bytes() == whole


@pytest.mark.parametrize("data, sentence", [
    (shard_bytes(["a"], column="content"), "must have a column text, it has content"),
    (shard_bytes([1, 2]), "must have strings in column text, it has int64"),
])
def test_a_shard_without_text_is_refused_by_name(server, data, sentence):
    server.serve(fineweb.REPO, name_of(1), data)
    assert refused(prepare, "fineweb-edu", shards=2) == f"{hub.repo_folder(fineweb.REPO) / name_of(1)} {sentence}"
    assert refused(open_dataset, "fineweb-edu", shards=2).endswith(sentence)


@pytest.mark.parametrize("wrong, sentence", [
    ({"source": "fineweb-edu", "shards": 0}, "--shards must be in 1..1822, got 0"),
    ({"source": "fineweb-edu", "shards": 1823}, "--shards must be in 1..1822, got 1823"),
    ({"source": "fineweb-edu", "max_chars": 9},
     "data fineweb-edu is counted in shards, not in characters, got max-chars 9"),
    ({"source": "builtin", "shards": 2}, "--shards counts the shards of fineweb-edu, data builtin has none to choose "
                                         "from"),
])
def test_shards_and_characters_belong_to_their_sources(wrong, sentence):
    assert refused(prepare, **wrong) == sentence
    if "max_chars" not in wrong:
        assert refused(open_dataset, **wrong) == sentence


# --- corrupt row groups -----------------------------------------------------------------------------


CHECKED = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False}


def corrupted(texts, group):
    data = bytearray(shard_bytes(texts, **CHECKED))
    column = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(group).column(0)
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    return bytes(data)


def test_corrupt_row_groups_are_named_or_skipped_and_counted(server, capsys):
    server.serve(fineweb.REPO, name_of(1), corrupted(texts_of(1), 2))
    dataset = prepare("fineweb-edu", shards=2)
    where = hub.repo_folder(fineweb.REPO) / name_of(1)
    assert refused(lambda: list(iter_texts(dataset, "train"))).startswith(f"{where} is corrupt in row group 2 (")
    capsys.readouterr()
    skipping = prepare("fineweb-edu", shards=2, skip_corrupt=True)
    assert capsys.readouterr().out.endswith("skipped corrupt row groups of shard_00001.parquet: 2\n")
    assert list(iter_texts(skipping, "train")) == texts_of(0) + texts_of(1)[:20] + texts_of(1)[30:]
    assert open_dataset("fineweb-edu", shards=2).fingerprint == skipping.fingerprint != dataset.fingerprint


def test_all_ranks_agree_on_what_is_skipped(server):
    server.serve(fineweb.REPO, name_of(0), corrupted(texts_of(0), 1))
    prepare("fineweb-edu", shards=1, skip_corrupt=True)
    tokenizer = Tokenizer.train(texts_of(0), 300)

    def rows(rank, world_size, n):
        loader = PretrainLoader(open_dataset("fineweb-edu", shards=1), "train", tokenizer, 1, 16, rank=rank,
                                world_size=world_size)
        found = [x.tolist() for x, _ in islice(loader, n)]
        loader.close()
        return found

    alone = rows(0, 1, 12)
    assert [rows(0, 2, 6), rows(1, 2, 6)] == [alone[0::2], alone[1::2]]
    assert len(Documents(open_dataset("fineweb-edu"), "train")) == 30


def test_what_was_damaged_after_it_came_is_not_skipped_but_fetched_again(server):
    server.serve(fineweb.REPO, name_of(0), shard_bytes(texts_of(0), **CHECKED))
    path, = prepare("fineweb-edu", shards=1).train
    path.write_bytes(corrupted(texts_of(0), 1))
    assert refused(prepare, "fineweb-edu", shards=1, skip_corrupt=True) == (
        f"{path} must have the sha256 of its manifest, it has another: delete it and prepare the data again")
    path.unlink()
    assert len(Documents(prepare("fineweb-edu", shards=1, skip_corrupt=True), "train")) == 40


def test_nulls_in_a_shard_are_empty_documents(server):
    server.serve(fineweb.REPO, name_of(0), shard_bytes(["a", None, "b"]))
    assert list(iter_texts(prepare("fineweb-edu", shards=1), "train")) == ["a", "", "b"]


def test_corrupt_row_groups_of_a_folder_are_skipped_when_asked(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(corrupted(texts_of(0), 3))
    assert refused(prepare, folder).startswith(f"{folder}/a.parquet is corrupt in row group 3 (")
    dataset = prepare(folder, skip_corrupt=True)
    assert f"skipped corrupt row groups of {folder}/a.parquet: 3\n" in capsys.readouterr().out
    assert sorted(text for split in ("train", "val") for text in iter_texts(dataset, split)) == sorted(texts_of(0)[:30])
    assert dataset.fingerprint == open_dataset(folder).fingerprint
    assert "is corrupt" in refused(prepare, folder)  # without the flag it is another dataset
