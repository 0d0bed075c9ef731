"""MuonAdamW against plain per-parameter arithmetic, compiled, and sharded over gloo ranks against one process."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels import KernelConfig, resolve
from kernels.newton_schulz import newton_schulz_eager
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW

CPU = torch.device("cpu")
KERNELS = resolve(KernelConfig.parse("auto"), CPU, torch.float32)
CONFIG = GPTConfig(sequence_len=16, vocab_size=101, n_layer=3, n_head=2, n_kv_head=1, n_embd=64)
STEPS = 3
FACTORS = [(1.0, 0.85), (0.7, 0.9), (0.2, 0.95)]  # (learning rate, momentum) of each step


def build(rank: int = 0, world_size: int = 1, **options) -> tuple[GPT, MuonAdamW]:
    model = GPT.build(CONFIG, KERNELS, torch.float32, CPU, seed=3)
    return model, MuonAdamW(model, KERNELS, weight_decay=0.1, rank=rank, world_size=world_size, **options)


def micro_batch(step: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(0, CONFIG.vocab_size, (2, 16), generator=generator)


def train(model: GPT, optimizer: MuonAdamW, n_micro: int, mine: list[int]) -> dict[str, torch.Tensor]:
    """Run STEPS updates of n_micro micro-batches, of which this rank computes `mine`."""
    torch.set_num_threads(1)
    for step, (lr, momentum) in enumerate(FACTORS):
        for index in mine:
            x = micro_batch(step, index)
            (model(x, x, reduction="sum") / (n_micro * x.numel())).backward()
        optimizer.step(lr, momentum)
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand() -> dict[str, torch.Tensor]:
    """The same updates with one plain loop over parameters."""
    model = GPT.build(CONFIG, KERNELS, torch.float32, CPU, seed=3)
    scale = (CONFIG.n_embd / 768) ** -0.5
    rates = {"transformer.wte.weight": 0.2 * scale, "lm_head.weight": 0.004 * scale}
    adam = torch.optim.AdamW([{"params": [model.get_parameter(n)], "lr": r} for n, r in rates.items()],
                             betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    buffers = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n not in rates}
    for step, (lr, momentum) in enumerate(FACTORS):
        for p in model.parameters():
            p.grad = None
        x = micro_batch(step, 0)
        model(x, x).backward()
        for group, rate in zip(adam.param_groups, rates.values(), strict=True):
            group["lr"] = rate * lr
        adam.step()
        with torch.no_grad():
            for name, buffer in buffers.items():
                p = model.get_parameter(name)
                buffer.copy_(momentum * buffer + (1 - momentum) * p.grad)
                update = momentum * buffer + (1 - momentum) * p.grad
                tall = update.size(0) > update.size(1)
                o = newton_schulz_eager((update.T if tall else update)[None])[0]
                rate = 0.02 * lr
                p.mul_(1 - rate * 0.1)
                p.sub_((o.T if tall else o) * rate * max(1.0, p.size(0) / p.size(1)) ** 0.5)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_steps_equal_plain_adamw_and_muon():
    ours, plain = train(*build(), n_micro=1, mine=[0]), by_hand()
    start = {n: p.detach() for n, p in GPT.build(CONFIG, KERNELS, torch.float32, CPU, seed=3).named_parameters()}
    for name, expected in plain.items():
        assert not torch.equal(expected, start[name]), name
        off = (ours[name] - expected).abs()
        # Adam divides a gradient by its own size: where that is rounding noise (1e-8 beside 3e-5), so is the step
        assert (off > 2e-5 + 1e-5 * expected.abs()).float().mean() < 5e-4 and off.max() < 1e-3, name


def test_polar_express_is_another_way_to_the_nearest_orthogonal_matrix():
    quintic, polar = (train(*build(orthogonalization=name), 1, [0]) for name in ("quintic", "polar-express"))
    start = {n: p.detach() for n, p in GPT.build(CONFIG, KERNELS, torch.float32, CPU, seed=3).named_parameters()}
    for name in quintic:
        if ".h." in name:
            a, b = ((end[name] - start[name]).flatten() for end in (quintic, polar))
            assert not torch.equal(a, b) and torch.cosine_similarity(a, b, dim=0) > 0.95, name


TINY = GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)


@pytest.mark.parametrize("text", ["eager", "newton_schulz=triton,muon_update=triton"])
def test_compiled_steps_equal_plain_ones_and_never_compile_again(text, monkeypatch):
    """Learning rates and momentum of FACTORS differ from step to step; whole graphs, one per shape."""
    kernels = resolve(KernelConfig.parse(text), CPU, torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    ends, counts = [], []
    for compiled in (False, True):
        model = GPT.build(TINY, kernels, torch.float32, CPU, seed=3)
        optimizer = MuonAdamW(model, kernels, weight_decay=0.1, compiled=compiled)
        for bank in optimizer.banks():
            bank.grad.normal_(generator=torch.Generator().manual_seed(len(bank.name)))
        for factors in FACTORS[:2]:
            optimizer.step(*factors)
            counts.append(len(graphs))
        ends.append([bank.data for bank in optimizer.banks()])
    shapes = len(optimizer.muon) + len(optimizer.adam) - 1  # wte and lm_head are alike
    assert counts == [0, 0, shapes, shapes]
    for plain, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


def test_phases_are_timed_when_asked_and_only_then():
    model, optimizer = build(timed=True)
    timed = train(model, optimizer, 1, [0])
    took = optimizer.timer.milliseconds()
    assert set(took) == {"reduce", "adamw", "momentum", "newton_schulz", "update", "gather"}
    assert took["newton_schulz"] > 0 and all(x >= 0 for x in took.values())
    model, plain = build()
    assert plain.timer is None
    assert all(torch.equal(timed[name], p) for name, p in train(model, plain, 1, [0]).items())


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_parameters_and_gradients_live_in_banks():
    model, optimizer = build()
    for p in model.parameters():
        bank = next(b for b in optimizer.banks() if storage(b.data) == storage(p))
        assert storage(p.grad) == storage(bank.grad)
    assert sum(b.data.numel() for b in optimizer.banks()) == model.num_params()
    groups = [sorted(b.name for b in group) for group in optimizer.muon]
    assert ["256x64", "64x256"] in groups  # c_fc and c_proj share one orthogonalization


def test_state_round_trip_continues_bit_equal_and_refuses_another_shape():
    model, optimizer = build()
    train(model, optimizer, 1, [0])
    other_model, other = build()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict({name: t.clone() for name, t in optimizer.state_dict().items()})
    for a, b in zip(train(model, optimizer, 1, [0]).values(), train(other_model, other, 1, [0]).values(), strict=True):
        assert torch.equal(a, b)
    state = optimizer.state_dict()
    state["wte.exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"optimizer state wte.exp_avg must have shape \(101, 64\), got \(3,\)"):
        other.load_state_dict(state)


def _rank(rank: int, world_size: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    model, optimizer = build(rank, world_size)
    results[rank] = train(model, optimizer, n_micro=world_size, mine=[rank])
    results[f"state {rank}"] = sum(t.numel() for t in optimizer.state.values())
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process_that_accumulates(world_size, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (world_size, str(tmp_path / "store"), results), nprocs=world_size)
        results = dict(results)
    alone_model, alone_optimizer = build()
    alone = train(alone_model, alone_optimizer, n_micro=world_size, mine=list(range(world_size)))
    for name, expected in alone.items():
        for rank in range(world_size):
            assert torch.equal(results[rank][name], results[0][name]), f"ranks differ in {name}"
        if world_size == 2:
            assert torch.equal(results[0][name], expected), name
        else:
            torch.testing.assert_close(results[0][name], expected, rtol=1e-5, atol=1e-6)
    full = sum(t.numel() for t in alone_optimizer.state.values())
    assert results["state 0"] < 0.7 * full  # a share of the state; 3 layers over 2 ranks are padded to 4
