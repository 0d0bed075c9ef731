"""The training-step bench on the CPU, for real, with a model of one layer."""

import json
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import bench_train, results
from bench.bench_train import Contender, Workload
from nanochat.common import UserError
from nanochat.gpt import GPTConfig

CPU = torch.device("cpu")
TINY = ["--depth", "2", "--tokens", "128", "--micro-batch", "1", "--sequence-len", "64", "--vocab-size", "64",
        "--device", "cpu", "--no-compile"]


def tiny_work() -> Workload:
    return Workload(GPTConfig.from_depth(2, 64, 64), 128, 1, CPU, torch.float32)


def test_a_run_writes_a_row_per_set_with_what_it_ran_on(tmp_path, capsys):
    path = tmp_path / "rows.json"
    bench_train.main(bench_train.parse_args([*TINY, "--sets", "eager", "compile", "--rounds", "2", "--steps", "1",
                                             "--rows", str(path)]))
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["train/d2/eager", "train/d2/compile"]
    for row in rows.values():
        assert row["steps"] == 2 and row["tokens_per_step"] == 128 and row["micro_batch"] == 1
        assert row["tokens_per_s"] == pytest.approx(128 / row["median_s"])
        assert row["mfu"] is row["mfu_causal"] is row["peak_bytes"] is None  # a CPU has no peak to compare with
        assert set(row["ms"]) == {"forward", "backward", "optimizer"} and min(row["ms"].values()) > 0
        assert row["kernels"]["attention"] == "sdpa" and row["gpu"] == "CPU" and not row["compiled"]
        assert {"adamw", "momentum", "newton_schulz", "update"} < set(row["optimizer_ms"])
        for part in ("model", "optimizer"):
            assert row["kernel_ms"][part]["matrix products"] > 0
        assert "attention" in row["kernel_ms"]["model"] and "attention" not in row["kernel_ms"]["optimizer"]
    assert rows["train/d2/compile"]["vs_compile"]["median"] == 1
    said = capsys.readouterr().out
    assert "round 2 of 2: eager" in said and "MFU n/a nanochat's count, n/a causal" in said


def test_sets_share_weights_gradients_and_state_and_compute_the_same():
    work = tiny_work()
    first, second = (Contender(name, work, "eager", False) for name in "ab")
    own = dict(work.model.named_parameters())
    for contender in (first, second):
        assert all(p is own[name] for name, p in contender.model.named_parameters())
    x, y = work.tokens[:, :-1], work.tokens[:, 1:]
    loss = work.model(x, y)
    assert torch.equal(first.model(x, y), loss) and loss.item() != pytest.approx(4.1589, abs=1e-3)  # no zero logits
    before = own["lm_head.weight"].clone()
    second.step()
    assert not torch.equal(own["lm_head.weight"], before)
    assert second.optimizer.state["lm_head.exp_avg"] is work.optimizer.state["lm_head.exp_avg"]
    assert not any(bank.grad.any() for bank in work.optimizer.banks())
    assert torch.equal(first.model(x, y), second.model(x, y)) and not torch.equal(first.model(x, y), loss)


def test_a_step_of_micro_batches_has_the_gradient_of_the_whole_batch():
    work, quiet = tiny_work(), lambda name: None
    contender = Contender("a", work, "eager", False)
    contender.forward_backward(quiet)
    summed = work.optimizer.banks()[0].grad.clone()
    work.optimizer.zero_grad()
    contender.micro_batch = 2
    contender.forward_backward(quiet)
    torch.testing.assert_close(work.optimizer.banks()[0].grad, summed, rtol=1e-4, atol=1e-7)


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_last_row_is_an_error(monkeypatch):
    work = Workload(GPTConfig.from_depth(2, 64, 64), 256, 4, CPU, torch.float32)
    contender = Contender("a", work, "eager", False)
    forward = contender.forward

    def small(x, y, reduction):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, y, reduction=reduction)

    contender.forward = small
    contender.warm()
    assert contender.micro_batch == 1 and contender.seconds == [] and not contender.parts
    contender.forward = lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    with pytest.raises(UserError, match="a: one row does not fit the memory"):
        contender.warm()


def test_mfu_comes_in_both_conventions(monkeypatch):
    monkeypatch.setattr(bench_train, "peak", lambda device, what: 1e9)
    work = tiny_work()
    contender = Contender("a", work, "eager", False)
    contender.seconds, contender.parts = [0.5, 0.5, 0.75], {"forward": [100.0, 200.0, 300.0]}
    row = bench_train.train_row(contender, [contender], 3)
    assert row["mfu"] == pytest.approx(100 * work.model.estimate_flops() * 256 / 1e9)
    assert row["mfu_causal"] == pytest.approx(100 * work.model.estimate_flops(causal=True) * 256 / 1e9)
    assert row["mfu_causal"] < row["mfu"] and row["vs_compile"] is None and row["ms"] == {"forward": 200.0}
    assert "% nanochat's count" in bench_train.describe(row)


