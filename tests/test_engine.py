"""The engine against full recomputation, token by token; and that no page is lost, whatever happens to a request."""

import dataclasses
import random

import pytest
import torch
from tiny_engine import (
    CONFIG,
    GREEDY,
    assert_idle,
    assert_recomputed,
    prompt_of,
    random_model,
    recomputed,
    tool_script,
)
from tiny_engine import make as make
from tiny_engine import model as model
from tiny_engine import one_thread as one_thread
from tiny_engine import tokenizer as tokenizer

import nanochat.engine.engine
from nanochat.common import UserError
from nanochat.engine import SamplingParams
from nanochat.engine.request import row_seed
from nanochat.gpt import PagedCache

LENGTHS = (1, 2, 14, 15, 16, 17, 31, 32, 33, 50, 80, 95, 96)  # page of 16 -1, 0, +1; context -1, 0


def as_tuples(results):
    return [(c.ids, c.mask, c.finish_reason) for samples in results for c in samples]


# --- equal to full recomputation ------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy_answers(tokenizer):
    """Every token of these from a forward of its own over all that went before."""
    return [recomputed(random_model(), tokenizer, prompt_of(length), GREEDY) for length in LENGTHS]


@pytest.mark.parametrize("options", [dict(), dict(max_batch=1), dict(max_batch=4), dict(page_size=1),
                                     dict(page_size=7, max_batch=5), dict(page_size=256), dict(n_pages=7),
                                     dict(step_tokens=8, max_batch=3), dict(step_tokens=1, max_batch=1),
                                     dict(prefix_cache=False)])
def test_greedy_tokens_equal_full_recomputation(make, greedy_answers, options):
    engine = make(**options)
    assert as_tuples(engine.generate([prompt_of(length) for length in LENGTHS], GREEDY)) == greedy_answers
    assert_idle(engine)


def test_sampled_tokens_equal_full_recomputation(make):
    engine = make(max_batch=6)
    prompts = [prompt_of(length) for length in (3, 16, 17, 40, 90)]
    params = [SamplingParams(max_tokens=12, temperature=t, top_k=k, seed=i, n=n) for i, (t, k, n) in
              enumerate([(1.0, None, 3), (0.7, 5, 4), (1.5, 1, 2), (0.0, 9, 2), (1.0, 300, 1)])]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert_idle(engine)


def test_other_shapes_equal_full_recomputation(make):
    engine = make(model=random_model(sequence_len=600, n_kv_head=2, window_pattern="SL"), max_batch=2)
    prompts = [prompt_of(300), prompt_of(159), prompt_of(5)]  # the short window of 256 cuts into the first
    assert_recomputed(engine, engine.generate(prompts, GREEDY), prompts, GREEDY)


def test_bfloat16_keeps_pages_in_bfloat16(make):
    engine = make(model=random_model(torch.bfloat16))
    (completion,), = engine.generate([prompt_of(20)], GREEDY)
    assert len(completion.ids) > 0 and {p.dtype for p in (*engine.cache.k, *engine.cache.v)} == {torch.bfloat16}


# --- the tool -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(20, 27))  # of the 6 tokens computed at once the last, ..., none is on page 1
def test_forced_output_crosses_page_boundaries(make, start):
    engine = make()
    engine.model.script = tool_script(engine.tokenizer, start, "37+85")
    prompts = [prompt_of(length) for length in (9, 17, 23, 40)]  # 23: mostly inside the call, 40: behind it
    params = dataclasses.replace(GREEDY, max_tokens=30)
    results = engine.generate(prompts, params)
    assert_recomputed(engine, results, prompts, params)
    called = [c.tool_calls for (c,) in results]
    assert [("37+85", "122")] in called and [] in called
    assert_idle(engine)


