"""A flag out of its range ends any program with one sentence and exit code 2 before anything on disk changes."""

import argparse
import importlib
import os

import pytest
import tiny_pipeline as tiny

from nanochat.common import base_dir, run_script
from nanochat.evals.mini_bundle import write_mini_bundle

BASE = ["--device", "cpu", "--depth", "2", "--sequence-len", "64", "--device-batch-size", "2", "--total-batch-size",
        "256"]
CHAT = ["--device", "cpu", "-p", "hello"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base directory in which base, mid and SFT are trained; no test here may change it."""
    before = os.environ["NANOCHAT_BASE_DIR"]
    folder = tmp_path_factory.mktemp("run")
    tiny.prepare_base_dir(folder)
    for stage in ("base", "mid", "sft"):
        tiny.train(stage, folder, "--num-steps", "1")
    tiny.forget_task()
    write_mini_bundle()  # base_eval writes it before it loads the model
    os.environ["NANOCHAT_BASE_DIR"] = before
    return folder


def ends_with(run, monkeypatch, capsys, program, argv):
    """Run a program as its command line does in `run`; return the last line of stderr, checked for what all share."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(run / "artifacts"))
    argv = [word.replace("TEXTS", str(run / "texts")) for word in argv]
    module = importlib.import_module(f"scripts.{program}")
    before = snapshot()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: module.parse_args(argv), module.main)
    assert stop.value.code == 2
    assert snapshot() == before
    return capsys.readouterr().err.splitlines()[-1].replace(str(base_dir()), "BASE")


def snapshot():
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in base_dir().rglob("*")}


@pytest.mark.parametrize("program, argv, sentence", [
    ("base_train", [*BASE, "--data", "TEXTS", "--depth", "0"], "model of depth 0: n_layer must be at least 1, got 0"),
    ("base_train", [*BASE, "--data", "TEXTS", "--window-pattern", "X"],
     "model of depth 2: window_pattern must be letters L and S, got 'X'"),
    ("base_train", [*BASE, "--data", "/nowhere"],
     "data /nowhere is not prepared, run python -m scripts.dataset --data /nowhere"),
    ("base_train", [*BASE, "--data", "TEXTS", "--num-steps", "1", "--wandb", "x"],
     "--wandb x needs the package wandb, which is not installed (.venv/bin/pip install wandb)"),
    ("mid_train", ["--device", "cpu", "--source-step", "7"],
     "BASE/checkpoints/base/d1 has no checkpoint of step 7, it has 1"),
    ("mid_train", ["--device", "cpu", "--tasks", "arithmetic"],
     "task arithmetic is generated and needs a number of problems, as in arithmetic=1000"),
    ("chat_sft", ["--device", "cpu", "--depth", "9"],
     "stage mid has no whole checkpoint in BASE/checkpoints/mid/d9; train it first"),
    ("chat_sft", ["--device", "cpu", "--tasks", "arithmetic=0"], "task arithmetic needs at least one problem, not 0"),
    ("chat_rl", ["--device", "cpu", "--num-samples", "1"],
     "--num-samples must be at least 2 (the only answer to a problem has advantage 0), got 1"),
    ("chat_rl", ["--device", "cpu", "--temperature", "nan"],
     "--temperature must be a number above 0 (equal answers have advantage 0), got nan"),
    ("chat_rl", ["--device", "cpu", "--task", "choice"],
     "--task must be one whose answers are sampled and rewarded, choice is categorical"),
    ("base_eval", ["--device", "cpu", "--eval", "loss"],
     "--eval takes bpb, bundle, samples with commas between, got 'loss'"),
    ("base_eval", ["--device", "cpu", "--max-per-task", "0"], "--max-per-task must be at least 1, got 0"),
    ("base_eval", ["--device", "cpu", "--bundle", "/nowhere"],
     "/nowhere/core.yaml is missing or cannot be read: an evaluation bundle needs it"),
    ("chat_eval", ["sft", "--device", "cpu", "--max-problems", "0"], "--max-problems must be at least 1, got 0"),
    ("chat_eval", ["rl", "--device", "cpu"], "stage rl has no checkpoint in BASE/checkpoints/rl; train it first"),
    ("chat_eval", ["sft", "--device", "cpu", "--seed", "-1"], "seed must be from 0 to 2^63 - 1, got -1"),
    ("chat_cli", [*CHAT, "--temperature", "-1"], "temperature must be a finite number of at least 0, got -1.0"),
    ("chat_cli", [*CHAT, "--max-tokens", "-2"], "max_tokens must be at least 0, got -2"),
    ("chat_cli", [*CHAT, "--step", "5"], "BASE/checkpoints/sft/d1 has no checkpoint of step 5, it has 1"),
    ("chat_cli", [*CHAT, "--stage", "auto", "--depth", "7"],
     "--stage auto needs a checkpoint of rl, sft, mid in BASE/checkpoints, found none; run `bash speedrun.sh` first"),
    ("chat_cli", [*CHAT, "--device", "mps"], "--device must be auto, cpu, cuda or cuda:N, got 'mps'"),
    ("dataset", ["--data", "/nowhere"], "data folder /nowhere does not exist"),
    ("dataset", ["--data", "TEXTS", "--max-chars", "0"], "max-chars must be at least 1, got 0"),
    ("tok_train", ["--data", "TEXTS", "--vocab-size", "264"], "vocab_size must be 265 to 1048576, got 264"),
    ("tok_train", ["--data", "TEXTS", "--doc-cap", "0"], "--doc-cap must be at least 1, got 0"),
    ("tok_eval", ["--data", "TEXTS", "--max-chars", "nan"], "--max-chars must be at least 1, got nan"),
    ("report", ["time", "--stage", "../x", "--seconds", "1"], "a stage is named with a-z, 0-9, _ and -, got '../x'"),
])
def test_a_value_out_of_range_is_named_with_its_rule(run, monkeypatch, capsys, program, argv, sentence):
    assert ends_with(run, monkeypatch, capsys, program, argv) == f"error: {sentence}"


