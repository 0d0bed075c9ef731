"""The kernel benches without a GPU: what they skip and print, and with a made-up timer what they file and refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import harness
from kernels.registry import BACKENDS, OPS

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# The CPU stands in for a GPU: one process runs the bench as it is, then with a timer that answers made-up seconds.
SCRIPT = """
import contextlib, io, itertools, json, sys
import pytest
from bench import harness
from kernels.registry import register

def bench(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(["-q", "-p", "no:cacheprovider", "bench/bench_kernels.py", "--op", "rms_norm", *arguments])
    return {"code": int(code), "said": said.getvalue()}

folder = sys.argv[1]
seen = {"cpu": bench("--size", "d20")}

def gpu(name, seconds):
    spread = itertools.cycle((0.995, 1.0, 1.005))
    harness.environment = lambda device: {"gpu": name, "torch": "2", "triton": "3", "commit": "abc", "dirty": False}
    harness.timer_for = lambda device: lambda call: (call(), seconds * next(spread))[1]

fast = ("--deselect", "bench/bench_kernels.py::bench_compile_table", "--size", "tiny", "--provider", "eager",
        "--baselines", folder)
gpu("NVIDIA H200", 1e-3)
seen["new"] = bench(*fast, "--rows", folder + "/rows.json", "--benchmark-json", folder + "/pytest.json")
seen["baseline"] = bench(*fast, "--update-baseline")
gpu("NVIDIA H200", 1.02e-3)
seen["2 % slower"] = bench(*fast)
gpu("NVIDIA H200", 1.1e-3)
seen["10 % slower"] = bench(*fast)
gpu("NVIDIA H100 80GB HBM3", 1.1e-3)
seen["other gpu"] = bench(*fast)
seen["rows of another gpu"] = bench(*fast, "--rows", folder + "/rows.json")
register("rms_norm", "wrong")(lambda x: x * 2)
seen["wrong"] = bench(*fast[:4], "--provider", "wrong")
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    # nor the marks of a pytest-xdist worker: pytest-benchmark measures nothing in one
    env = {name: value for name, value in os.environ.items()
           if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_XDIST")}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]) | {"folder": folder}


def test_without_a_gpu_every_row_says_why_it_is_skipped_and_the_compiled_kernels_are_the_bench(seen):
    said = seen["cpu"]["said"]
    assert seen["cpu"]["code"] == 0
    assert "skipped 4 rows: device times need a CUDA GPU, this is cpu (rms_norm=eager, rms_norm=compile)" in said
    assert "skipped 2 rows: Triton needs a CUDA GPU, this is cpu (rms_norm=triton)" in said
    assert "skipped 2 rows: needs a CUDA GPU, this is cpu (rms_norm=liger)" in said
    for kernel in ("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"):
        lines = [line.split() for line in said.splitlines() if line.startswith(kernel)]
        assert [line[1] for line in lines] == ["90", "80"]
        assert all(0 < int(line[3]) <= 255 and line[4] == "0" for line in lines)  # registers, spilled bytes


def test_rows_go_to_both_json_files_with_the_machine_in_each(seen):
    rows = json.loads((seen["folder"] / "rows.json").read_text(encoding="utf-8"))["rows"]
    benches = json.loads((seen["folder"] / "pytest.json").read_text(encoding="utf-8"))
    assert seen["new"]["code"] == 0
    assert list(rows) == ["kernel/rms_norm/eager/tiny/forward", "kernel/rms_norm/eager/tiny/forward+backward"]
    for row in rows.values():
        assert row["median_s"] == pytest.approx(1e-3) and row["mad_s"] == pytest.approx(5e-6)
        assert (row["gpu"], row["commit"], row["dirty"], row["torch"], row["triton"]) == (
            "NVIDIA H200", "abc", False, "2", "3")
        assert row["kernels"] == {"rms_norm": "eager"} and row["vs_eager"] == 1 and row["vs_compile"] is None
        assert row["rounds"] == harness.MOST and row["sm_mhz"] is None
    assert [bench["extra_info"] for bench in benches["benchmarks"]] == list(rows.values())
    assert benches["benchmarks"][0]["stats"]["median"] == pytest.approx(1e-3)
    assert benches["machine_info"]["gpu"] == "NVIDIA H200"


def test_a_slowdown_of_ten_percent_turns_the_run_red_and_one_of_two_percent_does_not(seen):
    assert seen["baseline"]["code"] == 0 and (seen["folder"] / "nvidia-h200.json").exists()
    assert seen["2 % slower"]["code"] == 0
    assert "compared with" in seen["2 % slower"]["said"]
    assert seen["10 % slower"]["code"] == 1
    assert ("kernel/rms_norm/eager/tiny/forward: 1.1000 ms is 10.0 % slower than the baseline's 1.0000 ms, "
            "at most 3.0 % is allowed") in seen["10 % slower"]["said"]


def test_another_gpu_has_no_baseline_and_says_so(seen):
    assert seen["other gpu"]["code"] == 0
    assert "no baseline for NVIDIA H100 80GB HBM3: nothing was compared" in seen["other gpu"]["said"]
    assert seen["rows of another gpu"]["code"] == 4  # pytest's usage error
    assert "holds rows of NVIDIA H200, this is NVIDIA H100 80GB HBM3" in seen["rows of another gpu"]["said"]


def test_a_backend_that_fails_parity_is_not_timed(seen):
    assert seen["wrong"]["code"] == 1
    assert "not timed, it fails parity: rms_norm=wrong" in seen["wrong"]["said"]
    assert "kernels on" not in seen["wrong"]["said"]


def test_docs_list_every_op_with_its_backends():
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8").split("\n## The ops\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    listed = {op.strip("`"): set(backends.split(", ")) for op, _, backends in rows}
    assert listed == {op: set(BACKENDS[op]) - {"eager"} for op in OPS}


# --- the harness ----------------------------------------------------------------------------------


def test_every_backend_of_every_op_is_a_row_at_three_sizes():
    rows = set(harness.benches())
    for op in OPS.values():
        for case in (case for case in op.cases if case.startswith(harness.SIZES)):
            for provider in ("compile", *BACKENDS[op.name]):
                assert harness.Bench(op.name, provider, case, False) in rows
                assert (harness.Bench(op.name, provider, case, True) in rows) == bool(op.grad_inputs)
    some = harness.benches(["attention"], ["d20"], ["sdpa"])
    assert {(b.op, b.provider, b.case[:3]) for b in some} == {("attention", "sdpa", "d20")}


def test_a_forward_backward_call_computes_the_gradients_and_counts_its_traffic(monkeypatch):
    bench = harness.Bench("relu2", "eager", "tiny", True)
    call = harness.Call(bench, CPU)
    x = call.inputs["x"]
    asked = []
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, cotangents: asked.append((inputs, cotangents)))
    call()
    assert asked[0][0][0] is x and asked[0][1][0].shape == x.shape and asked[0][1][0].any()
    assert call.bytes() == 5 * x.nbytes  # forward x, y; backward x, dy, dx
    assert call.flops() == 3 * 2 * x.numel()
    forward = harness.Call(harness.Bench("relu2", "eager", "tiny", False), CPU)
    assert (forward.bytes(), forward.flops()) == (2 * x.nbytes, 2 * x.numel())


def test_attention_counts_its_recomputed_scores_and_what_it_uses_is_what_auto_takes():
    call = harness.Call(harness.Bench("attention", "sdpa", "tiny", True), CPU)
    assert call.flops() == 3.5 * OPS["attention"].flops(OPS["attention"].cases["tiny"])
    assert call.kernels == {"attention": "sdpa", "qk_norm_rope": "eager"}


@pytest.mark.parametrize("peaks, roof, percent", [
    ({"bf16": 1e12, "memory": 1e9}, "memory", 50.0),  # 8 * 64 * 2 * 2 bytes in 4.096 us is 0.5 GB/s
    ({"bf16": 1e9, "memory": 1e12}, "compute", 25.0),  # 2 * 8 * 64 FLOPs in 4.096 us is 0.25 GFLOP/s
    ({"bf16": None, "memory": None}, None, None),
])
def test_percent_of_roof_is_of_the_nearer_one_and_nothing_for_an_unknown_gpu(monkeypatch, peaks, roof, percent):
    monkeypatch.setattr(harness, "peak", lambda device, what: peaks[what])
    bench = harness.Bench("relu2", "eager", "tiny", False)
    row = harness.figures(bench, harness.Call(bench, CPU), [4.096e-6] * 3, CPU)
    assert row["gb_per_s"] == pytest.approx(0.5) and row["tflop_per_s"] == pytest.approx(0.25e-3)
    assert (row["roof"], row["percent_of_roof"]) == (roof, percent and pytest.approx(percent))


def test_fp8_is_held_against_the_fp8_peak(monkeypatch):
    monkeypatch.setattr(harness, "peak", lambda device, what: {"bf16": 1e9, "fp8": 2e9, "memory": 1e15}[what])
    call = harness.Call(harness.Bench("linear", "eager", "tiny", False), CPU)
    percents = [harness.figures(harness.Bench("linear", provider, "tiny", False), call, [1e-4], CPU)["percent_of_roof"]
                for provider in ("eager", "fp8")]
    assert percents == [pytest.approx(100 * 2 * 16 * 64 * 32 / 1e9 / 1e-4), pytest.approx(percents[0] / 2)]


def test_parity_halves_the_batch_until_the_reference_fits(monkeypatch):
    sizes = []

    def small_gpu(op, backend, case, dtype, device):
        sizes.append(OPS[op].cases[case]["N"])
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(harness, "assert_parity", small_gpu)
    before = OPS["cross_entropy"]
    fault = harness.parity_fault.__wrapped__("cross_entropy", "triton", "tiny", CPU)
    assert (fault, sizes) == ((None, "N=4"), [16, 8, 4])
    assert OPS["cross_entropy"] is before
    monkeypatch.setattr(harness, "assert_parity", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    fault, _ = harness.parity_fault.__wrapped__("muon_update", "triton", "odd_shared", CPU)
    assert fault == "the fp64 reference does not fit this GPU's memory"


def test_compile_is_the_eager_reference_under_torch_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn: compiled.append(fn) or fn)
    call = harness.Call(harness.Bench("attention", "compile", "tiny", False), CPU)
    assert compiled == [call.fn] and call.kernels == {"attention": "eager"}
    eager = harness.Call(harness.Bench("attention", "eager", "tiny", False), CPU)
    assert len(compiled) == 1 and torch.equal(call._outputs()[0], eager._outputs()[0])


def test_ratios_say_how_many_times_faster_and_the_spread_is_from_p20_to_p80():
    rows = {key: {"key": key, "provider": key.split("/")[2], "median_s": seconds} for key, seconds in (
        ("kernel/relu2/eager/d20/forward", 4.0), ("kernel/relu2/compile/d20/forward", 2.0),
        ("kernel/relu2/triton/d20/forward", 1.0), ("kernel/relu2/triton/d12/forward", 1.0))}
    assert harness.against(rows["kernel/relu2/triton/d20/forward"], rows) == {"vs_eager": 4.0, "vs_compile": 2.0}
    assert harness.against(rows["kernel/relu2/triton/d12/forward"], rows) == {"vs_eager": None, "vs_compile": None}
    assert harness.quantiles([float(n) for n in range(11)]) == (2.0, 8.0) and harness.quantiles([3.0]) == (3.0, 3.0)
    assert harness.median_and_mad([1.0, 2.0, 4.0, 8.0, 16.0]) == (4.0, 3.0)


def test_the_clock_moves_by_device_time_only():
    clock = harness.Clock()
    clock.timed(lambda call: 0.25, None)
    assert clock.read() == 0.25
    clock.timed(lambda call: 0.5, None)
    assert clock.read() == 0.75


def test_device_time_is_between_events_around_the_call_after_the_cache_was_cleared(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.5  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(harness, "COLD_BYTES", 8)
    timer = harness.DeviceTimer(CPU)
    timer.cold.fill_(7)
    assert timer(lambda: log.append(f"call after {timer.cold.sum()}")) == 2.5e-3
    assert log == ["record", "call after 0", "record", "wait"]


def test_peak_memory_is_what_one_call_takes_beyond_what_was_there(monkeypatch):
    memory = {"now": 100, "peak": 900}
    for name, fake in {"reset_peak_memory_stats": lambda d: memory.update(peak=memory["now"]),
                       "memory_allocated": lambda d: memory["now"], "synchronize": lambda d: None,
                       "max_memory_allocated": lambda d: memory["peak"]}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert harness.peak_bytes(lambda: memory.update(peak=350), torch.device("cuda")) == 250
    assert harness.peak_bytes(lambda: 1 / 0, CPU) is None


def test_rounds_fill_half_a_second_within_bounds():
    assert [harness.rounds_for(s) for s in (1.0, 0.01, 1e-6)] == [15, 50, 100]


def test_the_digest_of_the_sources_follows_every_file_and_name(tmp_path):
    digests = set()
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", ""), ("notes.txt", "ignored")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        digests.add(harness.source_digest(tmp_path))
    assert len(digests) == 3 and harness.environment(CPU)["kernels_sha256"] == harness.source_digest(ROOT / "kernels")


def test_nvidia_smi_is_asked_about_this_gpu_and_its_gaps_are_none(monkeypatch):
    monkeypatch.setattr(harness, "smi", lambda device, fields: "1755, 1980, [N/A], 401.25")
    assert harness.clocks(CPU) == {"sm_mhz": 1755, "sm_max_mhz": 1980, "memory_mhz": None, "watts": 401.25}
    monkeypatch.setattr(harness, "smi", lambda device, fields: None)
    assert set(harness.clocks(CPU).values()) == {None}
