"""The runner: padding, captured graphs, overlap, fp8 pages and batch invariance do not change what rows say."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from tiny_engine import (
    CONFIG,
    CPU,
    GREEDY,
    ScriptedGPT,
    assert_idle,
    assert_recomputed,
    prompt_of,
    random_model,
    tool_script,
)
from tiny_engine import make as make
from tiny_engine import model as model
from tiny_engine import one_thread as one_thread
from tiny_engine import tokenizer as tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kernels import KernelConfig, resolve
from nanochat.common import UserError
from nanochat.engine import Engine, SamplingParams, runner
from nanochat.engine.runner import buckets
from nanochat.gpt import GPT, PagedCache

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
PROMPTS = [prompt_of(length, seed=3) for length in (5, 16, 33, 20, 61, 2)]
PARAMS = [SamplingParams(max_tokens=12, temperature=1.0, top_k=40, seed=i) for i in range(6)]


def said(results):
    return [(c.ids, c.mask, c.finish_reason) for samples in results for c in samples]


# --- buckets and padding --------------------------------------------------------------------------


def test_buckets_end_at_the_largest_batch():
    assert buckets(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert [buckets(n) for n in (1, 3, 8, 9, 17)] == [[1], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9],
                                                      [1, 2, 4, 8, 16, 17]]


@pytest.mark.parametrize("options", [dict(), dict(n_pages=7, max_batch=5), dict(step_tokens=9, max_batch=3)])
def test_padded_decoding_says_the_same(make, options):
    plain, padded = make(**options), make(**options)
    padded.runner.padded = True
    expected = said(plain.generate(PROMPTS, PARAMS))
    padded.model.computed = []
    assert said(padded.generate(PROMPTS, PARAMS)) == expected
    sizes = set(padded.runner._steps)
    assert sizes <= set(buckets(padded.max_batch)) and sizes <= set(padded.model.computed)
    assert set(plain.runner._steps) - sizes or options  # 6 and 5 rows alone are no buckets of 64
    assert_idle(padded)


def test_padding_writes_no_page(make):
    engine = make(max_batch=4, n_pages=24)
    engine.runner.padded = True
    engine.submit(PROMPTS[0], GREEDY)
    engine.submit(PROMPTS[1], GREEDY)
    engine.submit(PROMPTS[2], GREEDY)
    for _ in range(3):
        engine.step()
    assert list(engine.runner._steps) == [4]
    live = sorted({page for row in engine.running for page in row.pages})
    free = [page for page in range(engine.pool.total) if page not in live]
    assert not any(pages[free].any() for pages in (*engine.cache.k, *engine.cache.v))
    engine.reset()


def test_only_changed_table_rows_are_written(make, monkeypatch):
    engine, copied = make(), []
    upload = runner.upload
    monkeypatch.setattr(runner, "upload", lambda host, device: (copied.append(len(host)), upload(host, device)))
    engine.generate([prompt_of(10, seed) for seed in range(5)], 
                    dataclasses.replace(GREEDY, max_tokens=20, ignore_eos=True))
    assert copied == [5, 5]  # at the start, and when all reach their second page; 20 steps


@pytest.mark.parametrize("options, dims", [(dict(), {2}), (dict(batch_invariant=True), {1, 2})])
def test_copied_pages_and_tiles_are_sent_without_waiting(make, monkeypatch, options, dims):
    engine, sent, placed = make(**options), set(), runner.placed
    monkeypatch.setattr(runner, "placed", lambda host, device: (sent.add(host.dim()), placed(host, device))[1])
    engine.generate(PROMPTS[:1], dataclasses.replace(GREEDY, n=3))
    assert sent == dims


def test_an_interrupt_while_tables_are_sent_leaves_no_old_page(make, monkeypatch):
    """The next row gets the same pages, so its row of the tables must not seem to be there."""
    engine, prompt = make(), prompt_of(37, 3)
    engine.generate([prompt_of(60, 9)], GREEDY)

    def interrupted(host, device):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "upload", interrupted)
        engine.generate([prompt], GREEDY)
    assert_recomputed(engine, engine.generate([prompt], GREEDY), [prompt], GREEDY)


# --- captured graphs ------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Notes every operation, as the capture of a stream does; what reads a number on the host is refused.

    On a CPU some of it is no operation at all, so the tensor's methods are refused too, but inside interpreted kernels.
    """

    READS = ("tolist", "cpu", "numpy", "item", "__array__")

    def __init__(self):
        super().__init__()
        self.calls, self.in_op = [], False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(op), "the host reads a number inside a captured step"
        self.in_op = True
        out = op(*args, **(kwargs or {}))
        self.in_op = False
        self.calls.append((op, args, kwargs or {}, out))
        return out

    @contextlib.contextmanager
    def capture(self):
        with pytest.MonkeyPatch.context() as patch, self:
            for name in self.READS:
                patch.setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))
            yield

    def _refusing(self, name, read):
        def refuse(*args, **kwargs):
            assert self.in_op, f"the host reads a number inside a captured step: {name}"
            return read(*args, **kwargs)
        return refuse


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph: a replay does the same operations on the same memory."""

    made: list["RecordedGraph"] = []

    def __init__(self):
        self.recorder, self.pool, self.replays = Recorder(), None, 0
        self.made.append(self)

    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.recorder.calls:
            for old, new in zip(tree_flatten(out)[0], tree_flatten(op(*args, **kwargs))[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def addresses(self):
        return {x.data_ptr() for _, args, _, _ in self.recorder.calls
                for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)}


@pytest.fixture
def recorded(monkeypatch):
    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"  # engines of other GPUs work in threads beside it
        graph.pool = pool
        with graph.recorder.capture():
            yield

    pools = iter("ABCDEF")
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(runner, "why_no_graphs", lambda device, kernels: None)
    return RecordedGraph.made


def triton_model():
    """The tiny model, without a script, with the kernels of the engine's ops in Triton's interpreter."""
    model = random_model(n_layer=1, n_head=1, n_embd=32)
    model.__class__ = GPT
    kernels = resolve(KernelConfig.parse("eager,paged_append=triton,paged_attention=triton,sample=triton"), CPU,
                      torch.float32)
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    return model


@interpreted
def test_graphs_are_captured_once_largest_first_in_one_pool_and_replayed(make, recorded):
    prompts = [PROMPTS[0], PROMPTS[5]]  # then top-k and top-p would be searched through in the interpreter
    params = [SamplingParams(max_tokens=4, seed=5), dataclasses.replace(GREEDY, max_tokens=3, n=2)]
    expected = said(make(model=random_model(n_layer=1, n_head=1, n_embd=32), graphs=False).generate(prompts, params))
    engine = make(model=triton_model(), max_batch=2, graphs=True)
    assert [len(graph.recorder.calls) > 20 for graph in recorded] == [True] * 2
    assert list(engine.runner._captured) == [2, 1] and {graph.pool for graph in recorded} == {"A"}
    held = [tensor for tensor in (*engine.model.state_dict().values(), *engine.cache.k, *engine.cache.v,
                                  engine.runner._tables)]
    before = [tensor.data_ptr() for tensor in held]
    assert set(before) - {engine.model.cos.data_ptr()} <= recorded[0].addresses() | {engine.model.sin.data_ptr()}
    assert said(engine.generate(prompts, params)) == expected
    engine.sync_weights({name: tensor.clone() for name, tensor in engine.model.state_dict().items()})
    assert said(engine.generate(prompts[1:], params[1:])) == expected[1:]
    assert [tensor.data_ptr() for tensor in held] == before and len(recorded) == 2
    assert sum(graph.replays for graph in recorded) > 2
    assert_idle(engine)


@pytest.mark.parametrize("read", [
    torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.sum, np.asarray])
def test_the_recorder_refuses_what_a_capture_would(recorded, read):
    x = torch.arange(3)
    with pytest.raises(AssertionError, match="the host reads a number"), runner.torch.cuda.graph(
            RecordedGraph(), pool="A", capture_error_mode="thread_local"):
        int(getattr(x, read.__name__)()) if hasattr(x, read.__name__) else read(x)
    assert x.tolist() == [0, 1, 2]


@interpreted
def test_a_model_that_reads_on_the_host_is_not_captured(make, recorded):
    model = triton_model()
    model.__class__ = ScriptedGPT
    with pytest.raises(AssertionError, match="the host reads a number inside a captured step: tolist"):
        make(model=model, max_batch=1, graphs=True)


def test_pages_too_large_beside_the_graphs_are_a_sentence(make, recorded, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make(max_batch=2, graphs=False)
    engine.release_kv()
    monkeypatch.setattr(runner.Runner, "_capture_all", full)
    engine.runner.graphs = True
    with pytest.raises(UserError, match="12 pages of 16 tokens for a batch of 2 must fit the memory of cpu"):
        engine.restore_kv()
    assert engine.cache is None
    engine.runner.graphs = False
    engine.restore_kv()
    assert_recomputed(engine, engine.generate(PROMPTS[:1], GREEDY), PROMPTS[:1], GREEDY)


@interpreted
def test_new_weights_reach_a_captured_graph(make, recorded):
    engine = make(model=triton_model(), max_batch=1, graphs=True)
    params = dataclasses.replace(GREEDY, max_tokens=4)
    first = engine.generate(PROMPTS[:1], params)
    engine.sync_weights({name: tensor * 1.5 for name, tensor in engine.model.state_dict().items()})
    second = engine.generate(PROMPTS[:1], params)
    assert recorded[0].replays > 1 and said(first) != said(second)
    assert_recomputed(engine, second, PROMPTS[:1], params)


@interpreted
def test_pages_given_back_and_taken_again_are_captured_anew(make, recorded):
    engine = make(model=triton_model(), max_batch=1, graphs=True)
    params = dataclasses.replace(GREEDY, max_tokens=3)
    first = engine.generate(PROMPTS[:1], params)
    engine.release_kv()
    assert engine.cache is None and not engine.runner._captured
    with pytest.raises(UserError, match="restore_kv"):
        engine.submit(PROMPTS[0], params)
    engine.restore_kv()
    assert said(engine.generate(PROMPTS[:1], params)) == said(first) and len(recorded) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there graphs can be had")
def test_what_cannot_be_here_is_a_sentence(make):
    for options, sentence in [(dict(graphs=True), "graphs cannot be had: CUDA graphs need a CUDA GPU, this is cpu"),
                              (dict(compiled=True), "a compiled step cannot be had: paged_append=eager reads lengths "
                                                    "on the host; take --kernels triton"),
                              (dict(kv_dtype="int4"), "kv_dtype must be one of auto, fp8, got 'int4'")]:
        with pytest.raises(UserError) as error:
            make(**options)
        assert str(error.value) == sentence
    assert not make().runner.graphs


def test_fp8_pages_on_an_older_gpu_are_refused(make, monkeypatch):
    monkeypatch.setattr(runner, "sm", lambda device: 80)
    with pytest.raises(UserError, match="kv_dtype fp8 needs a GPU of sm89 or later, this is sm80"):
        make(kv_dtype="fp8", graphs=False)


@interpreted
@pytest.mark.slow
def test_a_compiled_step_says_the_same(make, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, backend="aot_eager", **options))
    torch._dynamo.reset()
    params = dataclasses.replace(GREEDY, max_tokens=4)
    expected = make(model=triton_model(), max_batch=3).generate(PROMPTS[:3], params)
    engine = make(model=triton_model(), max_batch=3, compiled=True)
    assert said(engine.generate(PROMPTS[:3], params)) == said(expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert said(engine.generate(PROMPTS[:3], params)) == said(expected)


def test_every_engine_of_a_process_makes_room_for_its_compiled_shapes(make, monkeypatch):
    """Dynamo counts the shapes of one function over all engines; with 8 for all of them the ninth is refused."""
    monkeypatch.setattr(runner, "_reads_lengths", lambda kernels: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    limits = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        for max_batch in (8, 3, 64):
            make(max_batch=max_batch, compiled=True)
        grown = sum(len(buckets(n)) for n in (8, 3, 64))
        assert [getattr(torch._dynamo.config, name) for name in limits] == [8 + grown, 256 + grown]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [dict(), dict(overlap=True), dict(compiled=True), dict(batch_invariant=True)])
def test_graphs_on_a_gpu_say_what_eager_says(tokenizer, options):
    """The same steps in the same shapes, so equal tokens; and the likeliest ones of the dense forward, but for ties."""
    device = torch.device("cuda")
    model = random_model(n_embd=256)
    model.__class__ = GPT  # a script is looked up on the host
    kernels = resolve(KernelConfig.parse("auto"), device, torch.float32, model.config.shapes())
    model = model.to(device)
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    plain, captured = (Engine(model, tokenizer, max_batch=6, graphs=graphs, **own)
                       for graphs, own in ((False, options), (True, options)))
    plain.runner.padded = True
    assert captured.runner._captured and not plain.runner._captured
    assert said(captured.generate(PROMPTS, PARAMS)) == said(plain.generate(PROMPTS, PARAMS))
    for prompt, (answer,) in zip(PROMPTS, captured.generate(PROMPTS, dataclasses.replace(GREEDY, max_tokens=12)),
                                 strict=True):
        assert_nearly_likeliest(model, prompt, answer)
    assert_idle(captured)


def assert_nearly_likeliest(model, prompt, answer, tolerance=0.05):
    """Every token drawn has a logit of the dense forward within `tolerance` of the largest."""
    ids = torch.tensor([*prompt, *answer.ids], device=model.device)
    with torch.inference_mode():
        logits = model(ids[None, :-1])[0, len(prompt) - 1:].float()
    short = logits.amax(dim=-1) - logits.gather(1, ids[len(prompt):, None])[:, 0]
    assert not short[torch.tensor(answer.mask, device=model.device) > 0].gt(tolerance).any()


# --- overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(n_pages=7, max_batch=5), dict(page_size=4, max_batch=2),
                                     dict(step_tokens=9, max_batch=3)])
def test_overlap_says_the_same(make, options):
    params = [dataclasses.replace(p, n=n, max_tokens=t)
              for p, n, t in zip(PARAMS, (1, 3, 1, 2, 1, 1), (12, 1, 30, 9, 50, 2), strict=True)]
    expected = make(**options).generate(PROMPTS, params)
    engine = make(overlap=True, **options)
    results = engine.generate(PROMPTS, params)
    assert said(results) == said(expected)
    assert [c.logprobs for r in results for c in r] == [pytest.approx(c.logprobs, abs=1e-4)
                                                        for r in expected for c in r]
    assert_idle(engine)


def test_with_overlap_a_step_is_launched_before_the_last_one_is_read(make):
    engine = make(overlap=True)
    request = engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    assert len(request.rows[0].tokens) == 5 and engine.stats()["steps"] == 1
    engine.step()
    assert len(request.rows[0].tokens) == 6 and request.rows[0].computed == 6
    while not request.done:
        engine.step()
    assert_recomputed(engine, [request.completions()], [request.prompt], GREEDY)


def test_with_overlap_forced_tokens_replace_the_draw_on_its_way(make):
    engine = make(overlap=True)
    engine.model.script = tool_script(engine.tokenizer, 20, "37+85")
    prompts = [prompt_of(length) for length in (9, 17, 23, 40)]
    params = dataclasses.replace(GREEDY, max_tokens=30)
    results = engine.generate(prompts, params)
    assert_recomputed(engine, results, prompts, params)
    assert [("37+85", "122")] in [c.tool_calls for (c,) in results]
    assert_idle(engine)


# --- fp8 pages ------------------------------------------------------------------------------------


def test_fp8_pages_take_half_the_bytes_of_bfloat16():
    config = dataclasses.replace(CONFIG, n_layer=1, n_head=1, n_embd=128)
    sizes = [sum(x.nbytes for layer in PagedCache.allocate(config, 4, 16, torch.bfloat16, CPU, fp8).layers
                 for x in layer if x is not None) for fp8 in (False, True)]
    assert sizes == [4 * 16 * 2 * 256, 4 * 16 * (2 * 128 + 4)]


def logits_of(engine, prompts, params):
    """Return {(prompt, seed, position): logits} of every draw."""
    found, draw = {}, engine.runner._draw

    def noted(logits, how):
        for own, seed, position in zip(logits, how[4].tolist(), how[5].tolist(), strict=True):
            if position:
                found[seed, position] = own.clone()
        return draw(logits, how)

    engine.runner._draw = noted
    engine.generate(prompts, params)
    return found


def test_fp8_pages_keep_30_db_of_the_logits(make):
    params = [dataclasses.replace(p, max_tokens=1) for p in PARAMS]  # later tokens may differ
    exact, fp8 = (logits_of(make(kv_dtype=kv), PROMPTS, params) for kv in ("auto", "fp8"))
    assert exact.keys() == fp8.keys() and len(exact) == 6
    exact, fp8 = (torch.stack(list(found.values())) for found in (exact, fp8))
    ratio = exact.square().sum() / (exact - fp8).square().sum()
    assert 30 < 10 * ratio.log10() < 60


@pytest.mark.parametrize("options", [dict(), dict(n_pages=7, max_batch=5), dict(page_size=4, max_batch=1)])
def test_fp8_rows_share_fork_and_recompute_their_scales_too(make, options):
    params = [dataclasses.replace(p, n=n) for p, n in zip(PARAMS, (1, 3, 1, 2, 1, 1), strict=True)]
    plain, engine = make(kv_dtype="fp8", prefix_cache=False), make(kv_dtype="fp8", **options)
    assert said(engine.generate(PROMPTS, params)) == said(plain.generate(PROMPTS, params))
    assert {pages.dtype for pages in (*engine.cache.k, *engine.cache.v)} == {torch.uint8}
    assert_idle(engine)


def test_nan_in_fp8_pages_ends_its_own_request(make):
    engine = make(kv_dtype="fp8", max_batch=3)
    poison = engine.tokenizer.special_id("<|user_end|>")
    with torch.no_grad():
        engine.model.transformer["wte"].weight[poison] = float("nan")
    bad, good = engine.generate([[poison, *prompt_of(20)], PROMPTS[0]], dataclasses.replace(GREEDY, max_tokens=4))
    assert bad[0].finish_reason == "error" and good[0].finish_reason == "length"


# --- batch invariance -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_batch_invariant_logits_are_equal_to_the_last_bit(make, dtype):
    model = random_model(dtype)
    prompts = [prompt_of(9, seed) for seed in range(5)]
    params = [dataclasses.replace(p, n=n, max_tokens=30) for p, n in zip(PARAMS, (1, 2, 1, 1, 1), strict=False)]

    def logits(invariant, **options):
        engine = make(model=model, batch_invariant=invariant, **options)
        return logits_of(engine, prompts, params), engine.stats()["preemptions"]

    together, _ = logits(True)
    alone, _ = logits(True, max_batch=1, prefix_cache=False)
    chunked, preemptions = logits(True, n_pages=6, step_tokens=7, max_batch=6)
    assert preemptions > 0 and len(together) > 100
    for other in (alone, chunked):
        assert other.keys() == together.keys() and all(torch.equal(other[key], together[key]) for key in together)
    ordinary = [logits(False)[0], logits(False, max_batch=1, prefix_cache=False)[0]]
    assert not all(torch.equal(ordinary[0][key], ordinary[1][key]) for key in ordinary[0].keys() & ordinary[1].keys())


def test_batch_invariant_forwards_have_one_shape(make):
    engine = make(batch_invariant=True, overlap=True)
    results = engine.generate(PROMPTS, PARAMS)
    assert set(engine.model.computed) == {runner.INVARIANT_TOKENS}
    assert_recomputed(engine, results, PROMPTS, PARAMS)