PROGRAMS = sorted(path.stem for path in (tiny.Path(__file__).parent.parent / "scripts").glob("[a-z]*.py"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_flag_is_named(run, monkeypatch, capsys, program):
    commands = {"report": ["generate"], "chat_eval": ["sft"], "export_hf": ["sft", "folder"],
                "import_hf": ["folder"]}
    last = ends_with(run, monkeypatch, capsys, program, [*commands.get(program, []), "--bogus"])
    assert last.endswith("error: unrecognized arguments: --bogus")


WITHOUT_KERNELS = ("dataset", "export_hf", "import_hf", "plan", "report", "screenshots", "tok_eval", "tok_export",
                   "tok_train")


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in WITHOUT_KERNELS])
def test_an_unknown_kernel_is_named_by_every_program_with_a_model(run, monkeypatch, capsys, program):
    needed = {"base_train": [*BASE, "--data", "TEXTS"], "chat_eval": ["sft"], "chat_cli": ["-p", "hello"],
              "chat_web": ["--port", "0"]}
    argv = [*needed.get(program, []), "--device", "cpu", "--kernels", "flashattention=triton"]
    last = ends_with(run, monkeypatch, capsys, program, argv)
    assert last.removeprefix("error: the model could not be loaded: ").removeprefix("error: ").startswith(
        "--kernels flashattention=triton: unknown op 'flashattention' (did you mean attention?)")


class Parsing(Exception):
    """Ends a program when it is about to parse; carries its parser."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_has_its_help(monkeypatch, program):
    def parse(self, argv=None):
        raise Parsing(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsing) as stop:
        importlib.import_module(f"scripts.{program}").parse_args([])
    parser = stop.value.args[0]
    flags = [action for one in with_subcommands(parser) for action in one._actions
             if not isinstance(action, argparse._SubParsersAction)]
    assert parser.description and not [action.dest for action in flags if not action.help]


def with_subcommands(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()
