"""scripts.plan: the model's numbers are the model's, projections follow from what is printed beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import KernelConfig, resolve
from nanochat import plan
from nanochat.gpt import GPT, GPTConfig
from scripts import plan as program

ROOT = Path(__file__).resolve().parent.parent
H100 = plan.Machine.of("h100", 8)


@pytest.mark.parametrize("depth", [1, *plan.TIERS])
def test_parameters_and_flops_are_those_of_the_model(depth):
    shape = plan.Shape(depth)
    config = GPTConfig.from_depth(depth, shape.vocab, shape.context)
    with torch.device("meta"):
        model = GPT(config, resolve(KernelConfig.parse("eager"), torch.device("cpu"), torch.float32, config.shapes()),
                    torch.float32)
    assert model.num_params() == shape.parameters and model.estimate_flops() == shape.flops_per_token
    assert sum(p.numel() for p in model.transformer["h"].parameters()) == shape.matrices


def test_d20_is_nanochats_published_run():
    shape = plan.Shape(20)
    assert (shape.parameters, shape.tokens // plan.BATCH_TOKENS) == (560_988_160, 21_400)
    assert f"{shape.tokens * shape.flops_per_token:.2e}" == "3.92e+19"


@pytest.mark.parametrize("depth, rows", [(12, 32), (20, 32), (26, 16), (32, 8)])
def test_the_micro_batch_that_fits_80_gib_is_the_one_nanochat_ran(depth, rows):
    assert plan.micro_batch(plan.Shape(depth), 8, 80) == rows


def test_the_micro_batch_is_the_largest_that_fits():
    shape, gib = plan.Shape(12), 24
    rows = plan.micro_batch(shape, 1, gib)
    fits, too_much = (sum(plan.memory_by_part(shape, 1, n).values()) / plan.GIB for n in (rows, 2 * rows))
    assert fits <= plan.USABLE * gib < too_much
    assert plan.micro_batch(shape, 1, None) == 1 == plan.micro_batch(shape, 1, 0.1)


def test_memory_of_weights_and_optimizer_is_counted_in_bytes():
    shape, one, eight = plan.Shape(20), *(plan.memory_by_part(plan.Shape(20), n, 1) for n in (1, 8))
    assert one["weights (fp32)"] == one["gradients (fp32)"] == 4 * shape.parameters
    assert one["optimizer (1/1)"] == 8 * eight["optimizer (1/8)"] == 4 * shape.matrices + 16 * shape.embedding


def test_hours_are_flops_over_the_rate_that_is_printed():
    pretraining = next(stage for stage in plan.stages(plan.Shape(20), H100) if stage.name == "pretraining")
    assert pretraining.hours == pytest.approx(3.918e19 / (8 * 989e12 * plan.MFU) / 3600, rel=1e-3)
    assert f"{plan.MFU:.0%} MFU, assumed" in pretraining.basis
    twice = next(stage for stage in plan.stages(plan.Shape(20), plan.Machine.of("h100", 16))
                 if stage.name == "pretraining")
    assert twice.hours == pretraining.hours / 2


def test_a_measured_mfu_takes_the_place_of_the_assumption(tmp_path, monkeypatch):
    rows = {"train/d20/best": {"mfu": 52.5}, "train/d20/eager": {"mfu": 31.0}, "train/d20/best+fp8": {"mfu": 70.0},
            "train/d12/best": {"mfu": 61.0}, "kernel/relu2/triton/d20/forward": {}}
    baselines = tmp_path / "bench" / "baselines"
    baselines.mkdir(parents=True)
    (baselines / "h100.json").write_text(json.dumps({"environment": {"gpu": "NVIDIA H100 80GB HBM3"}, "rows": rows}))
    (baselines / "compile.json").write_text(json.dumps({"figures": {}}))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "gpus.json").write_text((ROOT / "kernels" / "gpus.json").read_text())
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    assert plan.measured_mfu(H100, 20) == (0.525, "h100.json, train/d20/best")
    assert plan.measured_mfu(plan.Machine.of("a100", 8), 20) is None
    basis = [stage.basis for stage in plan.stages(plan.Shape(20), H100) if stage.name == "pretraining"]
    assert basis == ["11.22B tokens at 52% MFU, measured: h100.json, train/d20/best"]


def test_an_unknown_gpu_has_no_hours_and_no_price(capsys):
    program.main(program.parse_args(["--depth", "12", "--gpu", "abacus"]))
    said = capsys.readouterr().out
    assert "8x abacus (unknown memory, no known price)" in said
    assert [line.split()[-2:] for line in said.splitlines() if line.startswith("in all")] == [["n/a", "n/a"]]


def test_every_tier_and_several_nodes_are_printed_without_any_installed_package():
    def run(*flags):
        return subprocess.run([sys.executable, "-S", "-m", "scripts.plan", *flags], cwd=ROOT, capture_output=True,
                              text=True)

    tiers = run()
    assert tiers.returncode == 0, tiers.stderr
    assert [line.split()[0] for line in tiers.stdout.splitlines()[3:]] == ["d12", "d20", "d26", "d32"]
    nodes = run("--depth", "32", "--gpus", "64")
    assert "64 GPUs are 8 nodes of 8" in nodes.stdout and "docs/scaling.md" in nodes.stdout
    assert run("--depth", "20", "--batches", "--memory-gib", "80").stdout == "32 256 4 32 16\n"
    refused = run("--gpus", "300")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        2, "", "error: a step of 524,288 tokens is 256 rows of 2,048, so GPUs must be at most 256, got 300\n")


@pytest.mark.parametrize("flags", [["--gpus", "0"], ["--depth", "-1"], ["--memory-gib", "nan"], ["--batches"],
                                   ["--must-fit"]])
def test_a_plan_of_impossible_numbers_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        program.parse_args(flags)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [*range(1, 17), 20, 24, 32, 64, 128, 256])
def test_a_step_stays_near_nanochats_with_any_number_of_gpus(gpus):
    for depth in plan.TIERS:
        machine = plan.Machine.of("h100", gpus)
        rows, step_rows = plan.pretraining_batch(plan.Shape(depth), machine)
        assert step_rows % (rows * gpus) == 0 and rows <= plan.micro_batch(plan.Shape(depth), gpus, 80)
        assert abs(step_rows - 256) <= (0.05 if 256 % gpus else 0) * 256


def test_a_plan_prints_the_batch_and_steps_that_will_run(capsys):
    program.main(program.parse_args(["--depth", "20", "--gpus", "5"]))
    said = capsys.readouterr().out
    assert "21,071 steps of 532,480 (nanochat's is 524,288)" in said and "26 rows of 2,048 at a time" in said
    assert round(20 * plan.Shape(20).parameters / 532480) == 21_071
    program.main(program.parse_args(["--depth", "20", "--gpus", "64"]))
    assert "21,400 steps of 524,288;" in (said := capsys.readouterr().out) and "4 rows of 2,048 at a time" in said


def test_samples_of_pass_at_k_and_validation_are_in_the_hours():
    stages = {stage.name: stage for stage in plan.stages(plan.Shape(20), H100)}
    validation = stages["pretraining's validation"]
    assert "912M tokens" in validation.basis  # 87 times 20 x 524,288
    assert validation.hours == pytest.approx(stages["pretraining"].hours * 912.3 / 11220 / 3, rel=0.01)
    sampling = (467 * 256 + 9 * 400 * 8) * 256 / 80_000 / 3600
    training = 467 * 256 * 256 * plan.Shape(20).flops_per_token / (8 * 989e12 * plan.FINETUNE_MFU) / 3600
    assert stages["RL"].hours == pytest.approx(sampling + training)
    assert "31M sampled tokens and 7M of pass@k" in stages["RL"].basis


def test_what_does_not_fit_is_an_error_only_where_it_must(capsys):
    flags = ["--depth", "32", "--gpus", "1", "--gpu", "4090"]
    program.main(program.parse_args(flags))
    assert "DOES NOT FIT" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        program.main(program.parse_args([*flags, "--must-fit"]))
    assert ended.value.code == 2 and capsys.readouterr().err == (
        "error: d32 must fit a GPU: pretraining needs 29.8 GiB (estimate), and 21.6 of 24 can be used\n")
    program.main(program.parse_args(["--depth", "12", "--gpus", "1", "--gpu", "4090", "--must-fit"]))


def test_columns_of_large_plans_stay_apart(capsys):
    program.main(program.parse_args(["--depth", "100", "--gpus", "1"]))
    [total] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("in all  ")]
    hours, dollars = float(total[-2]), float(total[-1].replace(",", ""))
    assert hours > 1e5 and dollars == pytest.approx(3 * hours, abs=0.02)


@pytest.mark.parametrize("name, gib", [("NVIDIA A100-PCIE-40GB", 40), ("NVIDIA A100-SXM4-80GB", 80), ("a100", 80),
                                       ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA GH200 480GB", 141), ("abacus", None)])
def test_memory_follows_from_the_name(name, gib):
    assert plan.Machine.of(name, 1).memory_gib == gib and plan.Machine.of(name, 1, memory_gib=7).memory_gib == 7
