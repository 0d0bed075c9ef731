"""--fp8 and --compile on the training programs themselves, shrunk."""

import json
import os

import pytest
import tiny_pipeline as tiny
import torch
from tiny_pipeline import N_STEPS, Crash, assert_same, copy_base_dir, crash_at, outcome, train

from kernels import KernelError
from nanochat.checkpoint import find_checkpoint, load_checkpoint
from nanochat.gpt import GPT
from nanochat.load import stage_folder
from nanochat.metrics import metrics_path
from nanochat.train import Trainer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with text, tokenizer and an uninterrupted base run in eager fp32."""
    folder = tmp_path_factory.mktemp("prepared")
    before, threads = os.environ["NANOCHAT_BASE_DIR"], torch.get_num_threads()
    tiny.prepare_base_dir(folder)
    train("base", folder)
    plain = losses("base")
    os.environ["NANOCHAT_BASE_DIR"] = before
    yield folder, plain
    torch.set_num_threads(threads)
    tiny.forget_task()


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """Make a private copy of the folder the base directory; return (folder, losses of the eager base run)."""
    def make(without: tuple[str, ...] = ("base",), name: str = "copy"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", "replaced by the copy, restored after the test")
        copy_base_dir(prepared[0], tmp_path / name, without=without)
        return prepared

    return make


def rows(stage: str) -> list[dict]:
    return [json.loads(line) for line in metrics_path(stage).read_text(encoding="utf-8").splitlines()]


def losses(stage: str) -> list[float]:
    return [row["loss"] for row in rows(stage) if "loss" in row]


def test_fp8_trains_close_to_eager_evaluates_without_and_resumes_bit_equal(workplace, monkeypatch):
    folder, plain = workplace()
    evaluated_in_fp8, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **kwargs: (
        evaluated_in_fp8.append(self.fp8_layers[0].fp8) if not torch.is_grad_enabled() else None,
        forward(self, *args, **kwargs))[1])
    train("base", folder, "--fp8")
    want = outcome("base")
    assert evaluated_in_fp8 and not any(evaluated_in_fp8)
    assert losses("base") == pytest.approx(plain, rel=0.02) and losses("base") != plain
    _, state = load_checkpoint(find_checkpoint(stage_folder("base")))
    assert state["kernels"]["linear"] == "fp8" and state["kernels"]["linear_relu2"] == "eager"
    workplace(name="again")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 3)
        train("base", folder, "--fp8", "--save-every", "1")
    train("base", folder, "--fp8", "--save-every", "1", "--resume", "auto")
    assert_same(outcome("base"), want)


def test_later_stages_take_fp8_too(workplace):
    folder, _ = workplace(without=())
    for stage in ("mid", "sft", "rl"):
        train(stage, folder, "--fp8")
        assert len(losses(stage)) == N_STEPS
        assert load_checkpoint(find_checkpoint(stage_folder(stage)))[1]["kernels"]["linear"] == "fp8"


def test_fp8_beside_another_linear_ends_the_program(workplace):
    folder, _ = workplace()
    with pytest.raises(KernelError, match="--fp8 is linear=fp8, but --kernels auto,linear=eager names linear=eager"):
        train("base", folder, "--fp8", "--kernels", "auto,linear=eager")
    assert not (tiny.Path(os.environ["NANOCHAT_BASE_DIR"]) / "checkpoints" / "base").exists()


@pytest.mark.parametrize("flags", [[], ["--fp8"]], ids=["eager", "fp8"])
def test_compile_compiles_whole_graphs_in_the_first_step_and_never_again(workplace, monkeypatch, flags):
    """aot_eager in place of inductor: the same capture and autograd without a C++ compiler's minute."""
    folder, plain = workplace()
    torch._dynamo.reset()
    compiled, graphs = [], []

    def compile(what, **kwargs):
        compiled.append((type(what), kwargs))
        return real(what, **kwargs | {"backend": "aot_eager", "fullgraph": True})

    real = torch.compile
    def record(self, *args):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        real_record(self, *args)

    real_record = Trainer._record
    monkeypatch.setattr(Trainer, "_record", record)
    monkeypatch.setattr(torch, "compile", compile)
    train("base", folder, "--compile", *flags)
    assert len(graphs) == N_STEPS and 0 < graphs[0] == graphs[-1]
    assert (GPT, {"dynamic": False}) in compiled
    assert losses("base") == pytest.approx(plain, rel=0.02 if flags else 1e-5)


def test_compile_is_off_on_the_cpu_unless_asked_for(workplace, monkeypatch):
    folder, plain = workplace()
    monkeypatch.setattr(torch, "compile", None)
    train("base", folder)
    assert losses("base") == plain


@pytest.mark.slow
def test_inductor_trains_as_eager_does(workplace):
    folder, plain = workplace()
    torch._dynamo.reset()
    train("base", folder, "--compile")
    assert losses("base") == pytest.approx(plain, rel=1e-4)
