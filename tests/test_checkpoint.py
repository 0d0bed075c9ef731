"""Checkpoints: what is saved comes back bit for bit, what is damaged is named, a kill at any point loses nothing."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from nanochat import checkpoint
from nanochat.checkpoint import (
    SaveError,
    find_checkpoint,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from nanochat.checkpoint_format import canonical, manifest_text
from nanochat.common import UserError

# Children fork from a server that has imported torch once and never ran a thread: 20 ms each instead of 2 s.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["nanochat.checkpoint"])


def make_state(step, **extra):
    return {"stage": "base", "step": step, "model_config": {"n_layer": 4}, "tokenizer_fingerprint": "ab" * 32,
            "kernels": {"linear": "eager"}, "args": {"lr": 0.02}, **extra}


def make_tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {"model": {"w": torch.randn(16, 8, generator=generator), "b": torch.full((3,), float(step))},
            "optim": {"exp_avg": torch.randn(16, 8, generator=generator), "step": torch.tensor(step)}}


def save(folder, step, **options):
    return save_checkpoint(folder, step, make_tensors(step), make_state(step), **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def assert_is_step(path, step):
    tensors, state = load_checkpoint(path, groups=("model", "optim"))
    assert state == make_state(step)
    for group, members in make_tensors(step).items():
        assert tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            assert torch.equal(tensors[group][name], tensor)


def run_child(function, *args):
    child = FORKSERVER.Process(target=function, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def copy_over(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def error_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)


# --- round trip -----------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "base" / "d4", 12)
    assert path == tmp_path / "base" / "d4" / "step_000012"
    assert names(path) == ["MANIFEST.json", "model.safetensors", "optim_rank0of1.safetensors", "state.json"]
    assert find_checkpoint(tmp_path / "base" / "d4") == path
    assert_is_step(path, 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                   torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_dtype_and_shape_round_trips_beside_the_others(tmp_path, dtype):
    values = torch.arange(24).remainder(2) if dtype == torch.bool else torch.arange(24)
    members = {"flat": values.to(dtype), "scalar": torch.tensor(1).to(dtype), "empty": torch.empty(0, 3, dtype=dtype),
               "odd": torch.ones(3, dtype=torch.uint8), "wide": torch.arange(2)}
    path = save_checkpoint(tmp_path, 1, {"model": members}, make_state(1))
    loaded = load_checkpoint(path)[0]["model"]
    for name, tensor in members.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_safetensors_itself_reads_the_file_and_finds_aligned_tensors(tmp_path):
    members = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(3)}
    path = save_checkpoint(tmp_path, 1, {"model": members}, make_state(1)) / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["a", "b", "c"]
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in members.items())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % members[name].element_size() == 0


def test_views_of_one_bank_and_strided_tensors_are_saved(tmp_path):
    bank = torch.nn.Parameter(torch.randn(3, 4, 5))
    members = {"0": bank[0], "2": bank[2], "all": bank, "turned": bank[1].T, "every_other": bank[:, ::2]}
    path = save_checkpoint(tmp_path, 1, {"model": members}, make_state(1))
    loaded = load_checkpoint(path)[0]["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in members.items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_floats_of_the_state_come_back_bit_for_bit(tmp_path):
    generator = random.Random(3)
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.5] + [generator.gauss(0, 1) for _ in range(200)]
    state = make_state(1, loop={"floats": floats, "big": 2**80, "none": None, "text": "\u00e9\u4e16\udc80"})
    back = load_checkpoint(save_checkpoint(tmp_path, 1, {}, state), groups=())[1]
    assert back == state
    assert [value.hex() for value in back["loop"]["floats"]] == [value.hex() for value in floats]


@pytest.mark.parametrize("value, message", [
    (float("nan"), "state.loop[1] is nan; a checkpoint's state holds finite numbers"),
    (float("inf"), "state.loop[1] is inf; a checkpoint's state holds finite numbers"),
    (Path("x"), "state.loop[1] is a PosixPath; a checkpoint's state holds JSON values"),
    ({3: 1}, "state.loop[1] has the key 3; JSON keys are strings"),
])
def test_a_state_that_json_would_change_is_refused(tmp_path, value, message):
    with pytest.raises(ValueError) as caught:
        save_checkpoint(tmp_path, 1, {}, make_state(1, loop=[1, value]))
    assert str(caught.value) == message
    assert names(tmp_path) == []


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("kernels"), "missing: kernels"),
    (lambda state: state.update(step=2), "the state is of step 2, the checkpoint of step 1"),
])
def test_an_incomplete_state_is_refused(tmp_path, change, message):
    state = make_state(1)
    change(state)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, 1, {}, state)


def test_a_tensor_the_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="model.safetensors: z must be a dense real tensor, it is torch.complex64"):
        save_checkpoint(tmp_path, 2, {"model": {"z": torch.zeros(2, dtype=torch.complex64)}}, make_state(2))
    assert names(tmp_path) == ["step_000001"]


def test_random_numbers_continue_where_they_were_saved(tmp_path):
    torch.rand(7)
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()}, make_state(1))
    assert (path / "rng_rank0of1.safetensors").exists()
    expected = torch.rand(5)
    torch.manual_seed(99)
    set_rng_state(load_checkpoint(path, groups=("rng",))[0]["rng"])
    assert torch.equal(torch.rand(5), expected)


def test_the_manifest_tells_where_the_checkpoint_came_from(tmp_path):
    manifest = json.loads((save(tmp_path, 7) / "MANIFEST.json").read_text(encoding="utf-8"))
    assert manifest["schema"] == 1 and manifest["step"] == 7 and manifest["world_size"] == 1
    assert manifest["torch"] == torch.__version__
    assert manifest["commit"] is None or len(manifest["commit"]) == 40
    assert manifest["files"]["state.json"]["bytes"] == (tmp_path / "step_000007" / "state.json").stat().st_size
    assert sorted(manifest["files"]) == ["model.safetensors", "optim_rank0of1.safetensors", "state.json"]


# --- retention ------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step_000003", "step_000004", "step_000005"]
    save(tmp_path, 1_000_000)
    assert names(tmp_path) == ["step_000005", "step_1000000"]
    assert_is_step(find_checkpoint(tmp_path), 1_000_000)


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 2, .* got 1"):
        save(tmp_path, 1, keep=1)


def test_what_was_just_saved_is_kept_even_below_older_higher_steps(tmp_path):
    save(tmp_path, 8)
    save(tmp_path, 9)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000003", "step_000009"]


def test_a_damaged_checkpoint_is_neither_counted_nor_deleted(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_000002" / "state.json").unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]


def test_leftovers_of_killed_saves_are_removed_and_other_names_left_alone(tmp_path):
    for name in (".tmp-step_000001-00", ".trash-step_000000-00", "notes", "step_12", "step_0000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x", encoding="utf-8")
    assert find_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    assert names(tmp_path) == ["notes", "step_0000001", "step_000001", "step_12"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    tensors = {"model": {"w": torch.zeros(2)}}
    path = save_checkpoint(tmp_path, 1, tensors, make_state(1))
    assert torch.equal(load_checkpoint(path)[0]["model"]["w"], torch.zeros(2))
    assert names(tmp_path) == ["step_000001"]


@pytest.mark.parametrize("damage_plain", [False, True])
def test_the_old_copy_of_a_step_is_read_and_cleared_away(tmp_path, damage_plain):
    """A killed re-save can leave step_N.old alone, or beside a step_N that was damaged later."""
    save(tmp_path, 1)
    (tmp_path / "step_000001").rename(tmp_path / "step_000001.old")
    if damage_plain:
        shutil.copytree(tmp_path / "step_000001.old", tmp_path / "step_000001")
        (tmp_path / "step_000001" / "state.json").unlink()
    assert_is_step(find_checkpoint(tmp_path), 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]
    assert_is_step(tmp_path / "step_000001", 1)


def test_two_writers_in_one_folder_are_refused(tmp_path):
    save(tmp_path, 1)
    lock = checkpoint._lock(tmp_path)
    try:
        assert error_of(save, tmp_path, 2) == f"{tmp_path} takes one writer at a time, another run is saving there now"
    finally:
        os.close(lock)
    save(tmp_path, 2)


# --- finding --------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "absent") is None


def test_a_damaged_newer_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with open(tmp_path / "step_000002" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert_is_step(find_checkpoint(tmp_path), 1)
    out = capsys.readouterr().out
    assert out.startswith(f"passing over a damaged checkpoint: checkpoint {tmp_path}/step_000002 is damaged: "
                          "model.safetensors must have ")
    assert "it has 100\n" in out


def test_an_explicit_step_must_be_there_and_whole(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, 1) == tmp_path / "step_000001"
    assert error_of(find_checkpoint, tmp_path, 3) == f"{tmp_path} has no checkpoint of step 3, it has 1, 2"
    (tmp_path / "step_000002" / "state.json").unlink()
    assert error_of(find_checkpoint, tmp_path, 2) == (
        f"checkpoint {tmp_path}/step_000002 is damaged: state.json is missing")


def test_another_world_size_is_refused_for_optimizer_state_only(tmp_path):
    path = save(tmp_path, 1)
    assert error_of(load_checkpoint, path, groups=("model", "optim"), world_size=4) == (
        f"checkpoint {path} was saved with world size 1, its optim state cannot be loaded with world size 4")
    assert "model" in load_checkpoint(path, world_size=4)[0]


def test_an_absent_group_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(1)}}, make_state(1))
    assert error_of(load_checkpoint, path, groups=("optim",)) == (
        f"checkpoint {path} has no optim_rank0of1.safetensors, it has model.safetensors, state.json")


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    assert error_of(load_checkpoint, tmp_path / "x") == f"a checkpoint is a folder and no link, {tmp_path}/x is not one"
    (tmp_path / "empty").mkdir()
    assert error_of(load_checkpoint, tmp_path / "empty") == (
        f"checkpoint {tmp_path}/empty is damaged: MANIFEST.json is missing")


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


@pytest.mark.parametrize("harm, times", [(flip, 120), (truncate, 24), (blank, 24), (append, 1)])
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


# --- disks that refuse ----------------------------------------------------------------------------


def test_too_little_space_is_seen_before_a_byte_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint, "write_tensors", None)
    need = 16 * 8 * 4 * 2 + 3 * 4 + 8
    assert error_of(save, tmp_path, 2) == (
        f"the checkpoint of step 2 was not saved: {tmp_path} needs {need:,} bytes and has 1000 B free "
        "(No space left on device); the older checkpoints are intact")
    assert names(tmp_path) == ["step_000001"]


def save_with_small_files(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    tensors = {"model": {"w": torch.zeros(1000)}}
    message = error_of(save_checkpoint, folder, 2, tensors, make_state(2))
    assert "needs 4,000 bytes" in message and os.strerror(errno.EFBIG) in message


def test_a_disk_that_fills_while_writing_costs_only_the_new_checkpoint(tmp_path):
    save(tmp_path, 1)
    run_child(save_with_small_files, tmp_path)
    assert names(tmp_path) == ["step_000001"]
    assert_is_step(find_checkpoint(tmp_path), 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert f"{tmp_path}/file/d4 needs " in error_of(save, tmp_path / "file" / "d4", 1)


def test_an_error_at_the_last_moment_keeps_the_old_checkpoint_of_the_same_step(tmp_path, monkeypatch):
    save(tmp_path, 1)
    rename = os.rename

    def refuse(source, target):
        if Path(target).name == "step_000001":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(SaveError, match="Input/output error"):
        save(tmp_path, 1)
    assert_is_step(find_checkpoint(tmp_path), 1)


# --- kills and power loss -------------------------------------------------------------------------


def save_with_a_kill_at_every_call(base, work, step):
    """For k = 1, 2, ...: copy `base` and save into the copy in a child that dies at its k-th filesystem call."""
    for k in range(1, 1000):
        folder = work / f"{k:03d}"
        copy_over(base, folder)
        child = os.fork()
        if child == 0:
            calls = 0

            def die_at_k(event, args, folder=str(folder), k=k):
                nonlocal calls
                if event in WRITING_CALLS or (event == "open" and str(args[0]).startswith(folder)):
                    calls += 1
                    if calls == k:
                        os._exit(9)

            fsync = os.fsync
            os.fsync = lambda descriptor: (die_at_k("fsync", ()), fsync(descriptor))
            sys.addaudithook(die_at_k)
            save(folder, step)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
    raise AssertionError("the save never ended")


WRITING_CALLS = {"fsync", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock"}


@pytest.mark.parametrize("step", [2, 3], ids=["the_same_step_again", "a_new_step"])
def test_a_kill_at_any_filesystem_call_leaves_a_whole_checkpoint(tmp_path, step):
    base, work = tmp_path / "base", tmp_path / "work"
    work.mkdir()
    save(base, 1)
    save(base, 2)
    run_child(save_with_a_kill_at_every_call, base, work, step)
    folders = sorted(work.iterdir())
    assert len(folders) > 25  # the points at which it was killed
    for folder in folders:
        found = find_checkpoint(folder)
        newest = int(found.name[5:11])
        assert newest in {2, step}
        assert_is_step(found, newest)
        save(folder, 4)
        assert names(folder) == [f"step_{newest:06d}", "step_000004"]
    assert names(folders[-1])[-1] == "step_000004"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """SIGKILL cannot show a missing fsync, the page cache survives it; the order of the calls can."""
    calls = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source, target):
        calls.append(("rename", str(source), str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    path = save(tmp_path, 1)
    commit = next(i for i, call in enumerate(calls) if call[0] == "rename" and call[2] == str(path))
    temp = calls[commit][1]
    order = [call[1].removeprefix(temp) for call in calls[:commit]]
    files = ["/model.safetensors", "/optim_rank0of1.safetensors", "/state.json"]
    assert sorted(order[: len(files)]) == files
    assert order[len(files) :] == ["/MANIFEST.json", ""]
    assert calls[commit + 1] == ("fsync", str(tmp_path))


def save_in_a_loop(folder, first, log):
    committed = os.open(log, os.O_WRONLY | os.O_APPEND)
    for step in range(first, first + 100_000):
        save(folder, step)
        os.write(committed, b"%d\n" % step)


def kill_at_random_times(folder, kills, seed):
    generator = random.Random(seed)
    last = 0
    for _ in range(kills):
        log = folder.parent / "committed"
        log.write_bytes(b"")
        child = FORKSERVER.Process(target=save_in_a_loop, args=(folder, last + 1, str(log)))
        child.start()
        while not log.read_bytes().endswith(b"\n") and child.is_alive():
            time.sleep(0.001)
        time.sleep(generator.random() * 0.05)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        committed = max([int(line) for line in log.read_bytes().split(b"\n")[:-1]] or [0])
        found = find_checkpoint(folder)
        step = int(found.name[5:11])
        assert step >= committed > last
        assert_is_step(found, step)
        last = step


def test_random_kills_never_lose_a_committed_checkpoint(tmp_path):
    kill_at_random_times(tmp_path / "run", kills=10, seed=1)


@pytest.mark.slow
def test_a_hundred_random_kills_never_lose_a_committed_checkpoint(tmp_path):
    kill_at_random_times(tmp_path / "run", kills=100, seed=2)


# --- several ranks --------------------------------------------------------------------------------


def on_rank(rank, world_size, store, function, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def run_ranks(tmp_path, function, *args, world_size=2):
    store = tmp_path / f"store-{time.monotonic_ns()}"
    children = [FORKSERVER.Process(target=on_rank, args=(rank, world_size, store, function, *args))
                for rank in range(world_size)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * world_size


def rank_tensors(rank, step):
    return {"model": {"w": torch.full((4,), float(step))}, "optim": {"m": torch.full((4,), float(10 * step + rank))},
            "rng": {"cpu": torch.full((4,), rank, dtype=torch.uint8)}}


def save_and_load_on_two_ranks(rank, world_size, folder):
    ranks = {"rank": rank, "world_size": world_size}
    for step in (1, 2, 3):
        path = save_checkpoint(folder, step, rank_tensors(rank, step), make_state(step), **ranks)
        assert path.exists()  # on every rank, as soon as the call returns
    tensors, state = load_checkpoint(find_checkpoint(folder), groups=("model", "optim", "rng"), **ranks)
    expected = rank_tensors(rank, 3)
    assert state["step"] == 3
    for group, members in expected.items():
        assert all(torch.equal(tensors[group][name], tensor) for name, tensor in members.items())
    with pytest.raises(ValueError, match=f"rank 0 of 1 was passed, the process group has rank {rank} of 2 here"):
        save(folder, 4)


def test_two_ranks_write_one_checkpoint(tmp_path):
    run_ranks(tmp_path, save_and_load_on_two_ranks, tmp_path / "run")
    path = find_checkpoint(tmp_path / "run")
    assert names(tmp_path / "run") == ["step_000002", "step_000003"]
    assert names(path) == ["MANIFEST.json", "model.safetensors", "optim_rank0of2.safetensors",
                           "optim_rank1of2.safetensors", "rng_rank0of2.safetensors", "rng_rank1of2.safetensors",
                           "state.json"]
    assert json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))["world_size"] == 2
    assert "saved with world size 2" in error_of(load_checkpoint, path, groups=("optim",))
    (path / "optim_rank0of2.safetensors").rename(path / "swap")
    (path / "optim_rank1of2.safetensors").rename(path / "optim_rank0of2.safetensors")
    (path / "swap").rename(path / "optim_rank1of2.safetensors")
    assert "optim_rank0of2.safetensors does not match its sha256" in error_of(find_checkpoint, tmp_path / "run", 3)


def fail_on_one_rank(rank, world_size, folder, failing):
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # the process group's file store needs some
    tensors = {"optim": {"m": torch.zeros(1 << 16)}}
    message = error_of(save_checkpoint, folder, 2, tensors, make_state(2), rank=rank, world_size=world_size)
    assert (os.strerror(errno.EFBIG) if rank == failing else "another rank failed") in message


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_nothing(tmp_path, failing):
    save(tmp_path / "run", 1)
    run_ranks(tmp_path, fail_on_one_rank, tmp_path / "run", failing)
    assert names(tmp_path / "run") == ["step_000001"]


def test_ranks_without_a_process_group_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rank 1 of 2 was passed, the process group has rank 0 of 1 here"):
        save(tmp_path, 1, rank=1, world_size=2)


def test_the_manifest_text_is_the_same_for_the_same_content():
    entries = {"state.json": {"bytes": 1, "sha256": "0" * 64}}
    assert manifest_text(1, 1, make_state(1), entries) == manifest_text(1, 1, make_state(1), dict(entries))
