"""Checkpoints: what is saved comes back bit for bit, the newest are kept, the newest whole one is found."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_states import assert_is_step, error_of, make_state, names, save
from safetensors import safe_open

from nanochat import checkpoint
from nanochat.checkpoint import find_checkpoint, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from nanochat.checkpoint_format import manifest_text, parse_step

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
    members = {"0": bank[0], "2": bank[2], "all": bank, "turned": bank[1].T, "every_other": bank[:, ::2],
               "line": bank.flatten()[::2]}
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


@pytest.mark.parametrize("name, step", [
    ("step_000012", 12), ("step_000012.old", 12), ("step_1234567", 1_234_567), ("step_12", None),
    ("step_0000012", None), (".tmp-step_000012-0f", None), ("step_000012.bak", None), ("xstep_000012", None)])
def test_only_our_own_names_are_checkpoints(tmp_path, name, step):
    assert parse_step(tmp_path / name) == step


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


def test_the_manifest_text_is_the_same_for_the_same_content():
    entries = {"state.json": {"bytes": 1, "sha256": "0" * 64}}
    assert manifest_text(1, 1, make_state(1), entries) == manifest_text(1, 1, make_state(1), dict(entries))
