"""What the scheduler does to a row - chunks, preemption, known prefixes, deadlines - does not change what it says."""

import dataclasses

import pytest
import torch
from tiny_engine import GREEDY, assert_idle, assert_recomputed, prompt_of
from tiny_engine import make as make
from tiny_engine import model as model
from tiny_engine import one_thread as one_thread
from tiny_engine import tokenizer as tokenizer

from nanochat.engine import SamplingParams


def test_rows_that_were_preempted_say_the_same(make):
    """7 pages for 6 rows of up to 5: each starts with one, then they take them from each other."""
    engine = make(n_pages=7)
    params = [SamplingParams(max_tokens=70, seed=i) for i in range(6)]
    prompts = [prompt_of(9, seed) for seed in range(6)]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert engine.stats()["preemptions"] >= 3
    assert_idle(engine)


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_known_prefix_is_not_computed_again_and_says_the_same(make, page_size):
    engine = make(page_size=page_size)
    first = prompt_of(50)
    (answer,), = engine.generate([first], GREEDY)
    turn = [*first, *answer.ids, *prompt_of(7)]  # a chat's next turn
    engine.model.computed = []
    results = engine.generate([turn, first], GREEDY)
    assert_recomputed(engine, results, [turn, first], GREEDY)
    reused = (len(first) + len(answer.ids) - 1) // page_size * page_size + (len(first) - 1) // page_size * page_size
    assert engine.stats()["cached_tokens"] == reused
    assert engine.model.computed[0] == len(turn) + len(first) - reused
    assert_idle(engine)


def test_new_weights_forget_every_prefix(make):
    engine = make()
    engine.generate([prompt_of(50)], GREEDY)
    with torch.no_grad():
        engine.model.lm_head.weight.mul_(-1)
        engine.model.transformer["h"][0].attn.c_k.weight.mul_(2)
    engine.reset()
    assert_recomputed(engine, engine.generate([prompt_of(50)], GREEDY), [prompt_of(50)], GREEDY)
    assert engine.stats()["cached_tokens"] == 0


def test_a_request_past_its_deadline_ends_with_what_it_has(make):
    engine = make()
    late, kept = engine.submit(prompt_of(20), GREEDY, timeout=1e-9), engine.submit(prompt_of(5), GREEDY, timeout=1e9)
    while not kept.done:
        engine.step()
    assert late.completions()[0].finish_reason == "timeout" and kept.completions()[0].finish_reason != "timeout"
    assert_idle(engine)


def test_prompts_prefill_together_up_to_the_budget_and_in_chunks(make):
    engine = make()
    prompts = [prompt_of(90, seed) for seed in range(30)]  # 2,700 tokens, 2,048 a step
    engine.generate(prompts, dataclasses.replace(GREEDY, max_tokens=2))
    assert engine.model.computed[0] == 2048 and engine.stats()["steps"] == 3


def test_a_prompt_of_whole_pages_that_is_known_computes_one_page_again(make):
    """All of it known would leave no query: the last token's logits are wanted."""
    engine = make()
    for length in (16, 32, 48):
        prompt = prompt_of(length)
        for known in (0, length - 16):
            before = engine.stats()["cached_tokens"]
            assert_recomputed(engine, engine.generate([prompt], GREEDY), [prompt], GREEDY)
            assert engine.stats()["cached_tokens"] - before == known
    assert_idle(engine)


def test_equal_prompts_that_start_together_share_nothing_that_is_not_written_yet(make):
    engine = make(step_tokens=50)
    requests = [engine.submit(prompt_of(60), GREEDY) for _ in range(3)]
    engine.step()
    assert engine.stats()["cached_tokens"] == 0  # 50 tokens of the first
    engine.step()
    assert engine.stats()["cached_tokens"] == 48  # the second finds three pages of them
    while not all(request.done for request in requests):
        engine.step()
    assert_recomputed(engine, [r.completions() for r in requests], [prompt_of(60)] * 3, GREEDY)
    assert_idle(engine)


def test_a_preempted_row_starts_again_from_its_own_pages_and_draws_nothing_twice(make):
    engine = make(n_pages=9)
    requests = [engine.submit(prompt_of(40, seed), SamplingParams(50, seed=seed)) for seed in range(3)]
    rows, lengths = [request.rows[0] for request in requests], [40] * 3
    while not all(request.done for request in requests):
        engine.step()
        now = [len(row.tokens) for row in rows]
        assert all(new - old in (0, 1) for old, new in zip(lengths, now, strict=True))
        lengths = now
    assert engine.stats()["preemptions"] > 0 and engine.stats()["cached_tokens"] >= 32
    assert_recomputed(engine, [r.completions() for r in requests], [r.prompt for r in requests],
                      [r.params for r in requests])


def test_a_row_costs_one_step_per_token_and_nothing_after_its_end(make):
    engine = make()
    engine.generate([prompt_of(10), prompt_of(20)], [dataclasses.replace(GREEDY, max_tokens=n) for n in (2, 5)])
    assert engine.model.computed == [30, 2, 1, 1, 1]  # the last token of each is never computed


def test_what_a_row_with_bad_logits_computed_is_not_reused(make):
    engine, prompt = make(), prompt_of(40)
    request = engine.submit(prompt, GREEDY)
    engine.step()
    page = request.rows[0].pages[1]  # a fault of the machine in a page that is published by now
    good = engine.cache.k[0][page].clone()
    engine.cache.k[0][page] = float("nan")
    while not request.done:
        engine.step()
    assert request.completions()[0].finish_reason == "error"
    engine.cache.k[0][page] = good
    before = engine.stats()["cached_tokens"]
    assert_recomputed(engine, engine.generate([prompt], GREEDY), [prompt], GREEDY)
    assert engine.stats()["cached_tokens"] == before
    assert_idle(engine)


@pytest.mark.parametrize("options", [dict(max_batch=1), dict(step_tokens=8, max_batch=3), dict(n_pages=8, max_batch=6),
                                     dict(page_size=5), dict(prefix_cache=False)])
def test_random_numbers_depend_on_seed_and_position_alone(make, options):
    """One at a time, in chunks, preempted, in other pages; cold and with every prompt known; in either order."""
    prompts = [prompt_of(40, seed) for seed in range(5)]
    params = [SamplingParams(40, 1.0, seed=7) for _ in prompts]
    want = [c.ids for (c,) in make().generate(prompts, params)]
    engine = make(**options)
    assert [c.ids for (c,) in engine.generate(prompts, params)] == want
    assert [c.ids for (c,) in engine.generate(prompts[::-1], params)] == want[::-1]
    assert (engine.stats()["preemptions"] > 0) == ("n_pages" in options)
    assert (engine.stats()["cached_tokens"] > 0) == options.get("prefix_cache", True)
