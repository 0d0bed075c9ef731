"""What the engine refuses, each in a sentence, and the largest request that it does serve."""

import dataclasses

import pytest
from tiny_engine import GREEDY, assert_idle, assert_recomputed, byte_tokenizer, prompt_of, random_model

from nanochat.common import UserError
from nanochat.engine import Engine, SamplingParams


@pytest.fixture
def make():
    def engine(**options):
        return Engine(random_model(), byte_tokenizer(), **options)
    return engine

REFUSED = [
    ([], {}, "a prompt must have at least 1 token, got 0"),
    (prompt_of(97), {}, "a prompt must fit the context of 96 tokens, got 97"),
    ([1, 265], {}, "prompt tokens must be ids from 0 to 264, got 1 to 265"),
    ([-1], {}, "prompt tokens must be ids from 0 to 264, got -1 to -1"),
    (prompt_of(60), {}, "a request of 84 tokens needs 6 pages of 16 tokens, the pool has 4"),
    ([1, 2], {"stop_ids": (3, 265)}, "stop_ids must be ids from 0 to 264, got (3, 265)"),
    ([1.5, 2], {}, "prompt tokens must be whole numbers, got [1.5, 2]"),
    ([1, "a"], {}, "prompt tokens must be whole numbers, got [1, 'a']"),
]


@pytest.mark.parametrize("prompt, changes, sentence", REFUSED)
def test_a_request_that_cannot_be_served_is_refused_in_a_sentence(make, prompt, changes, sentence):
    engine, params = make(n_pages=4), dataclasses.replace(GREEDY, **changes)
    with pytest.raises(UserError) as error:
        engine.generate([prompt, prompt], params)
    assert str(error.value) == sentence
    results = engine.generate([prompt_of(7), prompt, prompt_of(16)], [GREEDY, params, GREEDY])
    refused = [(c.finish_reason, c.error, c.ids, c.text) for c in results.pop(1)]
    assert refused == [("error", sentence, [], "")] * params.n
    assert_recomputed(engine, results, [prompt_of(7), prompt_of(16)], GREEDY)
    assert_idle(engine)


def test_the_largest_request_that_fits_is_served(make):
    engine = make(n_pages=4)
    prompts, params = [prompt_of(41), prompt_of(40)], [dataclasses.replace(GREEDY, n=n) for n in (1, 3)]
    assert_recomputed(engine, engine.generate(prompts, params), prompts, params)
    assert_recomputed(engine, engine.generate(prompts[:1], params[1]), prompts[:1], params[1])


def test_a_tiny_top_p_leaves_the_likeliest(make):
    """1e-50 is 0 in fp32, which kernels need not take: they get a number above 0."""
    engine, seen = make(), []
    draw = engine.runner._draw
    engine.runner._draw = lambda logits, how: (seen.append(float(how[2].min())), draw(logits, how))[1]
    (likeliest,), (drawn,) = engine.generate([[1, 2]] * 2, [GREEDY, SamplingParams(24, top_p=1e-50)])
    assert drawn.ids == likeliest.ids and 0 < min(seen) < 1e-20


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_is_above_zero(make, timeout):
    with pytest.raises(UserError, match=f"a timeout must be above 0 seconds, got {timeout}"):
        make().submit(prompt_of(5), GREEDY, timeout)


def test_strict_refuses_what_may_end_at_the_context(make):
    engine = make()
    with pytest.raises(UserError) as error:
        engine.submit(prompt_of(73), GREEDY, strict=True)
    assert str(error.value) == "prompt and max_tokens must fit the context of 96 tokens, got 73 and 24"
    assert engine.submit(prompt_of(72), GREEDY, strict=True).limit == engine.submit(prompt_of(73), GREEDY).limit == 96


@pytest.mark.parametrize("field, value, sentence", [
    ("max_tokens", -1, "max_tokens must be at least 0, got -1"),
    ("temperature", -0.5, "temperature must be a finite number of at least 0, got -0.5"),
    ("temperature", float("nan"), "temperature must be a finite number of at least 0, got nan"),
    ("temperature", float("inf"), "temperature must be a finite number of at least 0, got inf"),
    ("temperature", 1e-5, "temperature must be 0 or at least 0.0001, got 1e-05"),
    ("temperature", "a", "temperature must be a number, got 'a'"),
    ("temperature", 10**400, f"temperature must be at most 1e+30, got 1{'0' * 79}"),
    ("top_p", None, "top_p must be a number, got None"),
    ("top_k", 2**31, "top_k must be at most 2^31 - 1, or None for all, got 2147483648"),
    ("stop_ids", ("a",), "stop_ids must be a tuple of whole numbers, got ('a',)"),
    ("stop_ids", 5, "stop_ids must be a tuple of whole numbers, got 5"),
    ("stop", 5, "stop must be a tuple of at most 4 strings, got 5"),
    ("max_tokens", float("nan"), "max_tokens must be a whole number, got nan"),
    ("max_tokens", None, "max_tokens must be a whole number, got None"),
    ("top_k", 2.5, "top_k must be a whole number, got 2.5"),
    ("top_k", 0, "top_k must be at least 1, or None for all, got 0"),
    ("top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
    ("top_p", float("nan"), "top_p must be above 0 and at most 1, got nan"),
    ("min_p", float("nan"), "min_p must be at least 0 and below 1, got nan"),
    ("min_p", 1.0, "min_p must be at least 0 and below 1, got 1.0"),
    ("seed", -1, "seed must be from 0 to 2^63 - 1, got -1"),
    ("seed", 2**63, "seed must be from 0 to 2^63 - 1, got 9223372036854775808"),
    ("n", 0, "n must be at least 1, got 0"),
    ("logprobs", -1, "logprobs must be from 0 to 20, or None, got -1"),
    ("logprobs", 21, "logprobs must be from 0 to 20, or None, got 21"),
    ("stop", "ab", "stop must be a tuple of at most 4 strings, got 'ab'"),
    ("stop", ("a", "b", "c", "d", "e"), "stop must be a tuple of at most 4 strings, got ('a', 'b', 'c', 'd', 'e')"),
    ("stop", ("a", ""), "a stop string must have 1 to 256 characters, got ''"),
    ("stop", ("a" * 257,), f"a stop string must have 1 to 256 characters, got '{'a' * 79}"),
    ("stop", (7,), "a stop string must have 1 to 256 characters, got 7"),
])
def test_sampling_parameters_out_of_range(field, value, sentence):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})
    assert str(error.value) == sentence


@pytest.mark.parametrize("options, sentence", [
    (dict(tools="bash"), "tools must be one of calculator, python, off, got 'bash'"),
    (dict(page_size=0), "page_size must be at least 1, got 0"),
    (dict(n_pages=0), "n_pages must be at least 1, got 0"),
    (dict(max_batch=0), "max_batch must be at least 1, got 0"),
])
def test_engine_options_out_of_range(make, options, sentence):
    with pytest.raises(UserError) as error:
        make(**options)
    assert str(error.value) == sentence