def test_forced_tokens_are_marked_and_hidden(make):
    engine = make()
    tokenizer = engine.tokenizer
    engine.model.script = tool_script(tokenizer, 12, "37+85") | dict(enumerate(tokenizer.encode("It is "), 6))
    engine.model.script |= dict(enumerate([*tokenizer.encode("122."), tokenizer.special_id("<|assistant_end|>")], 24))
    (completion,), = engine.generate([prompt_of(6)], GREEDY)
    assert completion.finish_reason == "stop" and completion.text == "It is 122."
    assert tokenizer.decode(completion.ids) == (
        "It is <|python_start|>37+85<|python_end|><|output_start|>122<|output_end|>122.")
    assert completion.mask == [1] * 13 + [0] * 5 + [1] * 4
    assert len(completion.logprobs) == len(completion.ids)
    assert all((lp == 0.0) == (m == 0) for lp, m in zip(completion.logprobs, completion.mask, strict=True)
               if m == 0 or lp < -1e-30)
    assert all(lp <= 0 for lp in completion.logprobs)


def test_forced_output_is_one_prefill_chunk(make):
    engine = make()
    engine.model.script = tool_script(engine.tokenizer, 12, "2*3000000")
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(GREEDY, max_tokens=30))
    assert sum(1 - m for m in completion.mask) == 9
    assert engine.stats()["steps"] == sum(completion.mask)
    assert sorted(engine.model.computed)[-2:] == [10, 10]  # the prompt; python_end and 9 forced tokens


def test_a_refused_expression_forces_nothing(make):
    engine = make()
    engine.model.script = tool_script(engine.tokenizer, 12, "37+eval")
    (completion,), = engine.generate([prompt_of(10)], GREEDY)
    assert completion.tool_calls == [("37+eval", None)] and 0 not in completion.mask
    assert_recomputed(engine, [[completion]], [prompt_of(10)], GREEDY)


def test_each_call_has_its_own_expression(make):
    engine = make()
    engine.model.script = tool_script(engine.tokenizer, 6, "37+85") | tool_script(engine.tokenizer, 18, "2*3")
    (completion,), = engine.generate([prompt_of(6)], GREEDY)
    assert completion.tool_calls == [("37+85", "122"), ("2*3", "6")]
    assert_recomputed(engine, [[completion]], [prompt_of(6)], GREEDY)


def test_tools_off_forces_nothing_and_hides_the_span(make):
    engine = make(tools="off")
    engine.model.script = tool_script(engine.tokenizer, 6, "37+85")
    (completion,), = engine.generate([prompt_of(6)], dataclasses.replace(GREEDY, max_tokens=7))
    assert completion.tool_calls == [] and completion.mask == [1] * 7 and completion.text == ""
    assert engine.tokenizer.decode(completion.ids) == "<|python_start|>37+85<|python_end|>"


@pytest.mark.parametrize("prompt_len, max_tokens, reason", [(6, 9, "length"), (85, 50, "context")])
def test_forced_output_ends_at_the_limit(make, prompt_len, max_tokens, reason):
    engine = make()
    engine.model.script = tool_script(engine.tokenizer, prompt_len, "37+85")
    (completion,), = engine.generate([prompt_of(prompt_len)], dataclasses.replace(GREEDY, max_tokens=max_tokens))
    said = min(max_tokens, CONFIG.sequence_len - prompt_len)
    assert completion.mask == [1] * 7 + [0] * (said - 7) and completion.finish_reason == reason
    assert_idle(engine)


# --- seeds and samples ----------------------------------------------------------------------------


