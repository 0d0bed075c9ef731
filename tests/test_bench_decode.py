"""The decoding bench on the CPU, for real, with a model of one layer; clients on a clock of their own."""

import json
import time
from types import SimpleNamespace

import pytest
import tiny_engine
import torch
from tiny_engine import one_thread, random_model, tokenizer  # noqa: F401

from bench import bench_decode, bench_engine, decode_load, results
from bench.bench_decode import Cell, Roof
from nanochat.common import UserError
from nanochat.engine import Engine, SamplingParams

TINY = ["--depth", "1", "--vocab-size", "300", "--device", "cpu", "--rounds", "2", "--tokens", "4",
        "--batch-sizes", "1", "3", "--contexts", "24"]


def run(*flags: str) -> None:
    bench_decode.main(bench_decode.parse_args([*TINY, *flags]))


# --- the roof -------------------------------------------------------------------------------------


def test_the_roof_of_d20_on_an_h200_is_the_known_one(capsys):
    bench_decode.main(bench_decode.parse_args(["--depth", "20", "--roof", "H200", "--batch-sizes", "1", "64",
                                               "--contexts", "256", "1024"]))
    said = capsys.readouterr().out
    card = json.loads(said.splitlines()[-1])["roof"]
    floors = {(step["batch"], step["context"]): step["floor_tokens_per_s"] for step in card["steps"]}
    assert {at: round(speed) for at, speed in floors.items()} == {
        (1, 256): 4896, (64, 256): 116_721, (1, 1024): 4532, (64, 1024): 40_078}
    assert card["parameters"] == 560_988_160 and card["weight_bytes"] == 2 * 477_102_080
    assert card["parameter_bytes"] == 2 * 560_988_160 and card["kv_bytes_per_token"] == 102_400
    assert card["kv_capacity_tokens"] == int((0.9 * 141 * 2**30 - 2 * 560_988_160 - 2e9) // 102_400)
    assert "4,532" in said and "40,078" in said and "computed, not measured" in said


def test_the_roof_counts_fp8_scales_whole_pages_and_windows():
    model = random_model(n_layer=3, sequence_len=1024, window_pattern="SL")  # windows 256, all, all
    roof, fp8 = (Roof(model, fp8, "a GPU", 1e6, None) for fp8 in (False, True))
    a_key = 2 * 64 * 4  # one kv head of 64
    assert roof.kv(100) == 3 * 100 * a_key and roof.kv(1000) == (257 + 2 * 1000) * a_key
    assert roof.kv(1000, page_size=16) == 3 * 1008 * a_key
    assert fp8.kv(100) == 3 * 100 * (2 * 64 + 4)
    step = roof.step(5, 100)
    head_and_blocks = sum(p.numel() for name, p in model.named_parameters() if "wte" not in name)
    assert step["necessary_bytes"] == 4 * head_and_blocks + 5 * roof.kv(100)
    assert step["stored_bytes"] == 4 * model.num_params() + 5 * roof.kv(112)
    assert step["floor_s"] == step["necessary_bytes"] / 1e6
    assert step["floor_tokens_per_s"] == pytest.approx(5 / step["floor_s"])


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_round_is_cold_prompts_then_steps_of_all_rows(tokenizer, overlap):  # noqa: F811
    model = random_model()
    cell = Cell(model, tokenizer, 3, 40, 10, {"overlap": overlap})
    assert [len(prompt) for prompt in cell.prompts] == [35] * 3
    for done in (1, 2):
        model.computed = []
        cell.round()
        if not overlap:  # cold prompts; what is left of them behind two known pages; nine steps of three rows
            assert model.computed == [3 * 35, 3 * 3] + [3] * 9
        assert len(cell.seconds) == 9 * done and len(cell.ttft) == 3 * done and len(cell.prefill) == done
        assert cell.engine.scheduler.cached_tokens == 3 * 32 * done and cell.engine.scheduler.preemptions == 0
    assert 0 < max(cell.ttft[3:]) <= cell.prefill[1]
    cell.seconds = [0.1, 0.2, 0.6]
    row = cell.row("x", Roof(model, False, "a GPU", 1e6, None), 2)
    assert row["key"] == "decode/x/b3/c40" and row["median_s"] == 0.2 and row["p95_s"] == pytest.approx(0.56)
    assert row["tokens_per_s"] == pytest.approx(3 * 3 / 0.9) and row["mad_s"] == pytest.approx(0.1)
    assert row["mbu"] == pytest.approx(100 * row["necessary_bytes"] / 0.2 / 1e6)
    assert row["mbu_stored"] == pytest.approx(100 * row["stored_bytes"] / 0.2 / 1e6)
    assert row["prompt_tokens"] == 105 and row["peak_bytes"] is row["attention_share"] is None


def test_attentions_share_and_bandwidth_are_of_its_own_kernels():
    groups = {"paged_attention": 1.5, "attention": 0.5, "matrix products": 6.0, "paged_append": 2.0}
    assert bench_decode.attention_figures(groups, 10**9, 1e12) == {"attention_share": 20, "attention_mbu": 50}
    assert bench_decode.attention_figures(groups, 10**9, None) == {"attention_share": 20, "attention_mbu": None}
    assert bench_decode.attention_figures({}, 10**9, 1e12) == {"attention_share": None, "attention_mbu": None}


def test_a_run_prints_the_roof_then_tables_and_a_line_of_json(tmp_path, capsys):
    path = tmp_path / "rows.json"
    run("--parts", "steps", "closed", "poisson", "--requests", "5", "--clients", "2", "--rate", "1000", "--rows",
        str(path))
    said = capsys.readouterr().out
    found, rows = json.loads(said.splitlines()[-1]), results.load(path)["rows"]
    name = "decode/random-d1/auto/auto/eager"
    assert list(rows) == [f"{name}/b1/c24", f"{name}/b3/c24", f"{name}/closed", f"{name}/poisson"]
    assert [row["key"] for row in found["rows"]] == list(rows) and found["bench"] == "decode"
    for row in rows.values():
        assert row["gpu"] == "CPU" and row["kernels"]["paged_attention"] == "eager" and row["torch"]
        assert row["median_s"] > 0 and row["dtype"] == "float32" and row["kv"] == "auto"
    for row in list(rows.values())[:2]:
        assert row["steps"] == 2 * 3 and row["mbu"] is row["floor_s"] is None and row["ttft_s"] > 0
    assert rows[f"{name}/closed"]["clients"] == 2 and rows[f"{name}/poisson"]["rate"] == 1000
    assert rows[f"{name}/closed"]["requests"] == rows[f"{name}/poisson"]["requests"] == 5
    assert said.startswith("roof: ") and "peak n/a" in said and "closed loop, 2 clients" in said
    assert found["left_out"] == [] and found["ratio"] is None and len(found["roof"]["steps"]) == 2


def test_a_cell_that_breaks_is_left_out_and_fails_the_run_after_the_others(tmp_path, monkeypatch, capsys):
    build = bench_decode.Cell

    def breaks(model, tokenizer, batch, *args):  # noqa: F811
        if batch == 1:
            raise torch.OutOfMemoryError("no room")
        return build(model, tokenizer, batch, *args)

    monkeypatch.setattr(bench_decode, "Cell", breaks)
    path = tmp_path / "rows.json"
    with pytest.raises(UserError, match="b1 c24 was left out: OutOfMemoryError: no room"):
        run("--parts", "steps", "--rows", str(path))
    found = results.load(path)
    assert list(found["rows"]) == ["decode/random-d1/auto/auto/eager/b3/c24"] and len(found["notes"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left_out"] == found["notes"]


def test_a_row_slower_than_the_baseline_fails_the_run(tmp_path):
    rows = results.Results(None, {"gpu": "CPU"})
    rows.add({"key": "decode/random-d1/auto/auto/eager/b3/c24", "median_s": 1e-9, "mad_s": 0.0})
    results.update_baseline(rows, tmp_path)
    with pytest.raises(UserError, match="b3/c24: .* slower than the baseline's"):
        run("--parts", "steps", "--baselines", str(tmp_path))


def test_contexts_are_lowered_to_what_a_trained_model_has(capsys):
    args = SimpleNamespace(contexts=[64, 1024, 2048], tokens=32)
    bench_decode.fit_contexts(args, 256)
    assert args.contexts == [64, 239] and "become [64, 239]" in capsys.readouterr().out
    for wrong in (dict(contexts=[64], tokens=1), dict(contexts=[1], tokens=8), dict(contexts=[64], tokens=600)):
        with pytest.raises(UserError, match="--contexts and --tokens must be at least 2"):
            bench_decode.fit_contexts(SimpleNamespace(**wrong), 256)


@pytest.mark.parametrize("flags, sentence", [(["--graphs"], "graphs cannot be had"),
                                             (["--compiled"], "a compiled step cannot be had")])
def test_what_cannot_be_here_is_refused_by_name(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        run(*flags)


# --- clients --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock of which a step of the engine takes a second; sleeping moves it too."""
    now = SimpleNamespace(seconds=100.0, slept=[])
    step = Engine.step

    def sleep(seconds):
        now.slept.append(seconds)
        now.seconds += seconds

    def slow_step(self):
        step(self)
        now.seconds += 1

    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(Engine, "step", slow_step)
    return now


def jobs(*tokens: int) -> list:
    return [(tiny_engine.prompt_of(5, i), SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True))
            for i, n in enumerate(tokens)]


def test_a_closed_loop_asks_again_as_soon_as_a_client_is_free(tokenizer, clock):  # noqa: F811
    traces = decode_load.closed_loop(Engine(random_model(), tokenizer, max_batch=4), jobs(3, 2, 4), 2)
    assert [trace.due for trace in traces] == [100, 100, 102]  # the second is done after two steps
    assert [trace.seen for trace in traces] == [[101, 102, 103], [101, 102], [103, 104, 105, 106]]
    assert clock.slept == [] and traces[0].gaps == [1, 1] and traces[2].tpot == 1
    found = decode_load.figures(traces, 1.0, 1.0)
    assert found["requests_per_s"] == 3 / 6 and found["tokens_per_s"] == 9 / 6 and found["goodput_per_s"] == 3 / 6
    assert found["ttft_s"] == found["itl_s"] == {"p50": 1, "p90": 1, "p99": 1} and found["queue_s"]["p99"] == 0


def test_an_open_loop_counts_from_when_a_request_was_due(tokenizer, clock):  # noqa: F811
    """One row: the second, due in the middle of a step, waits for the first; the third finds an idle engine."""
    engine = Engine(random_model(), tokenizer, max_batch=1)
    traces = decode_load.open_loop(engine, jobs(3, 2, 2), [0.25, 0.75, 9.0])
    assert [trace.due for trace in traces] == [100.25, 100.75, 109] and clock.slept == [0.25, 3.75]
    assert [trace.seen for trace in traces] == [[101.25, 102.25, 103.25], [104.25, 105.25], [110, 111]]
    assert [trace.ttft for trace in traces] == [1, 3.5, 1] and [trace.queue for trace in traces] == [0, 2.5, 0]
    found = decode_load.figures(traces, 2.0, 1.0)
    assert found["goodput_per_s"] == pytest.approx(2 / 10.75) and found["ttft_s"]["p50"] == 1
    assert decode_load.figures(traces, 4.0, 0.5)["goodput_per_s"] == 0


def test_arrivals_come_at_the_rate_and_with_the_seed_that_are_given():
    arrivals = decode_load.poisson_arrivals(4000, 20.0, 7)
    gaps = [b - a for a, b in zip([0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0 and 0.047 < sum(gaps) / 4000 < 0.053
    assert 0.34 < sum(gap > 0.05 for gap in gaps) / 4000 < 0.40  # exp(-1) of an exponential distribution
    assert arrivals == decode_load.poisson_arrivals(4000, 20.0, 7) != decode_load.poisson_arrivals(4000, 20.0, 8)


def test_a_request_that_did_not_end_well_spoils_the_figures_and_an_error_leaves_nothing(tokenizer, monkeypatch):  # noqa: F811
    engine = Engine(random_model(), tokenizer)
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="one ended by error .logits must be finite"):
        decode_load.figures(decode_load.closed_loop(engine, jobs(3), 1), 1.0, 1.0)
    monkeypatch.setattr(engine, "step", lambda: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        decode_load.closed_loop(engine, jobs(3, 3), 2)
    tiny_engine.assert_idle(engine)


# --- ratios ---------------------------------------------------------------------------------------


def test_all_ways_of_generating_are_compared_on_equal_text(tokenizer, monkeypatch, capsys):  # noqa: F811
    model, prompts = random_model(), [tiny_engine.prompt_of(4 + i) for i in range(16)]
    recomputed, recompute = [], bench_engine.recompute
    monkeypatch.setattr(bench_engine, "recompute", lambda model, prompt, *rest: (
        recomputed.append(len(prompt)), recompute(model, prompt, *rest))[1])
    found = bench_engine.compare(model, tokenizer, prompts, 4, 1)
    assert recomputed == [4, 12, 5, 13]  # another eighth every round, the warm-up's first
    assert found["equal"] == 1 and found["prompts"] == 16 and found["completion_tokens"] <= 16 * 4
    assert found["ratio_min"] <= found["ratio_median"] <= found["ratio_max"] and found["naive_ratio_median"] > 0
    assert "no cache" in capsys.readouterr().out
    monkeypatch.setattr(bench_engine, "recompute", lambda *args: [0])
    with pytest.raises(AssertionError, match="must say the same"):
        bench_engine.measure(model, tokenizer, prompts, SamplingParams(max_tokens=2, temperature=0.0))


def test_the_naive_way_stops_at_a_terminal_token_and_at_the_context():
    model = random_model()
    model.script = {7: 260}
    assert len(bench_engine.recompute(model, [1, 2, 3], 20, frozenset((260,)))) == 4
    assert len(bench_engine.recompute(model, [1] * 90, 20, frozenset())) == 6
