"""Saving under full disks, kills at every moment and failing ranks: nothing that was there is lost."""

import errno
import json
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
from checkpoint_states import FORKSERVER, assert_is_step, copy_over, error_of, make_state, names, run_child, save

from nanochat import checkpoint
from nanochat.checkpoint import SaveError, find_checkpoint, load_checkpoint, save_checkpoint

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
    assert len(folders) > 20  # filesystem calls at which it was killed
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
        child.join(300)
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