def test_a_text_does_not_depend_on_the_batch(make):
    prompts = [prompt_of(length, seed=3) for length in (5, 16, 33, 20, 61, 2)]
    params = [SamplingParams(max_tokens=15, temperature=1.0, top_k=40, seed=i) for i in range(6)]
    together = make().generate(prompts, params)
    alone = [make(max_batch=1).generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    backwards = make(max_batch=3).generate(prompts[::-1], params[::-1])[::-1]
    assert as_tuples(together) == as_tuples(alone) == as_tuples(backwards)
    assert as_tuples(together) != as_tuples(make().generate(prompts, [dataclasses.replace(p, seed=9) for p in params]))


def test_samples_differ_and_do_not_depend_on_how_many_there_are(make):
    few, many = (make().generate([prompt_of(20)], SamplingParams(max_tokens=10, n=n, seed=4))[0] for n in (3, 9))
    assert as_tuples([many[:3]]) == as_tuples([few])
    assert len({tuple(c.ids) for c in many}) == 9


def test_sample_seeds_do_not_collide_between_neighbours():
    seeds = {row_seed(seed, sample) for seed in range(100) for sample in range(100)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("length, pages", [(31, 1 + 8), (32, 2 + 8), (33, 2 + 8)])
def test_samples_share_the_prompts_pages_and_its_one_prefill(make, length, pages):
    engine = make()
    engine.generate([prompt_of(length)], SamplingParams(max_tokens=2, n=8))
    assert engine.model.computed[0] == length and max(engine.model.computed[1:]) <= 8
    assert engine.stats()["pages_peak"] == pages  # full pages once, and one each to write in


@pytest.mark.parametrize("max_batch", [1, 2, 7])
def test_more_samples_than_rows(make, max_batch):
    engine, params = make(max_batch=max_batch), SamplingParams(max_tokens=6, n=12)
    prompts = [prompt_of(17), prompt_of(30)]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert_idle(engine)


# --- joining and leaving --------------------------------------------------------------------------


def test_rows_join_and_leave_a_pool_that_holds_few(make):
    engine = make(n_pages=6, max_batch=8)  # 96 tokens
    prompts = [prompt_of(length) for length in (1, 40, 16, 60, 3, 31, 72, 8, 17)]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (24, 5, 12, 20, 1, 24, 9, 24, 15)]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert engine.stats()["pages_peak"] <= 6
    assert_idle(engine)


def test_a_row_joins_while_another_decodes(make):
    engine = make()
    first = engine.submit(prompt_of(10), GREEDY)
    for _ in range(4):
        engine.step()
    second = engine.submit(prompt_of(33), GREEDY)
    engine.step()
    assert engine.model.computed == [10, 1, 1, 1, 34]
    while not (first.done and second.done):
        engine.step()
    assert_recomputed(engine, [first.completions(), second.completions()], [first.prompt, second.prompt], GREEDY)


@pytest.mark.parametrize("length", [16, 17])
def test_samples_of_many_prompts_fit_the_smallest_pool(make, length):
    """Waiting samples hold their prompt's pages: were two prompts let in together, none could ever go on."""
    params = SamplingParams(max_tokens=20, n=4)
    engine = make(n_pages=3 if length == 16 else 4)
    prompts = [prompt_of(length, seed) for seed in range(4)]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert_idle(engine)


def test_samples_of_two_prompts_do_not_starve_each_other(make):
    engine = make(n_pages=9)
    params = [SamplingParams(max_tokens=n, n=3) for n in (1, 32, 3, 40, 2)]
    prompts = [prompt_of(length) for length in (44, 44, 40, 60, 33)]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert_idle(engine)


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["<|assistant_end|>", "<|bos|>"])
def test_a_terminal_token_stops_and_is_not_returned(make, name):
    engine = make()
    engine.model.script = {25: engine.tokenizer.special_id(name)}
    (completion,), = engine.generate([prompt_of(20)], GREEDY)
    assert completion.finish_reason == "stop" and len(completion.ids) == 5
    assert completion.stopped_by == engine.tokenizer.special_id(name)
    assert len(completion.mask) == len(completion.logprobs) == 5


@pytest.mark.parametrize("prompt_len, max_tokens, n_ids, reason", [
    (10, 4, 4, "length"), (10, 0, 0, "length"), (90, 20, 6, "context"), (96, 20, 0, "context"), (90, 6, 6, "length"),
])
def test_length_and_context_end_a_row(make, prompt_len, max_tokens, n_ids, reason):
    engine = make()
    (completion,), = engine.generate([prompt_of(prompt_len)], SamplingParams(max_tokens=max_tokens))
    assert (len(completion.ids), completion.finish_reason) == (n_ids, reason)
    assert_idle(engine)


