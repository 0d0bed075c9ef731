"""Sources become verified shards: splits, idempotence, atomic replacement, and a sentence for every bad input."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset as dataset_module
from nanochat import text_sources
from nanochat.common import UserError
from nanochat.dataset import Documents, iter_texts, open_dataset, prepare, verify
from nanochat.text_sources import FolderSource, split_by_hash
from scripts import dataset as dataset_script


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "My Texts"
    path.mkdir()
    return path


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, texts, column="text"):
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=4)


def fill(folder, n=30):
    write_jsonl(folder / "a.jsonl", [f"document {i}" for i in range(n)])


def all_texts(dataset):
    return {split: list(iter_texts(dataset, split)) for split in ("train", "val")}


# --- a folder ---------------------------------------------------------------------------------------


def test_every_kind_of_file_becomes_documents_and_others_are_counted(folder, capsys):
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden", encoding="utf-8")
    (folder / "a.txt").write_bytes("\ufeffgrüße \U0001f600\r\nzwei".encode())
    (folder / "sub" / "b.JSONL").write_text('{"text": "one"}\n\n{"text": null}\n{"text": " \\n", "id": 2}\n',
                                            encoding="utf-8")
    write_parquet(folder / "sub" / "deep" / "c.parquet", ["two", None, "", "three", "four"])
    (folder / "notes.md").write_text("no data", encoding="utf-8")
    (folder / "README").write_text("no data", encoding="utf-8")
    texts = all_texts(prepare(folder))
    assert sorted(texts["train"] + texts["val"]) == ["four", "grüße \U0001f600\r\nzwei", "one", "three", "two"]
    assert len(texts["val"]) == 1
    out = capsys.readouterr().out
    assert "skipped 4 documents without text\n" in out
    assert "ignored 2 files of other kinds (.md 1, no suffix 1)\n" in out


def test_dataset_is_named_after_the_folder_and_its_path(folder, tmp_path):
    fill(folder)
    dataset = prepare(folder)
    assert dataset.name.startswith("my-texts-") and len(dataset.name) == len("my-texts-") + 8
    (tmp_path / "other").mkdir()
    assert FolderSource(tmp_path / "other" / ".." / "My Texts").name == dataset.name
    assert FolderSource(tmp_path / "other" / "My Texts").name != dataset.name


def test_manifest_describes_every_shard(folder, own_base_dir, monkeypatch):
    monkeypatch.setattr(dataset_module, "SHARD_CHARS", 10_000)
    monkeypatch.setattr(dataset_module, "ROW_GROUP_ROWS", 300)
    fill(folder, 1500)
    dataset = prepare(folder)
    assert dataset.folder == own_base_dir / "base_data" / dataset.name
    assert [path.name for path in dataset.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert dataset.val.name == "val.parquet"
    manifest = json.loads((dataset.folder / "manifest.json").read_text(encoding="utf-8"))
    assert sorted(manifest["files"]) == sorted(p.name for p in dataset.folder.iterdir() if p.suffix == ".parquet")
    for name, entry in manifest["files"].items():
        metadata = pq.ParquetFile(dataset.folder / name).metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert entry["row_groups"] == groups and entry["rows"] == metadata.num_rows
        assert entry["bytes"] == (dataset.folder / name).stat().st_size
        assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert max(max(entry["row_groups"]) for entry in manifest["files"].values()) == 300
    verify(dataset)


def test_preparing_again_does_nothing_until_the_source_changes(folder, capsys):
    fill(folder)
    first = prepare(folder)
    inode = first.val.stat().st_ino
    capsys.readouterr()
    again = prepare(folder)
    assert capsys.readouterr().out == "" and again.val.stat().st_ino == inode
    assert again.fingerprint == first.fingerprint == open_dataset(folder).fingerprint
    with open(folder / "a.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "a new one"}\n')
    changed = prepare(folder)
    assert changed.name == first.name and changed.fingerprint != first.fingerprint
    assert "a new one" in sum(all_texts(changed).values(), [])
    later = (folder / "a.jsonl").stat().st_mtime_ns + 10**9
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text(encoding="utf-8").replace("new", "old"))
    os.utime(folder / "a.jsonl", ns=(later, later))
    assert "a old one" in sum(all_texts(prepare(folder)).values(), [])


def test_same_content_elsewhere_has_the_same_fingerprint(folder, tmp_path):
    fill(folder)
    (tmp_path / "copy").mkdir()
    fill(tmp_path / "copy")
    assert prepare(folder).fingerprint == prepare(tmp_path / "copy").fingerprint


def test_a_damaged_shard_is_prepared_again(folder):
    fill(folder)
    dataset = prepare(folder)
    texts = all_texts(dataset)
    dataset.val.write_bytes(dataset.val.read_bytes()[:-1])
    assert all_texts(prepare(folder)) == texts
    manifest = (dataset.folder / "manifest.json").read_text(encoding="utf-8")
    for unreadable in ("{", "[]", manifest.replace('"format": 1', '"format": 2')):
        (dataset.folder / "manifest.json").write_text(unreadable, encoding="utf-8")
        with pytest.raises(UserError, match="is not prepared, run python -m scripts.dataset --data "):
            open_dataset(folder)
        assert all_texts(prepare(folder)) == texts


def test_a_failed_preparation_leaves_the_old_dataset_whole(folder):
    fill(folder)
    dataset = prepare(folder)
    texts = all_texts(dataset)
    (folder / "b.txt").write_bytes(b"fine so far \xff")
    with pytest.raises(UserError):
        prepare(folder)
    assert all_texts(open_dataset(folder)) == texts
    assert [path.name for path in dataset.folder.parent.iterdir() if path.is_dir()] == [dataset.name]


def test_a_killed_preparation_is_cleaned_up_by_the_next(folder, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    fill(folder)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module.shutil, "rmtree", lambda *args, **kwargs: None)  # a kill leaves everything
        patch.setattr(dataset_module, "replace_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder)
    base_data = dataset_module.base_dir() / "base_data"
    assert len([path for path in base_data.iterdir() if path.is_dir()]) == 1
    with pytest.raises(UserError, match="is not prepared"):
        open_dataset(folder)
    dataset = prepare(folder)
    assert [path.name for path in base_data.iterdir() if path.is_dir()] == [dataset.name]


def test_two_preparations_at_once_agree(folder, monkeypatch):
    fill(folder)
    built = []
    build = dataset_module._build
    monkeypatch.setattr(dataset_module, "_build", lambda *args: built.append(1) or build(*args))
    threads = [threading.Thread(target=prepare, args=(folder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    verify(open_dataset(folder))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3), max_size=60))
def test_split_keeps_every_text_and_shares_none(texts):
    split = list(split_by_hash(texts))
    assert sorted(text for _, text in split) == sorted(texts)
    train, val = ({text for name, text in split if name == wanted} for wanted in ("train", "val"))
    assert not train & val
    assert bool(train) == bool(texts) and bool(val) == (len(set(texts)) > 1)


def test_split_takes_a_twentieth_and_stops_at_the_cap(monkeypatch):
    texts = [f"text {i:05d}" for i in range(10_000)]
    val = [text for name, text in split_by_hash(texts) if name == "val"]
    assert 400 < len(val) < 600
    monkeypatch.setattr(text_sources, "VAL_MAX_CHARS", 100)
    assert [text for name, text in split_by_hash(texts) if name == "val"] == val[:10]
    assert [text for name, text in split_by_hash(texts * 2) if name == "val"] == val[:10] * 2


def test_documents_are_shuffled_the_same_way_every_time(folder):
    fill(folder, 200)
    texts = all_texts(prepare(folder))["train"]
    numbers = [int(text.split()[1]) for text in texts]
    assert sum(after < before for before, after in zip(numbers, numbers[1:], strict=False)) > 50
    dataset_folder = open_dataset(folder).folder
    (dataset_folder / "manifest.json").unlink()
    assert all_texts(prepare(folder))["train"] == texts


def test_max_chars_ends_the_source_early(folder):
    fill(folder)
    texts = sum(all_texts(prepare(folder, max_chars=100)).values(), [])
    assert 100 <= sum(map(len, texts)) < 100 + len("document 10")
    assert len(sum(all_texts(prepare(folder)).values(), [])) == 30


def test_iter_texts_caps_documents_and_characters(folder):
    fill(folder)
    dataset = prepare(folder)
    whole = list(iter_texts(dataset, "train"))
    assert list(iter_texts(dataset, "train", doc_cap=3)) == [text[:3] for text in whole]
    assert list(iter_texts(dataset, "train", doc_cap=3, max_chars=7)) == [text[:3] for text in whole[:3]]
    with pytest.raises(UserError, match="^split must be train or val, got 'test'$"):
        next(iter_texts(dataset, "test"))


# --- reading back -----------------------------------------------------------------------------------


def test_documents_are_found_by_index_in_any_order(folder, monkeypatch):
    monkeypatch.setattr(dataset_module, "SHARD_CHARS", 500)
    monkeypatch.setattr(dataset_module, "ROW_GROUP_ROWS", 7)
    fill(folder, 200)
    dataset = prepare(folder)
    assert len(dataset.train) > 2
    in_order = [text for path in dataset.train for text in pq.read_table(path).column("text").to_pylist()]
    documents = Documents(dataset, "train")
    assert len(documents) == len(in_order)
    for index in np.random.RandomState(0).permutation(len(in_order)):
        assert documents[index] == in_order[index]
    for outside in (-1, len(in_order)):
        with pytest.raises(IndexError):
            documents[outside]


def test_no_flipped_bit_changes_text_unnoticed(folder):
    rng = np.random.RandomState(0)
    write_jsonl(folder / "a.jsonl", ["".join(map(chr, rng.randint(97, 123, 200))) for _ in range(40)])
    dataset = prepare(folder)
    shard, = dataset.train
    texts, data = list(iter_texts(dataset, "train")), shard.read_bytes()
    noticed = 0
    for bit in rng.choice(len(data) * 8, 150, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(damaged)
        try:
            assert list(iter_texts(dataset, "train")) == texts
        except UserError as error:
            assert str(shard) in str(error)
            noticed += 1
    assert noticed > 100
    with pytest.raises(UserError) as error:
        verify(dataset)
    assert str(error.value) == (f"{shard} must have the sha256 of its manifest, it has another: "
                                "delete it and prepare the data again")


def test_corruption_names_shard_and_row_group(folder, monkeypatch):
    monkeypatch.setattr(dataset_module, "ROW_GROUP_ROWS", 10)
    fill(folder, 60)
    dataset = prepare(folder)
    shard, = dataset.train
    start = pq.ParquetFile(shard).metadata.row_group(3).column(0).data_page_offset
    data = bytearray(shard.read_bytes())
    data[start + 60] ^= 1
    shard.write_bytes(data)
    documents = Documents(dataset, "train")
    assert documents[29]
    with pytest.raises(UserError, match=rf"^{shard} is corrupt in row group 3 \(.+\): delete it and prepare the data "
                                        "again$"):
        documents[30]


def test_missing_or_cut_shards_are_named(folder):
    fill(folder)
    dataset = prepare(folder)
    again = f"run python -m scripts.dataset --data {folder}"
    size = dataset.val.stat().st_size
    dataset.val.write_bytes(b"short")
    for opened, rest in ((lambda: open_dataset(folder), again), (lambda: Documents(dataset, "val")[0],
                                                                 "prepare the data again")):
        with pytest.raises(UserError) as error:
            opened()
        assert str(error.value) == f"{dataset.val} must have {size} bytes, it has 5, {rest}"
    dataset.val.unlink()
    with pytest.raises(UserError) as error:
        open_dataset(folder)
    assert str(error.value) == f"{dataset.val} is missing, {again}"


# --- bad input --------------------------------------------------------------------------------------


def spoil(name, data):
    def write(folder):
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        else:
            pq.write_table(pa.table(data), folder / name)
    return write


BAD_FOLDERS = {
    "empty": (lambda folder: None, "data folder {folder} has no .parquet, .jsonl or .txt file"),
    "only other files": (spoil("a.md", b"text"), "data folder {folder} has no .parquet, .jsonl or .txt file"),
    "missing": (lambda folder: folder.rmdir(), "data folder {folder} does not exist"),
    "a file": (lambda folder: (folder.rmdir(), folder.write_text("text")),
               "data must be a folder of .parquet, .jsonl or .txt files, {folder} is a file"),
    "txt not UTF-8": (spoil("a.txt", "grüße".encode("latin-1")),
                      "{folder}/a.txt must be UTF-8 text, byte 2 is not (0xfc)"),
    "txt with NUL": (spoil("a.txt", "ü\0".encode()), "{folder}/a.txt must be text, byte 2 is NUL"),
    "jsonl not UTF-8": (spoil("a.jsonl", b'{"text": "\xc3\xbc"}\n{"text": "\xff"}\n'),
                        "{folder}/a.jsonl must be UTF-8 text, byte 25 is not (0xff)"),
    "jsonl without text": (spoil("a.jsonl", b'{"text": "a"}\n{"txt": "b", "id": 1}\n'),
                           '{folder}/a.jsonl:2 must be a JSON object with a string "text", it has id, txt'),
    "jsonl empty object": (spoil("a.jsonl", b"{}"),
                           '{folder}/a.jsonl:1 must be a JSON object with a string "text", it has no keys'),
    "jsonl list": (spoil("a.jsonl", b"[1]"), '{folder}/a.jsonl:1 must be a JSON object with a string "text", '
                                             "it is a list"),
    "jsonl number": (spoil("a.jsonl", b'{"text": 3}'), '{folder}/a.jsonl:1 must be a JSON object with a string '
                                                       '"text", its text is a int'),
    "jsonl not JSON": (spoil("a.jsonl", b'\n{"text": "a"'), '{folder}/a.jsonl:2 must be a JSON object with a string '
                                                            '"text", it is not JSON (JSONDecodeError)'),
    "jsonl nested too deep": (spoil("a.jsonl", b"[" * 100_000), '{folder}/a.jsonl:1 must be a JSON object with a '
                                                                'string "text", it is not JSON (RecursionError)'),
    "jsonl surrogate": (spoil("a.jsonl", b'{"text": "\\ud83d"}'), '{folder}/a.jsonl:1 must be a JSON object with a '
                                                                  'string "text", its text holds half of a '
                                                                  "surrogate pair"),
    "parquet without text": (spoil("a.parquet", {"content": ["a"], "id": [1]}),
                             "{folder}/a.parquet must have a column text, it has content, id"),
    "parquet with bytes": (spoil("a.parquet", {"text": [b"a"]}),
                           "{folder}/a.parquet must have strings in column text, it has binary"),
    "one document": (spoil("a.txt", b"alone"), "data {name} must have at least two different documents to split into "
                                               "train and validation, it has 1"),
    "equal documents": (spoil("a.jsonl", b'{"text": "a"}\n' * 5),
                        "data {name} must have at least two different documents to split into train and validation, "
                        "it has 5"),
    "no text in any": (spoil("a.txt", b" \n"), "data {name} must have at least two different documents to split into "
                                               "train and validation, it has 0"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_refused_with_a_sentence(case, folder):
    make, sentence = BAD_FOLDERS[case]
    make(folder)
    with pytest.raises(UserError) as error:
        prepare(folder)
    assert str(error.value) == sentence.format(folder=folder, name=FolderSource(folder).name)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet" * 50])
def test_broken_parquet_is_refused_by_name(folder, data):
    (folder / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=rf"^{folder}/a\.parquet is not a whole parquet file \(.+[^.]\)$"):
        prepare(folder)


def test_corrupt_pages_of_a_given_shard_are_refused(folder):
    fill(folder, 100)
    shard, = prepare(folder).train
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    (folder / "a.jsonl").unlink()
    (folder / "b.parquet").write_bytes(data)
    with pytest.raises(UserError, match=rf"^{folder}/b\.parquet is corrupt in row group 0 \(.+[^.]\)$"):
        prepare(folder)


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    fill(folder)
    monkeypatch.setattr(FolderSource, "files", lambda self: [self.folder / "gone.txt"])
    with pytest.raises(UserError) as error:
        list(FolderSource(folder).documents())
    assert str(error.value) == f"{folder}/gone.txt cannot be read (No such file or directory)"


def test_max_chars_must_leave_two_documents(folder):
    fill(folder)
    with pytest.raises(UserError) as error:
        prepare(folder, max_chars=5)
    assert str(error.value) == (f"data {FolderSource(folder).name} must have at least two different documents to split "
                                "into train and validation, it has 1 within 5 characters")
    with pytest.raises(UserError, match="^max-chars must be at least 1, got 0$"):
        prepare(folder, max_chars=0)


def test_unprepared_data_names_the_command(folder):
    for source in ("builtin", folder):
        with pytest.raises(UserError) as error:
            open_dataset(source)
        assert str(error.value) == f"data {source} is not prepared, run python -m scripts.dataset --data {source}"



# --- the program ------------------------------------------------------------------------------------


def test_builtin_of_this_python_is_prepared_by_the_script(capsys):
    dataset_script.main(dataset_script.parse_args(["--verify"]))
    out = capsys.readouterr().out
    dataset = open_dataset("builtin")
    assert f"{dataset.folder} (verified)\n" in out and "val.parquet" in out
    chars = dataset.manifest["chars"]
    assert 2_000_000 < chars["train"] < 20_000_000 and 50_000 < chars["val"] < chars["train"] / 10
    assert dataset.manifest["source"] == {"kind": "builtin", "python": sys.version.split()[0], "recipe": 1,
                                          "max_chars": None}
    val = set(iter_texts(dataset, "val"))
    assert not val & set(iter_texts(dataset, "train"))


def test_script_reports_a_mistake_without_traceback(tmp_path):
    run = subprocess.run([sys.executable, "-m", "scripts.dataset", "--data", str(tmp_path / "none")], text=True,
                         capture_output=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr == f"error: data folder {tmp_path / 'none'} does not exist\n"
