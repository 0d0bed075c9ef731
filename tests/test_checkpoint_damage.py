"""Checkpoints that were damaged or forged: each is refused with a sentence that names the file."""

import hashlib
import json
import random
import shutil

import pytest
from checkpoint_states import error_of, make_state, make_tensors, save

from nanochat.checkpoint import find_checkpoint, load_checkpoint, rng_state, save_checkpoint
from nanochat.checkpoint_format import canonical

# --- corruption -----------------------------------------------------------------------------------


def flip(raw, generator):
    at = generator.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << generator.randrange(8)]) + raw[at + 1 :]


def truncate(raw, generator):
    return raw[: generator.randrange(len(raw))]


def blank(raw, generator):
    at = generator.randrange(len(raw) - 64)
    return raw[:at] + bytes(64) + raw[at + 64 :]


def append(raw, generator):
    return raw + b"\n"


@pytest.mark.parametrize("harm, times", [(flip, 60), (truncate, 16), (blank, 16), (append, 1)])
def test_every_damaged_file_is_detected_and_named(tmp_path, harm, times):
    path = save_checkpoint(tmp_path, 1, make_tensors(1) | {"rng": rng_state()}, make_state(1))
    generator = random.Random(7)
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        for _ in range(times):
            bad = harm(raw, generator)
            if bad != raw:  # blanking zeros changes nothing
                file.write_bytes(bad)
                assert f"step_000001 is damaged: {file.name} " in error_of(find_checkpoint, tmp_path, 1)
                if file.name != "rng_rank0of1.safetensors":
                    assert file.name in error_of(load_checkpoint, path, groups=("model", "optim"))
        file.write_bytes(raw)
    assert find_checkpoint(tmp_path, 1) == path


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_a_file_of_another_step_is_named(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    shutil.copy(tmp_path / "step_000001" / name, path / name)
    expected = "MANIFEST.json is of step 1" if name == "MANIFEST.json" else f"{name} does not match its sha256"
    assert expected in error_of(find_checkpoint, tmp_path, 2)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step_000009")
    assert "step_000009 is damaged: MANIFEST.json is of step 1" in error_of(find_checkpoint, tmp_path, 9)


def test_missing_and_extra_files_are_named(tmp_path):
    path = save(tmp_path, 1)
    (path / "extra.bin").write_bytes(b"x")
    assert error_of(load_checkpoint, path) == f"checkpoint {path} is damaged: extra.bin is not in MANIFEST.json"
    (path / "extra.bin").unlink()
    (path / "optim_rank0of1.safetensors").unlink()
    assert error_of(load_checkpoint, path) == (
        f"checkpoint {path} is damaged: optim_rank0of1.safetensors is missing")


# --- hostile checkpoints --------------------------------------------------------------------------


def rewrite_manifest(path, change):
    """Change the manifest and sign it as the writer would: what an attacker can do."""
    body = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(canonical(body).encode("utf-8")).hexdigest()
    (path / "MANIFEST.json").write_text(canonical(body | {"sha256": digest}), encoding="utf-8")


@pytest.mark.parametrize("change, message", [
    (lambda body: body["files"].update({"../x": body["files"]["state.json"]}),
     "MANIFEST.json lists '../x', which is no plain file name"),
    (lambda body: body["files"].update({"/etc/passwd": body["files"]["state.json"]}),
     "MANIFEST.json lists '/etc/passwd', which is no plain file name"),
    (lambda body: body["files"].update({"x/../../y": body["files"]["state.json"]}),
     "MANIFEST.json lists 'x/../../y', which is no plain file name"),
    (lambda body: body["files"].update({"": body["files"]["state.json"]}),
     "MANIFEST.json lists '', which is no plain file name"),
    (lambda body: body["files"].update({"x": {"bytes": "1", "sha256": "0" * 64}}),
     "MANIFEST.json must give bytes and sha256 of x"),
    (lambda body: body["files"].update({"x": []}), "MANIFEST.json must give bytes and sha256 of x"),
    (lambda body: body["files"].pop("state.json"), "MANIFEST.json must list state.json among its files"),
    (lambda body: body.update(files=[]), "MANIFEST.json must list state.json among its files"),
    (lambda body: body.update(step="1"), "MANIFEST.json must have an integer step and world_size"),
    (lambda body: body.update(schema=2), "MANIFEST.json has schema 2, this program reads schema 1"),
])
def test_a_hostile_manifest_is_refused(tmp_path, change, message):
    path = save(tmp_path, 1)
    rewrite_manifest(path, change)
    assert error_of(load_checkpoint, path) == f"checkpoint {path} is damaged: {message}"


@pytest.mark.parametrize("raw, message", [
    (b"[]", "must be an object with a schema"),
    (b"{", "is not valid JSON"),
    (b'{"schema": 1, "step": NaN}', "nan is not a finite number"),
    (b'{"schema": 1, "step": 1e999}', "1e999 is not a finite number"),
    (b"[" * 100_000, "is not valid JSON"),
    (b'{"schema":' + b"[" * 900 + b"]" * 900 + b"}", "is"),
    (b"\xff\xfe", "is not valid JSON"),
    (b" " * (64 << 20) + b"{}", "may have at most 67,108,864 bytes, it has 67,108,866"),
], ids=["list", "open", "nan", "inf", "deep", "deep_closed", "bytes", "huge"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, raw, message):
    path = save(tmp_path, 1)
    (path / "MANIFEST.json").write_bytes(raw)
    assert "MANIFEST.json " in (text := error_of(load_checkpoint, path)) and message.lower() in text.lower()


@pytest.mark.parametrize("raw", [
    (1 << 63).to_bytes(8, "little"),
    (101 << 20).to_bytes(8, "little") + b"{}",
    b"\x80\x04cposix\nsystem\n(S'false'\ntR.",
    (66).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}           ' + bytes(4),
], ids=["header_2_63", "header_101_mb", "pickle", "negative_shape"])
def test_a_signed_file_that_is_no_safetensors_is_refused(tmp_path, raw):
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(raw)
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite_manifest(path, lambda body: body["files"].update({"model.safetensors": entry}))
    assert error_of(load_checkpoint, path).startswith(
        f"checkpoint {path} is damaged: model.safetensors is no safetensors file (")


def test_links_are_refused(tmp_path):
    path = save(tmp_path / "a", 1)
    outside = tmp_path / "outside"
    shutil.move(path / "model.safetensors", outside)
    (path / "model.safetensors").symlink_to(outside)
    assert error_of(load_checkpoint, path) == (
        f"checkpoint {path} is damaged: model.safetensors must be a plain file, it is a link or a folder")
    link = tmp_path / "step_000001"
    link.symlink_to(save(tmp_path / "b", 1))
    assert error_of(load_checkpoint, link) == f"a checkpoint is a folder and no link, {link} is not one"