def test_abort_at_any_state_returns_the_pages_and_disturbs_nobody(make):
    engine = make(max_batch=4)
    kept = [engine.submit(prompt_of(length), GREEDY) for length in (5, 30)]
    requests = [engine.submit(prompt_of(17, seed), SamplingParams(max_tokens=9, n=4)) for seed in range(3)]
    engine.abort(requests[2])  # not yet started
    for _ in range(3):
        engine.step()
    assert any(row in engine.waiting and row.pages for row in requests[0].rows)  # samples that hold shared pages
    engine.abort(requests[0])
    engine.abort(requests[0])
    engine.check()
    while not all(request.done for request in (*kept, requests[1])):
        engine.step()
    assert {c.finish_reason for c in requests[2].completions()} == {"abort"}
    assert {"abort"} <= {c.finish_reason for c in requests[0].completions()} <= {"abort", "stop"}
    assert_recomputed(engine, [r.completions() for r in kept], [r.prompt for r in kept], GREEDY)
    assert_recomputed(engine, [requests[1].completions()], [requests[1].prompt], requests[1].params)
    assert_idle(engine)


@pytest.mark.parametrize("where, calls", [("forward_paged", 1), ("forward_paged", 2), ("_draw", 2), ("accept", 1),
                                          ("accept", 6)])
def test_an_exception_inside_a_step_returns_every_page(make, monkeypatch, where, calls):
    engine = make()
    owner = {"forward_paged": engine.model, "_draw": engine.runner, "accept": nanochat.engine.engine.Row}[where]
    whole, seen = getattr(owner, where), []

    def fails_later(*args):
        seen.append(args)
        if len(seen) > calls:
            raise torch.OutOfMemoryError("no memory")
        return whole(*args)

    monkeypatch.setattr(owner, where, fails_later)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([prompt_of(20), prompt_of(3)], SamplingParams(n=3, max_tokens=4))
    assert_idle(engine)


def test_fewer_params_than_prompts_start_nothing(make):
    engine = make()
    with pytest.raises(UserError) as error:
        engine.generate([prompt_of(20), prompt_of(3)], [GREEDY])
    assert str(error.value) == "params must be one for all prompts or one for each, got 1 for 2 prompts"
    assert_idle(engine)


def test_a_cache_larger_than_the_memory_is_a_sentence(make, monkeypatch):
    def allocate(*args):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(PagedCache, "allocate", allocate)
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == ("384 pages of 16 tokens for a batch of 64 must fit the memory of cpu, they do not: "
                                "take a smaller batch")


def test_nan_ends_its_own_request_and_leaves_nothing_behind(make):
    engine = make(n_pages=6, max_batch=3)
    poison = engine.tokenizer.special_id("<|user_end|>")
    with torch.no_grad():
        engine.model.transformer["wte"].weight[poison] = float("nan")
    prompts = [prompt_of(18), [poison, *prompt_of(59)], prompt_of(30), prompt_of(33), prompt_of(6)]
    params = [dataclasses.replace(GREEDY, max_tokens=12, n=n) for n in (1, 2, 1, 1, 1)]
    requests = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    while not requests[1].done:
        engine.step()
    assert any(pages.isnan().any() for pages in engine.cache.k)  # that the others take now
    assert not requests[2].done and not requests[3].done
    while not all(request.done for request in requests):
        engine.step()
    results = [request.completions() for request in requests]
    for completion in results.pop(1):
        assert completion.finish_reason == "error" and completion.ids == []
        assert completion.error == ("logits must be finite, those at position 59 are not "
                                    "(NaN or infinity in the weights or in a kernel)")
    del prompts[1], params[1]
    assert_recomputed(engine, results, prompts, params)
    assert all(c.error is None for (c,) in results)
    assert_idle(engine)


# --- streaming, weights, figures ------------------------------------------------------------------


def test_the_stream_is_the_completion_in_pieces(make):
    engine = make()
    tokenizer = engine.tokenizer
    script = tokenizer.encode("Größe ") + list(tool_script(tokenizer, 0, "6*7").values())
    engine.model.script = dict(enumerate(script, 10)) | dict(enumerate(tokenizer.encode("→"), 10 + len(script) + 4))
    (whole,), = engine.generate([prompt_of(10)], GREEDY)
    events = list(engine.stream(prompt_of(10), GREEDY))
    assert events[-1] == ("finish", "length") and ("tool", "6*7", "42") in events
    assert [e for e in events if e[0] == "text"][:6] == [("text", c) for c in "Größe "]
    assert events[events.index(("tool", "6*7", "42")) + 1] == ("text", "→")
    assert "".join(e[1] for e in events if e[0] == "text") == whole.text


