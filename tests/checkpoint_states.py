"""What the checkpoint tests share: a tiny state of every step, and children that fork in 20 ms."""

import multiprocessing
import shutil

import pytest
import torch

from nanochat.checkpoint import load_checkpoint, save_checkpoint
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
    child.join(300)
    assert child.exitcode == 0


def copy_over(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def error_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    return str(caught.value)
