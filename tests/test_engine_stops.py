"""Where a completion ends, and what a reader gets of it when: stop strings, log-probabilities, events, counts."""

import dataclasses
import random

import pytest
import torch
from tiny_engine import GREEDY, VOCAB, assert_idle, prompt_of, tool_script
from tiny_engine import make as make
from tiny_engine import model as model
from tiny_engine import one_thread as one_thread
from tiny_engine import tokenizer as tokenizer

from nanochat.engine import SamplingParams
from nanochat.engine.tools import Transcript
from nanochat.tokenizer import Tokenizer


def cut_at_stop(text, stops):
    """(text before the stop string that is complete first, that string): character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end - len(max(found, key=len))], max(found, key=len)
    return text, None


def may_become_a_stop(text, stops):
    """Longest end of the text that a stop string begins with."""
    return max((n for stop in stops for n in range(min(len(stop), len(text) + 1)) if stop[:n] == text[len(text) - n:]),
               default=0)


def says(engine, text, start, end=True):
    """Make the model say `text` from position `start`, and end there."""
    ids = engine.tokenizer.encode(text) + [engine.tokenizer.special_id("<|assistant_end|>")] * end
    engine.model.script = engine.model.script | dict(enumerate(ids, start))


# --- stop strings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merging():
    """A tokenizer with tokens of several characters."""
    return Tokenizer.train(["abab cdcd abc abba bcab cab"] * 9, VOCAB + 12)


@pytest.mark.parametrize("seed", range(4))
def test_text_is_cut_before_the_stop_string_and_never_shows_a_part_of_it(tokenizer, merging, seed):
    rng, cuts = random.Random(seed), 0
    for _ in range(150):
        text = "".join(rng.choices("abc", k=rng.randint(0, 30)))
        stops = tuple("".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 4)))
        want, stop = cut_at_stop(text, stops)
        cuts += stop is not None
        for coder in (tokenizer, merging):
            transcript, said = Transcript(coder, stops), ""
            for token in coder.encode(text):
                transcript.push(token)
                said += coder.decode([token])
                if transcript.stopped_by is None:
                    assert transcript.text == said[:len(said) - may_become_a_stop(said, stops)]
                assert want.startswith(transcript.text)
            transcript.finish("length")
            assert (transcript.text, transcript.stopped_by) == (want, stop)
    assert 30 < cuts < 140


def test_of_two_stop_strings_in_one_token_the_one_that_ends_first_counts():
    coder = Tokenizer.train(["xyz"] * 9, VOCAB + 2)
    assert [coder.decode([token]) for token in coder.encode("wxyz")] == ["w", "xyz"]
    transcript = Transcript(coder, ("wxyz", "y"))
    for token in coder.encode("wxyz"):
        transcript.push(token)
    assert (transcript.text, transcript.stopped_by) == ("wx", "y")


def test_a_stop_string_ends_the_row_and_only_its_text_is_cut(make):
    engine = make()
    says(engine, "One. Two.\n\nThree", 10)
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(GREEDY, stop=("four", ".\n")))
    assert (completion.finish_reason, completion.stopped_by, completion.text) == ("stop", ".\n", "One. Two")
    assert engine.tokenizer.decode(completion.ids) == "One. Two.\n"
    assert len(completion.ids) == len(completion.mask) == len(completion.logprobs) == completion.completion_tokens == 10
    assert_idle(engine)


def test_what_was_held_back_comes_when_it_is_clear_and_at_the_end(make):
    engine = make()
    says(engine, "a.b..", 10, end=False)
    request = engine.submit(prompt_of(10), SamplingParams(5, 0.0, stop=("..!",)))
    pieces = []
    while not request.done:
        engine.step()
        pieces.append("".join(event[1] for _, event in request.take_events() if event[0] == "text"))
    assert pieces == ["a", "", ".b", "", ".."]
    assert request.completions()[0].finish_reason == "length"


def test_a_stop_string_is_found_in_characters_of_several_tokens(make):
    engine = make()
    says(engine, "né→x", 10)
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(GREEDY, stop=("é→",)))
    assert (completion.text, completion.stopped_by) == ("n", "é→")
    assert len(completion.ids) == 6


def test_stop_strings_are_for_visible_text_and_may_stand_around_a_call(make):
    engine = make()
    start = 10
    says(engine, "x=", start, end=False)
    engine.model.script |= tool_script(engine.tokenizer, start + 2, "3+85")
    says(engine, "!y", start + 2 + 6 + 4)
    params = dataclasses.replace(GREEDY, stop=("85", "88"))  # both stand only in the call and its result
    (completion,), = engine.generate([prompt_of(start)], params)
    assert completion.text == "x=!y" and completion.stopped_by == engine.tokenizer.special_id("<|assistant_end|>")
    around = dataclasses.replace(GREEDY, stop=("=!",))
    events = list(engine.stream(prompt_of(start), around))
    assert [e for e in events if e[0] != "text"] == [("finish", "stop")]  # the call lies behind the cut
    assert "".join(e[1] for e in events if e[0] == "text") == "x"


def test_a_call_waits_behind_text_that_is_held_back(make):
    engine = make()
    says(engine, "=", 10, end=False)
    engine.model.script |= tool_script(engine.tokenizer, 11, "3+85")
    says(engine, "ok", 21)
    events = list(engine.stream(prompt_of(10), dataclasses.replace(GREEDY, stop=("=!",))))
    assert events == [("text", "="), ("tool", "3+85", "88"), ("text", "o"), ("text", "k"), ("finish", "stop")]


# --- stop ids -------------------------------------------------------------------------------------


def test_a_stop_id_ends_the_row_and_is_not_returned(make):
    engine = make()
    says(engine, "abc", 10)
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(GREEDY, stop_ids=(ord("z"), ord("b"))))
    assert (completion.text, completion.finish_reason, completion.stopped_by) == ("a", "stop", ord("b"))
    assert completion.ids == [ord("a")]


def test_ignore_eos_passes_terminals_but_no_stop_id(make):
    engine = make()
    end = engine.tokenizer.special_id("<|assistant_end|>")
    engine.model.script = {12: end, 14: engine.tokenizer.bos_id}
    params = dataclasses.replace(GREEDY, ignore_eos=True, logprobs=0)
    (completion,), = engine.generate([prompt_of(10)], params)
    assert len(completion.ids) == 24 and completion.finish_reason == "length" and completion.ids[2] == end
    assert "<|" not in completion.text
    tokens = [e[1] for _, e in engine.events(engine.submit(prompt_of(10), params)) if e[0] == "token"]
    assert tokens == [id for id in completion.ids if id < 256]
    (stopped,), = engine.generate([prompt_of(10)], dataclasses.replace(params, stop_ids=(end,)))
    assert (stopped.ids, stopped.stopped_by) == (completion.ids[:2], end)


# --- log-probabilities ----------------------------------------------------------------------------


def test_the_likeliest_of_greedy_rows_are_the_models_own(make):
    engine = make()
    (completion,), = engine.generate([prompt_of(10)], dataclasses.replace(GREEDY, logprobs=5))
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt_of(10) + completion.ids]))[0, 9:-1]
    want = logits.log_softmax(-1).topk(5)
    assert [[id for id, _ in best] for best in completion.best] == want.indices.tolist()
    torch.testing.assert_close(torch.tensor([[lp for _, lp in best] for best in completion.best]), want.values)
    assert [best[0][0] for best in completion.best] == completion.ids
    assert [best[0][1] for best in completion.best] == pytest.approx(completion.logprobs, abs=1e-6)


def test_the_likeliest_are_of_the_distribution_drawn_from(make):
    engine = make()
    prompts = [prompt_of(10), prompt_of(7), prompt_of(20), prompt_of(12)]
    params = [SamplingParams(12, 0.7, 3, logprobs=20), SamplingParams(12),
              SamplingParams(12, 1.3, top_p=0.5, logprobs=2), SamplingParams(12, min_p=0.6, logprobs=20, n=2)]
    results = engine.generate(prompts, params)
    for completion in (*results[0], *results[3]):
        for id, logprob, best in zip(completion.ids, completion.logprobs, completion.best, strict=True):
            assert dict(best)[id] == pytest.approx(logprob, abs=1e-5)
            assert sum(torch.tensor([lp for _, lp in best]).exp()) == pytest.approx(1.0, abs=1e-4)  # all that are kept
    assert {len(best) for best in results[0][0].best} == {3}
    assert set(results[1][0].best) == {()}
    assert {len(best) for best in results[2][0].best} <= {1, 2}


def test_forced_tokens_have_no_likeliest(make):
    engine = make()
    engine.model.script = tool_script(engine.tokenizer, 10, "3+85")
    params = dataclasses.replace(GREEDY, logprobs=2)
    (completion,), = engine.generate([prompt_of(10)], params)
    assert [len(best) for best in completion.best] == [2 * mask for mask in completion.mask]
    shown = [e[1] for _, e in engine.events(engine.submit(prompt_of(10), params)) if e[0] == "token"]
    assert shown == [id for id in completion.ids[10:] if id < 256]  # nothing of the call


# --- events ---------------------------------------------------------------------------------------


def test_a_token_comes_with_its_text_and_not_at_all_behind_a_stop(make):
    engine = make()
    says(engine, "ab..", 10)
    params = dataclasses.replace(GREEDY, stop=("..",), logprobs=1)
    events = [event for _, event in engine.events(engine.submit(prompt_of(10), params))]
    assert [e[:2] for e in events] == [("token", ord("a")), ("text", "a"), ("token", ord("b")), ("text", "b"),
                                       ("finish", "stop")]
    (completion,), = engine.generate([prompt_of(10)], params)
    assert events[2] == ("token", ord("b"), completion.logprobs[1], completion.best[1])
    says(engine, "é.x", 10)
    events = [event for _, event in engine.events(engine.submit(prompt_of(10), params))]
    assert [e[:2] for e in events] == [("token", 0xC3), ("token", 0xA9), ("text", "é"), ("token", ord(".")),
                                       ("text", "."), ("token", ord("x")), ("text", "x"), ("finish", "stop")]


def test_events_keep_their_places_around_text_that_is_held_back(make):
    engine = make()
    says(engine, "a.", 10, end=False)
    engine.model.script |= tool_script(engine.tokenizer, 12, "3+85")
    params = SamplingParams(2 + 6 + 2, 0.0, stop=(".x!", "!"), logprobs=0)  # ends inside the forced answer
    events = [event for _, event in engine.events(engine.submit(prompt_of(10), params))]
    assert [e[:2] for e in events] == [("token", ord("a")), ("text", "a"), ("token", ord(".")), ("text", "."),
                                       ("tool", "3+85"), ("finish", "length")]
    says(engine, "!", 22)
    params = dataclasses.replace(params, max_tokens=20, logprobs=None)
    events = [event for _, event in engine.events(engine.submit(prompt_of(10), params))]
    assert events == [("text", "a"), ("text", "."), ("tool", "3+85", "88"), ("finish", "stop")]  # the stop is behind it


def test_a_token_of_several_characters_stands_before_what_is_given_of_it():
    coder = Tokenizer.train(["xyz"] * 9, VOCAB + 2)
    transcript = Transcript(coder, ("zz",))
    for token in coder.encode("xyzw"):
        transcript.push(token, (token,))
    kinds = [event[0] if event[0] == "token" else event[1] for event in transcript.events]
    assert kinds == ["token", "xy", "z", "token", "w"]


def test_events_tell_all_samples_apart_and_each_comes_once(make):
    engine, params = make(), SamplingParams(12, 1.0, n=3)
    request = engine.submit(prompt_of(10), params)
    said = ["", "", ""]
    reasons = [[], [], []]
    for i, (kind, *values) in engine.events(request):
        if kind == "text":
            assert not reasons[i]
            said[i] += values[0]
        else:
            reasons[i] += values
    assert said == [c.text for c in request.completions()] and len(set(said)) == 3
    assert reasons == [[c.finish_reason] for c in request.completions()]
    assert request.take_events() == []


def test_a_sample_with_bad_logits_ends_with_an_error_event(make):
    engine = make()
    with torch.no_grad():
        engine.model.lm_head.weight[3] = float("nan")
    request = engine.submit(prompt_of(10), dataclasses.replace(GREEDY, n=2))
    assert list(engine.events(request)) == [(0, ("finish", "error")), (1, ("finish", "error"))]
    assert "logits must be finite" in request.rows[0].error
    assert_idle(engine)


# --- counts and times -----------------------------------------------------------------------------


def test_counts_and_times_of_a_completion(make):
    engine = make()
    (first,), second = engine.generate([prompt_of(40), prompt_of(40, seed=1)],
                                       [GREEDY, SamplingParams(5, n=2)])
    assert (first.prompt_tokens, first.cached_tokens, first.completion_tokens) == (40, 0, len(first.ids))
    for completion in (first, *second):
        times = completion.times
        assert times.queued <= times.started <= times.first_token <= times.done
    again, = engine.generate([prompt_of(40)], SamplingParams(3, n=2))
    assert [c.cached_tokens for c in again] == [32, 32]
    (none,), = engine.generate([prompt_of(3)], SamplingParams(max_tokens=0))
    assert none.times.started is none.times.first_token is None and none.times.done >= none.times.queued


def test_cached_tokens_are_those_found_before_the_request_began(make):
    """Being preempted and started again from its own pages does not make a prompt cached."""
    engine = make(n_pages=7)
    results = engine.generate([prompt_of(20, seed) for seed in range(6)], SamplingParams(max_tokens=70))
    assert engine.stats()["preemptions"] > 0 and engine.stats()["cached_tokens"] > 0
    assert {c.cached_tokens for (c,) in results} == {0}
