"""What is kept of measurements: rows after every one, baselines per GPU name, the best table, README's speed table."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench import bench_decode, compare, qualify, results
from bench.qualify import Stage, plan, run_process, run_stages
from kernels import KernelConfig, KernelUnavailable, resolve
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parent.parent
H200 = {"gpu": "NVIDIA H200", "driver": "580", "torch": "2.11", "triton": "3.6", "commit": "abc", "dirty": True}


def kernel_row(op, provider, ms, case="d20", passes="forward+backward") -> dict:
    return {"key": f"kernel/{op}/{provider}/{case}/{passes}", "op": op, "provider": provider, "case": case,
            "passes": passes, "median_s": ms / 1e3, "mad_s": ms / 1e6}


def train_row(kernel_set="best", seconds=0.5) -> dict:
    return {"key": f"train/d20/{kernel_set}", "set": kernel_set, "depth": 20, "tokens_per_step": 131_072,
            "context": 2048, "median_s": seconds, "mad_s": 0.001, "tokens_per_s": 131_072 / seconds, "mfu": 57.25,
            "mfu_causal": None, "vs_compile": {"median": 1.25, "least": 1.2, "most": 1.3}, "peak_bytes": 30 * 2**30,
            "kernels": {}}


def of(*rows) -> dict:
    return {row["key"]: row for row in rows}


def test_the_file_is_whole_after_every_row_and_a_second_process_adds_to_it(tmp_path):
    path = tmp_path / "rows.json"
    first = results.Results(path, H200)
    first.add(kernel_row("relu2", "eager", 2.0))
    assert list(results.load(path)["rows"]) == ["kernel/relu2/eager/d20/forward+backward"]
    second = results.Results(path, H200)
    second.add(train_row())
    second.note("dropped: the rest")
    found = results.load(path)
    assert list(found["rows"]) == ["kernel/relu2/eager/d20/forward+backward", "train/d20/best"]
    assert found["rows"]["train/d20/best"]["gpu"] == "NVIDIA H200" and found["notes"] == ["dropped: the rest"]
    with pytest.raises(UserError, match="holds rows of NVIDIA H200, this is NVIDIA H100"):
        results.Results(path, {"gpu": "NVIDIA H100"})


@pytest.mark.parametrize("text", ["", "[]", '{"rows": {}}'])
def test_a_file_without_results_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json must"):
        results.load(path)


@pytest.mark.parametrize("mad, slower, red", [(0.0, 1.029, False), (0.0, 1.031, True), (0.02, 1.059, False),
                                              (0.02, 1.061, True), (0.0, 0.5, False)])
def test_slower_is_more_than_three_percent_and_three_mads(mad, slower, red):
    base = {"median_s": 1.0, "mad_s": mad}
    assert bool(results.slowdown({"key": "k", "median_s": slower, "mad_s": 1.0}, base)) == red
    assert results.slowdown({"key": "k", "median_s": slower, "mad_s": 0.0}, None) is None


def test_baselines_belong_to_one_gpu_name_and_grow_row_by_row(tmp_path):
    run = results.Results(None, H200)
    run.add(kernel_row("relu2", "eager", 2.0))
    run.add(kernel_row("relu2", "triton", 1.0))
    assert results.update_baseline(run, tmp_path) == tmp_path / "nvidia-h200.json"
    later = results.Results(None, {**H200, "commit": "def"})
    later.add(kernel_row("relu2", "triton", 0.5))
    results.update_baseline(later, tmp_path)
    rows = results.baseline_rows("NVIDIA H200", tmp_path)
    assert [(row["median_s"], row["commit"]) for row in rows.values()] == [(2e-3, "abc"), (0.5e-3, "def")]
    assert results.baseline_rows("NVIDIA H100 80GB HBM3", tmp_path) is None
    assert results.baseline_rows("nvidia h200", tmp_path) is None  # same file name, another name


def test_best_is_the_fastest_of_what_was_compared_and_our_own_must_win_by_five_percent():
    rows = of(kernel_row("rms_norm", "eager", 3.0), kernel_row("rms_norm", "compile", 0.1),
              kernel_row("rms_norm", "triton", 1.0), kernel_row("rms_norm", "liger", 2.0),
              kernel_row("attention", "eager", 9.0), kernel_row("attention", "sdpa", 1.03),
              kernel_row("attention", "triton", 1.0), kernel_row("attention", "sdpa", 9.0, "d20_window_512"),
              kernel_row("linear", "eager", 2.0), kernel_row("linear", "fp8", 1.0),
              kernel_row("relu2", "eager", 1.0), kernel_row("relu2", "no longer there", 0.1),
              kernel_row("newton_schulz", "eager", 1.0, "d20", "forward"),
              kernel_row("newton_schulz", "eager", 1.0, "d20_square", "forward"),
              kernel_row("newton_schulz", "triton", 0.1, "d20", "forward"),
              kernel_row("newton_schulz", "triton", 0.9, "d20_square", "forward"),
              kernel_row("newton_schulz", "direct", 0.5, "d20", "forward"),  # ours too, and slower in sum
              kernel_row("newton_schulz", "direct", 0.6, "d20_square", "forward"),
              kernel_row("muon_update", "eager", 1.0, "d20", "forward"),
              kernel_row("muon_update", "eager", 1.0, "d20_b", "forward"),
              kernel_row("muon_update", "triton", 0.1, "d20", "forward"),
              kernel_row("sample", "eager", 9.0, "d12", "forward"),
              kernel_row("sample", "triton", 1.0, "d12", "forward"))
    # linear=fp8 computes something else; relu2 and muon_update have only one backend with every size; sample no d20
    assert results.best_backends(rows) == {"rms_norm": "triton", "attention": "sdpa", "newton_schulz": "triton"}


def test_the_forward_pass_alone_does_not_decide_what_trains():
    rows = of(kernel_row("relu2", "eager", 3.0), kernel_row("relu2", "triton", 4.0),
              kernel_row("relu2", "eager", 3.0, passes="forward"), kernel_row("relu2", "triton", 0.1, passes="forward"))
    assert results.best_backends(rows) == {"relu2": "eager"}


# --- the preset -----------------------------------------------------------------------------------


def test_best_takes_the_measured_backends_and_auto_for_the_others(tmp_path, monkeypatch):
    table = tmp_path / "best.json"
    table.write_text(json.dumps({"cpu": {"attention": "eager"}}), encoding="utf-8")
    monkeypatch.setattr("kernels.registry.BEST_TABLE", table)
    cpu = torch.device("cpu")
    assert resolve(KernelConfig.parse("best"), cpu, torch.float32).names["attention"] == "eager"
    assert resolve(KernelConfig.parse("best,attention=sdpa"), cpu, torch.float32).names["attention"] == "sdpa"
    auto = resolve(KernelConfig.parse("auto"), cpu, torch.float32)
    best = resolve(KernelConfig.parse("best"), cpu, torch.float32)
    assert {**best.names, "attention": "sdpa"} == auto.names and best.requested == "best"


@pytest.mark.parametrize("tables, sentence", [
    ({"NVIDIA H200": {}}, "--kernels best: best needs a table measured on this GPU, there is none for this "
                          "NVIDIA H100 80GB HBM3; use --kernels auto"),
    ({"NVIDIA H100 80GB HBM3": {"attention": "gone"}},
     "--kernels best: best.json has attention=gone for this NVIDIA H100 80GB HBM3, which this version lacks; "
     "measure again or use --kernels auto"),
])
def test_best_without_a_table_for_this_gpu_is_refused(tmp_path, monkeypatch, tables, sentence):
    table = tmp_path / "best.json"
    table.write_text(json.dumps(tables), encoding="utf-8")
    monkeypatch.setattr("kernels.registry.BEST_TABLE", table)
    monkeypatch.setattr("kernels.registry.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    with pytest.raises(KernelUnavailable) as error:
        resolve(KernelConfig.parse("best"), torch.device("cuda"), torch.bfloat16)
    assert str(error.value) == sentence


def test_the_committed_table_names_backends_that_exist():
    from kernels.registry import BACKENDS, BEST_TABLE
    for choices in json.loads(BEST_TABLE.read_text(encoding="utf-8")).values():
        assert all(backend in BACKENDS[op] for op, backend in choices.items())


# --- comparing and accepting ----------------------------------------------------------------------


def test_compare_refuses_different_gpus_and_names_the_slower_rows(tmp_path, monkeypatch, capsys):
    old, new, other = (tmp_path / f"{name}.json" for name in ("old", "new", "other"))
    for path, gpu, ms in ((old, "NVIDIA H200", 1.0), (new, "NVIDIA H200", 1.1), (other, "NVIDIA H100", 1.0)):
        results.Results(path, {**H200, "gpu": gpu}).add(kernel_row("relu2", "eager", ms))
    with pytest.raises(SystemExit) as stop:
        compare.main(compare.parse_args([str(new), str(old)]))
    assert stop.value.code == 1
    assert "+10.0 %" in (said := capsys.readouterr().out) and "10.0 % slower than the baseline's" in said
    compare.main(compare.parse_args([str(old), str(new)]))
    with pytest.raises(UserError, match="rows of different GPUs are not compared: NVIDIA H200 and NVIDIA H100"):
        compare.main(compare.parse_args([str(new), str(other)]))


def test_accepting_writes_baseline_best_table_and_readme(tmp_path):
    readme, best = tmp_path / "README.md", tmp_path / "best.json"
    readme.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n", encoding="utf-8")
    best.write_text('{"NVIDIA A100": {"relu2": "eager"}}', encoding="utf-8")
    rows = [kernel_row("relu2", "eager", 3.0), kernel_row("relu2", "triton", 1.0), train_row("compile", 0.625),
            train_row()]
    compare.accept({"environment": H200, "rows": of(*({**row, **H200} for row in rows)), "notes": []},
                   tmp_path / "baselines", best, readme)
    assert json.loads(best.read_text(encoding="utf-8")) == {"NVIDIA A100": {"relu2": "eager"},
                                                            "NVIDIA H200": {"relu2": "triton"}}
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "One NVIDIA H200, driver 580, torch 2.11, triton 3.6; 131,072 tokens per step" in text
    assert ("| d20 | best | 500.0 ± 1.0 | 262,144 | 57.2 % | n/a | 30.0 GiB | 1.250x (1.200 to 1.300) | "
            "abc + changes |") in text
    assert "H100" not in text
    row = {**train_row(), **H200, "commit": None, "dirty": None, "kernels_sha256": "0123456789ab"}
    assert "| kernels 0123456789ab |" in compare.speed_table([{"rows": of(row)}])  # a tree without its repository


def test_readme_shows_the_table_of_the_committed_baselines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert compare.with_table(text, compare.speed_table(compare.measured_gpus())) == text


def test_a_text_without_markers_is_refused_and_no_rows_are_no_table():
    with pytest.raises(UserError, match="speed table"):
        compare.with_table("no markers", "table")
    assert compare.speed_table([]) == compare.NOT_MEASURED


# --- qualify --------------------------------------------------------------------------------------


def test_without_a_gpu_qualify_says_so_and_exits_2():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run(["bash", "bench/qualify.sh", "--minutes", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == ("error: qualify needs a CUDA GPU that torch can see, found none; nothing was measured\n")


def budgeted(stages, seconds, durations):
    """Run stages whose durations are given, on a clock that only they move; return (good, notes, what ran)."""
    clock, notes, ran = [0.0], [], []

    def run(command, limit):
        name, seconds, code = command[0], *durations[command[0]]
        ran.append(name)
        clock[0] += min(seconds, limit)
        return None if seconds > limit else code

    good = run_stages(stages, seconds, notes.append, run, lambda: clock[0])
    return good, notes, ran


def test_a_budget_drops_and_cuts_late_stages_and_names_them():
    stages = [Stage("parity", ["parity"], 20, 0.25), Stage("op", ["op"], 20), Stage("d12", ["d12"], 60),
              Stage("d20", ["d20"], 100)]
    good, notes, ran = budgeted(stages, 600, {"parity": (100, 0), "op": (50, 0), "d12": (60, 0), "d20": (200, 0)})
    assert (good, notes, ran) == (True, [], ["parity", "op", "d12", "d20"])
    good, notes, ran = budgeted(stages, 400, {"parity": (500, 0), "op": (200, 1), "d12": (70, 0), "d20": (9, 0)})
    assert not good and ran == ["parity", "op", "d12"]
    assert notes == ["cut short: parity was ended after 100 s, rows until then are kept", "failed: op (exit code 1)",
                     "dropped for want of time: d20 (30 s left, it needs 100)"]


def test_the_plan_is_parity_then_six_ops_then_steps_and_decoding(tmp_path):
    stages = plan(tmp_path / "rows.json")
    kinds = [stage.name.split()[0] for stage in stages]
    assert kinds == ["parity"] * 2 + ["op"] * 6 + ["train", "decode", "train"] + ["decode"] * 3
    for stage in stages[2:]:
        assert str(tmp_path / "rows.json") in stage.command
    depths = [s.command[s.command.index("--depth") + 1] for s in stages if s.name.startswith(("train", "decode"))]
    assert depths == ["12", *["20"] * 5]
    for stage in stages:
        if stage.name.startswith("decode"):
            bench_decode.parse_args(stage.command[3:])


def test_qualify_keeps_rows_and_says_what_failed(tmp_path, monkeypatch, capsys):
    """The whole program but for the GPU and the stages' own work."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.harness.environment", lambda device: H200)
    (tmp_path / "qualify.json").write_text("an earlier run's", encoding="utf-8")
    ran = []

    def run(command, limit):
        path = Path(command[command.index("--rows") + 1])
        ran.append((path, command, limit))
        results.Results(path, H200).add(kernel_row("relu2", "eager", len(ran)))
        return 0 if len(ran) == 1 else 1

    monkeypatch.setattr(qualify, "run_process", run)
    with pytest.raises(SystemExit) as stop:
        qualify.main(qualify.parse_args(["--minutes", "3", "--only", "train"]))
    assert stop.value.code == 1 and [command[command.index("--depth") + 1] for _, command, _ in ran] == ["12", "20"]
    assert ran[0][0].parent == tmp_path and ran[0][0].name.startswith("nvidia-h200-2") and 170 < ran[0][2] <= 180
    found = results.load(ran[0][0])
    assert found["rows"]["kernel/relu2/eager/d20/forward+backward"]["median_s"] == 2e-3
    assert found["notes"] == ["failed: train d20 (exit code 1)"]
    assert (tmp_path / "qualify.json").read_text(encoding="utf-8") == "an earlier run's"
    assert "NVIDIA H200, driver 580, torch 2.11, triton 3.6, commit abc, with changes" in capsys.readouterr().out


def test_a_stage_that_overruns_is_ended(capfd):
    assert run_process(["sleep", "30"], 0.2) is None
    assert run_process(["false"], 10) == 1
    assert "$ sleep 30" in capfd.readouterr().out
