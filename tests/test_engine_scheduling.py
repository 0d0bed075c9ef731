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