def test_ratios_are_paired_round_by_round():
    base, own = [1.0, 1.1, 1.2, 4.0, 4.4, 4.8], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert bench_train.paired_ratio(base, own, 3) == {
        "median": pytest.approx(statistics.median([1.1, 2.2])), "least": pytest.approx(1.1), "most": pytest.approx(2.2)}


def test_rounds_interleave_the_sets_and_store_after_each():
    ran, stored = [], []
    work = tiny_work()
    contenders = [Contender(name, work, "eager", False) for name in "ab"]
    for contender in contenders:
        contender.step = lambda c=contender: (ran.append(c.name), c.seconds.append(1.0), c.parts["forward"].append(1.0))
    bench_train.take_turns(contenders, 2, 2, lambda rows: stored.append([row["steps"] for row in rows]))
    assert ran == list("aabbaabb") and stored == [[2, 2], [4, 4]]


def test_a_set_that_breaks_is_left_out_and_fails_the_run_after_the_others_are_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_train.SETS, "triton", ("eager,attention=eager", False))
    build = bench_train.Contender

    def breaks(name, *args):
        if name == "triton":
            raise RuntimeError("ptxas died")
        return build(name, *args)

    monkeypatch.setattr(bench_train, "Contender", breaks)
    path = tmp_path / "rows.json"
    with pytest.raises(UserError, match="triton was left out"):
        bench_train.main(bench_train.parse_args([*TINY, "--sets", "triton", "eager", "--rounds", "1", "--steps", "1",
                                                 "--rows", str(path)]))
    found = results.load(path)
    assert list(found["rows"]) == ["train/d2/eager"]
    assert found["notes"] == ["d2 triton was left out: RuntimeError: ptxas died"]


def test_a_compiled_set_says_how_often_its_graph_breaks(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled.append((fn, options)) or fn)
    work = tiny_work()
    contender = Contender("a", work, "eager", True)
    assert compiled[-1] == (contender.model, {"dynamic": False})
    torch._dynamo.utils.counters["graph_break"]["print"] = 3
    contender.warm()
    contender.step()
    assert bench_train.train_row(contender, [contender], 1)["graph_breaks"] == 3


def test_best_is_what_the_given_results_found_fastest(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.registry.BEST_TABLE", bench_train.registry.BEST_TABLE)  # put back afterwards
    path = tmp_path / "rows.json"
    rows = results.Results(path, {"gpu": "cpu"})
    for provider, seconds in (("eager", 1.0), ("sdpa", 2.0)):
        rows.add({"key": f"kernel/attention/{provider}/d20/forward", "op": "attention", "provider": provider,
                  "case": "d20", "passes": "forward", "median_s": seconds, "mad_s": 0.0})
    bench_train.use_best_of(path, CPU)
    work = tiny_work()
    assert Contender("best", work, "best", False).kernels.names["attention"] == "eager"


def test_device_kernels_are_counted_once_and_annotated_ranges_not_at_all(monkeypatch):
    events = [("_rms_norm_fwd_kernel", "CUDA", False, 3000.0), ("nvjet_128x256", "CUDA", False, 5000.0),
              ("## Call CompiledFxGraph ##", "CUDA", True, 9000.0), ("aten::mm", "CPU", False, 7000.0)]
    averages = [SimpleNamespace(key=key, device_type=getattr(torch.autograd.DeviceType, kind), is_user_annotation=user,
                                self_device_time_total=us, self_cpu_time_total=1.0) for key, kind, user, us in events]
    ran = []
    monkeypatch.setattr(bench_train, "profile",
                        lambda activities: nullcontext(SimpleNamespace(key_averages=lambda: averages)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("waited"))
    groups = bench_train.kernel_groups(lambda: ran.append("ran"), torch.device("cuda"))
    assert groups == {"matrix products": 5.0, "rms_norm": 3.0} and ran == ["ran", "waited"]


@pytest.mark.parametrize("kernel, group", [
    ("_rms_norm_fwd_kernel", "rms_norm"),
    ("flash_fwd_splitkv_kernel", "attention"), ("nvjet_hsh_128x256_64x4_2x1", "matrix products"),
    ("aten::bmm", "matrix products"), ("Memcpy DtoD", "copies and fills"), ("triton_poi_fused_add_3",
                                                                            "fused by inductor"),
    ("at::native::vectorized_elementwise_kernel", "other"),
])
def test_kernels_are_grouped_by_the_op_they_belong_to(kernel, group):
    assert bench_train._group(kernel, bench_train.our_kernels()) == group
