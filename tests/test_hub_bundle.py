"""The evaluation bundle: downloaded, unpacked below its own folder, whole or not there."""

import io
import json
import zipfile

import pytest
from fault_server import running

from nanochat import download, hub
from nanochat.common import UserError

FILES = {"eval_bundle/core.yaml": b"icl_tasks: []\n", "eval_bundle/eval_data/a/b.jsonl": b'{"x": 1}\n' * 5000,
         "eval_bundle/eval_meta_data.csv": b"Eval Task,Random baseline\n"}


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    with running() as faults:
        monkeypatch.setattr(download, "BACKOFF_S", 0.001)
        faults.etag = False  # as from S3, whose ETag is no checksum of the file
        faults.files["/bundle.zip"] = zipped(FILES)
        faults.bundle = f"{faults.url}/bundle.zip"
        yield faults


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "manifest.json"}


UNPACKED = {name.removeprefix("eval_bundle/"): data for name, data in FILES.items()}


def test_bundle_is_unpacked_once_and_described(server, own_base_dir):
    folder = hub.fetch_bundle(server.bundle)
    assert folder == own_base_dir / "eval_bundle" and contents(folder) == UNPACKED
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["url"] == server.bundle
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(data) for name, data in UNPACKED.items()}
    assert hub.fetch_bundle(server.bundle) == folder and len(server.gets) == 1
    assert not list(own_base_dir.rglob("*.zip*"))


@pytest.mark.parametrize("faults, n_gets", [(["cut at 50"], 2), (["reset at 99", "html"], 3), (["wrong bytes"], 2),
                                            (["500", "chunked cut"], 3), (["too long"], 2)])
def test_faults_leave_no_bundle_or_a_whole_one(server, faults, n_gets):
    server.faults.extend(faults)
    assert contents(hub.fetch_bundle(server.bundle)) == UNPACKED
    assert len(server.gets) == n_gets and not any(asked for _, asked in server.gets)  # nothing tells versions apart


def test_bundle_with_a_damaged_file_in_it_is_refused(server, own_base_dir):
    data = bytearray(zipped(FILES))
    data[data.index(b'{"x"') + 500] ^= 1
    server.files["/bundle.zip"] = bytes(data)
    with pytest.raises(UserError, match="after 5 attempts: eval_bundle/eval_data/a/b.jsonl in it is damaged$"):
        hub.fetch_bundle(server.bundle)
    assert not (own_base_dir / "eval_bundle").exists()


def test_a_missing_or_cut_file_brings_the_bundle_again(server):
    folder = hub.fetch_bundle(server.bundle)
    (folder / "eval_data/a/b.jsonl").write_bytes(b"cut")
    assert contents(hub.fetch_bundle(server.bundle)) == UNPACKED
    (folder / "core.yaml").unlink()
    assert contents(hub.fetch_bundle(server.bundle)) == UNPACKED


def test_another_address_replaces_the_bundle(server):
    hub.fetch_bundle(server.bundle)
    server.files["/other.zip"] = zipped({"core.yaml": b"other"})
    assert contents(hub.fetch_bundle(f"{server.url}/other.zip")) == {"core.yaml": b"other"}


def test_what_a_killed_run_unpacked_is_cleared_away(server, own_base_dir, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "replace_folder", killed)
        patch.setattr(hub.shutil, "rmtree", lambda *args, **kwargs: None)  # a kill leaves everything
        with pytest.raises(KeyboardInterrupt):
            hub.fetch_bundle(server.bundle)
    assert list(own_base_dir.glob(".tmp-*")) and not (own_base_dir / "eval_bundle").exists()
    hub.fetch_bundle(server.bundle)
    assert len(server.gets) == 1 and not list(own_base_dir.glob(".tmp-*"))


def test_a_folder_that_is_not_ours_is_never_replaced(server, own_base_dir):
    (own_base_dir / "eval_bundle").mkdir(parents=True)
    (own_base_dir / "eval_bundle" / "core.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="eval_bundle must have been downloaded or not exist, it has no manifest.json: "
                                        "move it away$"):
        hub.fetch_bundle(server.bundle)
    assert contents(own_base_dir / "eval_bundle") == {"core.yaml": b"mine"}


@pytest.mark.parametrize("name", ["../evil", "eval_bundle/../../evil", "/evil", "..\\evil", "eval_bundle/x/../../../e"])
def test_a_bundle_that_leaves_its_folder_is_refused(server, own_base_dir, name):
    server.files["/bundle.zip"] = zipped(FILES | {name: b"evil"})
    with pytest.raises(UserError, match="must name files below its own folder, it names "):
        hub.fetch_bundle(server.bundle)
    assert not (own_base_dir / "eval_bundle").exists() and not list(own_base_dir.parent.rglob("*evil*"))


@pytest.mark.parametrize("files, sentence", [
    ({"readme.txt": b"x"}, "must hold a core.yaml to be an evaluation bundle, it has none$"),
    (FILES | {"eval_bundle/big": bytes(200_000)}, "must unpack to at most 98 KiB and the free space, it has 2"),
])
def test_what_is_no_bundle_is_refused(server, own_base_dir, monkeypatch, files, sentence):
    monkeypatch.setattr(hub, "MAX_BUNDLE_BYTES", 100_000)
    server.files["/bundle.zip"] = zipped(files)
    with pytest.raises(UserError, match=sentence):
        hub.fetch_bundle(server.bundle)
    assert not (own_base_dir / "eval_bundle").exists() and not list(own_base_dir.glob(".tmp-*"))


def test_files_beside_the_bundle_in_the_archive_are_left_out(server):
    server.files["/bundle.zip"] = zipped(FILES | {"__MACOSX/._core": b"x", "other/core.yaml.bak": b"x"})
    assert contents(hub.fetch_bundle(server.bundle)) == UNPACKED


def test_no_token_leaves_for_the_bundle(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tokens = []
    monkeypatch.setattr(download, "build_hf_headers", lambda token: tokens.append(token) or {})
    hub.fetch_bundle(server.bundle)
    assert tokens == [False]
