"""A user's mistake is one sentence on stderr and exit code 2, and nothing on disk changes."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import KernelConfig, resolve
from nanochat.common import UserError, base_dir, pick_device, run_script
from nanochat.dataset import iter_texts, prepare
from nanochat.gpt import GPT, GPTConfig
from nanochat.load import fill_model, load_model, read_stage
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_cli, mid_train

ROOT = Path(__file__).parent.parent
WORDS = "the model reads a line of text and then another line of text about numbers and words ".split()
TINY = ["--depth", "1", "--sequence-len", "32", "--device-batch-size", "2", "--total-batch-size", "64",
        "--num-steps", "2", "--eval-tokens", "64", "--device", "cpu"]


def make_text(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    for i in range(40):
        words = [WORDS[(i * 7 + j * (3 + seed)) % len(WORDS)] for j in range(30)]
        (folder / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture
def trained(own_base_dir, tmp_path) -> list[str]:
    """A base directory with text, tokenizer and a base model of depth 1; returns the flags of its training."""
    folder = make_text(tmp_path / "text")
    dataset = prepare(str(folder))
    Tokenizer.train(iter_texts(dataset, "train"), 300).save(base_dir() / "tokenizer")
    flags = ["--data", str(folder), *TINY]
    base_train.main(base_train.parse_args(flags))
    return flags


def fails(program, argv: list[str], capsys) -> str:
    """Run a program as its command line does; return its one sentence after checking that nothing on disk changed."""
    before = snapshot()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: program.parse_args(argv), program.main)
    assert stop.value.code == 2
    assert snapshot() == before
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def snapshot() -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in base_dir().rglob("*") if p.is_file()}


@pytest.mark.parametrize("arguments, sentence", [
    (["d21"], "error: speedrun.sh preset must be tiny, d12, d20, d26 or d32, got d21"),
    (["tiny", "d12"], "error: speedrun.sh takes one preset, got tiny and d12"),
    (["--fast"], "error: speedrun.sh knows the flags --data, --kernels, --fp8, --gpus, --fresh, --dry-run and "
     "--rehearse, got --fast"),
    (["tiny", "--data"], "error: speedrun.sh --data needs a value"),
])
def test_speedrun_refuses_before_it_does_anything(arguments, sentence, tmp_path):
    result = subprocess.run(["bash", str(ROOT / "speedrun.sh"), *arguments], capture_output=True, text=True,
                            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (2, "", sentence)
    assert list(tmp_path.iterdir()) == []


def test_training_refuses_unknown_kernels_and_batches_that_do_not_divide(trained, capsys):
    assert fails(base_train, [*trained, "--kernels", "relu2=quick"], capsys) == (
        "--kernels relu2=quick: relu2 has no backend 'quick'; it has eager, triton, liger")
    assert fails(base_train, [*trained, "--total-batch-size", "100"], capsys) == (
        "--total-batch-size must be a positive multiple of device-batch-size 2 x sequence-len 32 x ranks 1 = 64, "
        "got 100")
    assert fails(mid_train, ["--rows-per-step", "7", "--device-batch-size", "4", "--device", "cpu"], capsys) == (
        "--rows-per-step must be a positive multiple of device-batch-size 4 x ranks 1 = 4, got 7")
    assert fails(base_train, [*trained, "--warmup", "0.5", "--warmdown", "0.6"], capsys) == (
        "--warmup and --warmdown must be at most 1 together, got 0.5 and 0.6")
    assert fails(mid_train, ["--sequence-len", "33", "--device", "cpu"], capsys) == (
        "--sequence-len must be at most the model's context of 32 tokens, got 33")
    assert fails(base_train, [*trained, "--device", "cuda:x"], capsys) == (
        "--device must be auto, cpu, cuda or cuda:N, got 'cuda:x'")


def test_a_numbered_gpu_becomes_the_current_one_and_must_be_there(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [str(pick_device(name)) for name in ("cuda:1", "cuda", "cpu")] == ["cuda:1", "cuda", "cpu"]
    assert current == [torch.device("cuda:1")]
    with pytest.raises(UserError) as error:
        pick_device("cuda:2")
    assert str(error.value) == "--device cuda:2 must be one of the GPUs that torch can see, cuda:0 to cuda:1"
    assert len(current) == 1


@pytest.mark.parametrize("program, flag, value, rule", [
    (base_train, "--num-steps", "0", "a whole number of at least 1, or -1"),
    (base_train, "--sequence-len", "0", "a whole number of at least 1"),
    (base_train, "--param-data-ratio", "nan", "a number above 0"),
    (base_train, "--matrix-lr", "inf", "a number of at least 0"),
    (base_train, "--lr-scale", "-1", "a number of at least 0"),
    (base_train, "--warmdown", "1.5", "a number from 0 to 1"),
    (base_train, "--save-every", "0", "a whole number of at least 1, or -1"),
    (base_train, "--seed", "4294967296", "a whole number from 0 to 2^32 - 1"),
    (mid_train, "--eval-batches", "two", "a whole number of at least 1"),
    (mid_train, "--seed", "-1", "a whole number from 0 to 2^32 - 1"),
])
def test_numbers_outside_their_range_are_refused_with_the_rule(program, flag, value, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        program.parse_args([f"{flag}={value}"])
    assert stop.value.code == 2
    assert f"argument {flag}: must be {rule}, got {value!r}" in capsys.readouterr().err


def test_training_again_never_overwrites_a_checkpoint(trained, capsys):
    folder = base_dir() / "checkpoints" / "base" / "d1"
    assert fails(base_train, trained, capsys) == (
        f"{folder} already holds checkpoint step_000002; use --resume auto to go on from it or move the folder away "
        "to start over")
    base_train.main(base_train.parse_args([*trained, "--resume", "auto"]))
    assert "base: already finished, nothing to do" in capsys.readouterr().out


def test_a_resumed_run_must_be_the_same_run(trained, capsys):
    path = base_dir() / "checkpoints" / "base" / "d1" / "step_000002"
    assert fails(base_train, [*trained, "--resume", "auto", "--num-steps", "3"], capsys) == (
        f"checkpoint {path} was made with n_steps = 2, this run has 3; resume with the same or move the folder away")


def test_a_checkpoint_of_another_tokenizer_is_refused(trained, tmp_path, capsys):
    other = prepare(str(make_text(tmp_path / "other", seed=2)))
    was = Tokenizer.load(base_dir() / "tokenizer").fingerprint
    Tokenizer.train(iter_texts(other, "train"), 290).save(base_dir() / "tokenizer")
    now = Tokenizer.load(base_dir() / "tokenizer").fingerprint
    path = base_dir() / "checkpoints" / "base" / "d1" / "step_000002"
    with pytest.raises(UserError) as error:
        load_model("base", device="cpu")
    assert str(error.value) == (f"checkpoint {path} was trained with tokenizer {was[:12]}, "
                                f"{base_dir() / 'tokenizer'} holds {now[:12]}")
    assert was[:12] in fails(mid_train, ["--device", "cpu"], capsys)


def test_a_checkpoint_of_another_shape_is_refused(trained):
    tensors, state, _ = read_stage("base")
    config = GPTConfig(**{**state["model_config"], "n_embd": 32})
    kernels = resolve(KernelConfig.parse("eager"), torch.device("cpu"), torch.float32)
    model = GPT.build(config, kernels, torch.float32, torch.device("cpu"))
    tensors = {"lm_head.weight": tensors["lm_head.weight"]}
    with pytest.raises(UserError, match=r"checkpoint base step 2: tensor .* must have shape \(.*\), got "):
        fill_model(model, tensors, "base step 2")


def test_a_corrupt_checkpoint_is_named_and_never_loaded(trained, capsys):
    path = base_dir() / "checkpoints" / "base" / "d1" / "step_000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    sentence = fails(mid_train, ["--device", "cpu"], capsys)
    assert sentence == (f"stage base has no whole checkpoint in {base_dir() / 'checkpoints' / 'base' / 'd1'}; "
                        "those there are damaged, train it again")
    with pytest.raises(UserError, match="model.safetensors"):
        load_model("base", device="cpu", step=2)


def test_a_missing_stage_says_so(trained, capsys):
    assert fails(chat_cli, ["--stage", "sft", "-p", "hello", "--device", "cpu"], capsys) == (
        f"stage sft has no checkpoint in {base_dir() / 'checkpoints' / 'sft'}; train it first")


def test_a_prompt_longer_than_the_context_is_refused(trained, capsys):
    sentence = fails(chat_cli, ["--stage", "base", "-p", "word " * 100, "--device", "cpu"], capsys)
    assert "the context of 32 tokens" in sentence and "\n" not in sentence
