"""A whole model on Triton kernels, in the interpreter: the same losses as eager, every kernel launched, one graph."""

import dataclasses
import sys

import pytest
import torch

from kernels import KernelConfig, interpreter, resolve
from kernels.registry import BACKENDS
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW

CPU = torch.device("cpu")
SMALL = GPTConfig(sequence_len=64, vocab_size=512, n_layer=1, n_head=2, n_kv_head=1, n_embd=128)
# a step takes 1 s, not 15
TINY = GPTConfig(sequence_len=16, vocab_size=128, n_layer=1, n_head=1, n_kv_head=1, n_embd=64)
TRAINING_OPS = ("rms_norm", "qk_norm_rope", "attention", "relu2", "linear", "linear_relu2", "cross_entropy",
                "newton_schulz", "muon_update")


def train(config, text, n_steps, batch_size=2, compiled=False, seed=0):
    """Return the losses of n_steps on batches that depend on the seed alone, and the trained model."""
    kernels = resolve(KernelConfig.parse(text), CPU, torch.float32, config.shapes())
    model = GPT.build(config, kernels, torch.float32, CPU, seed=1)
    optimizer = MuonAdamW(model, kernels)
    loss_of = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else model
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(0, config.vocab_size, (16,), generator=generator)
    losses = []
    for _ in range(n_steps):
        start = torch.randint(0, 16, (batch_size, 1), generator=generator)
        ids = pattern[(start + torch.arange(config.sequence_len + 1)) % 16]  # something to learn
        loss = loss_of(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), model


def training_kernels():
    """Names of all kernels in the files of the training ops' Triton backends."""
    files = {BACKENDS[op]["triton"].fn.__module__ for op in TRAINING_OPS if "triton" in BACKENDS.get(op, {})}
    return {name for file in files for name, value in vars(sys.modules[file]).items()
            if name.endswith("_kernel") and type(value).__name__ == "InterpretedFunction"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_five_steps_on_triton_kernels_equal_eager_and_launch_every_one_of_them():
    expected, _ = train(SMALL, "eager", 5)
    with interpreter.launches() as names:
        got, _ = train(SMALL, "triton", 5)
        # linear_relu2=triton does without relu2, attention=triton without qk_norm_rope backward
        train(SMALL, "eager,relu2=triton,attention=sdpa,qk_norm_rope=triton", 1)
    assert expected[-1] < expected[0] - 0.1  # it learns, so a wrong gradient would show
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)  # fp32 sums in another order
    assert training_kernels() <= set(names)


@pytest.mark.parametrize("text", ["eager", "auto", "triton"])
def test_the_model_compiles_as_one_graph_and_never_again(text):
    torch._dynamo.reset()
    expected, _ = train(TINY, text, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got, _ = train(TINY, text, 3, compiled=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in TRAINING_OPS if "triton" in BACKENDS.get(op, {})])
def test_sixty_steps_with_one_op_in_triton_end_where_eager_ends(op):
    config = dataclasses.replace(TINY, n_layer=2)
    expected, _ = train(config, "eager", 60, batch_size=1)
    around = "eager,attention=sdpa" if op == "qk_norm_rope" else "eager"  # eager attention has a rotation of its own
    with interpreter.launches() as names:
        got, _ = train(config, f"{around},{op}=triton", 60, batch_size=1)
    assert len(names) >= 60
    assert expected[-10:].mean() < 0.5 * expected[0]
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)