def test_half_a_character_before_a_call_is_not_finished_behind_it(make):
    engine = make()
    half, rest = "é".encode()
    engine.model.script = {10: half} | tool_script(engine.tokenizer, 11, "6*7") | {20: rest}
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(GREEDY, max_tokens=11))
    assert completion.tool_calls == [("6*7", "42")] and completion.ids[10] == rest
    assert completion.text == "\ufffd\ufffd"


def test_events_come_as_they_happen_and_leaving_aborts(make):
    engine = make()
    engine.model.script = {10: ord("a"), 11: ord("b"), 12: ord("c")}
    events = engine.stream(prompt_of(10), GREEDY)
    assert [next(events), next(events)] == [("text", "a"), ("text", "b")]
    assert engine.stats()["steps"] == 2 and engine.running
    events.close()
    assert_idle(engine)


def test_a_stream_that_ends_in_an_error_raises_its_sentence(make):
    engine = make()
    with torch.no_grad():
        engine.model.lm_head.weight[3] = float("inf")
    with pytest.raises(UserError, match="logits must be finite, those at position 9 are not"):
        list(engine.stream(prompt_of(10), GREEDY))
    assert_idle(engine)


def test_new_weights_in_place_are_used_after_reset(make):
    engine, prompts = make(), [prompt_of(20), prompt_of(5)]
    before = engine.generate(prompts, GREEDY)
    unfinished = engine.submit(prompts[0], GREEDY)
    engine.step()
    with torch.no_grad():
        for p in engine.model.parameters():
            p.mul_(1 + 0.3 * torch.rand(p.shape))
    engine.reset()
    assert unfinished.completions()[0].finish_reason == "abort"
    assert_idle(engine)
    after = engine.generate(prompts, GREEDY)
    assert_recomputed(engine, after, prompts, GREEDY)
    assert as_tuples(after) != as_tuples(before)


def test_stats_add_up(make):
    engine = make()
    results = engine.generate([prompt_of(20), prompt_of(40)], SamplingParams(max_tokens=5, n=3))
    stats = engine.stats()
    assert stats["requests"] == 2 and stats["tokens"] == sum(len(c.ids) for r in results for c in r)
    assert stats["steps"] == len(engine.model.computed)
    assert stats["tokens_per_s"] == stats["tokens"] / stats["seconds"] and stats["requests_per_s"] > 0
    assert (stats["pages_total"], stats["page_size"]) == (64 * 6, 16) and 0 < stats["pages_peak"] < 20
    assert make().stats()["tokens_per_s"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_submit_step_and_abort_loses_nothing(make, seed):
    rng = random.Random(seed)
    engine = make(page_size=rng.choice((4, 5, 16)), n_pages=rng.randint(24, 40), max_batch=rng.randint(2, 6))
    engine.model.script = tool_script(engine.tokenizer, 30, "12*3")
    requests, aborted = [], []
    for _ in range(200):
        operation = rng.choices(("submit", "step", "abort"), (3, 8, 1))[0]
        if operation == "submit":
            params = SamplingParams(rng.randint(0, 14), rng.choice((0.0, 1.0)), rng.choice((None, 5)), rng.randrange(9),
                                    rng.choice((1, 1, 2, 3)))
            requests.append(engine.submit(prompt_of(rng.randint(1, 60), seed), params))
        elif operation == "step":
            engine.step()
        elif requests:
            request = requests.pop(rng.randrange(len(requests)))
            aborted.append(request)
            engine.abort(request)
            engine.check()
    while not all(request.done for request in requests):
        engine.step()
    assert_idle(engine)
    assert all(request.done for request in aborted)
    for request in rng.sample(requests, 12):
        assert_recomputed(engine, [request.completions()], [request.prompt], request.params)
