"""New weights arrive in place and nothing computed with the old ones is used; the pages' memory can be lent out."""

import pytest
import torch
from tiny_engine import GREEDY, assert_idle, assert_recomputed, prompt_of, random_model
from tiny_engine import make as make
from tiny_engine import model as model
from tiny_engine import one_thread as one_thread
from tiny_engine import tokenizer as tokenizer

from nanochat.common import UserError
from nanochat.engine import SamplingParams

PROMPTS = [prompt_of(50), prompt_of(20)]


def other_model(**options):
    """Same shape, other weights."""
    model = random_model(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def ids_of(results):
    return [c.ids for samples in results for c in samples]


@pytest.mark.parametrize("given", ["a model", "its tensors", "nothing: its own model has changed"])
def test_new_weights_are_used_in_place_and_known_prefixes_forgotten(make, given):
    engine, other = make(), other_model()
    before = engine.generate(PROMPTS, GREEDY)
    places = [p.data_ptr() for p in engine.model.parameters()]
    if given == "a model":
        engine.sync_weights(other)
    elif given == "its tensors":
        engine.sync_weights(dict(other.state_dict()))
    else:
        engine.model.load_state_dict(other.state_dict())
        engine.sync_weights()
    assert engine.weights_version == 1 and engine.pool.cached == 0
    assert [p.data_ptr() for p in engine.model.parameters()] == places
    after = engine.generate(PROMPTS, GREEDY)
    assert ids_of(after) == ids_of(make(model=other).generate(PROMPTS, GREEDY)) != ids_of(before)
    assert engine.stats()["cached_tokens"] == 0
    assert_recomputed(engine, after, PROMPTS, GREEDY)


def test_weights_in_another_dtype_are_cast_once_and_the_trainers_stay_as_they_are(make):
    """As in RL on a GPU: fp32 masters, answers in bf16."""
    def masters(model):
        model.dtype = torch.bfloat16
        return model

    trained, other = masters(random_model()), other_model()
    engine = make(model=trained)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    trained.load_state_dict(other.state_dict())
    places = [p.data_ptr() for p in engine.model.parameters()]
    engine.sync_weights()
    assert [p.data_ptr() for p in engine.model.parameters()] == places
    want = masters(other_model()).cast_weights()
    assert ids_of(engine.generate(PROMPTS, GREEDY)) == ids_of(make(model=want).generate(PROMPTS, GREEDY))
    assert make(model=want).model is want
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), other.parameters(), strict=True))


def test_weights_and_memory_change_only_while_no_request_runs(make):
    engine = make()
    request = engine.submit(PROMPTS[0], GREEDY)
    for started in (False, True):
        for change, what in ((lambda: engine.sync_weights(other_model()), "weights"),
                             (engine.release_kv, "the KV memory")):
            with pytest.raises(UserError) as error:
                change()
            assert str(error.value) == f"{what} can change only while no request runs, 1 rows do"
        if not started:
            engine.step()
    while not request.done:
        engine.step()
    assert engine.weights_version == 0
    assert_recomputed(engine, [request.completions()], PROMPTS[:1], GREEDY)


@pytest.mark.parametrize("name, tensor, shapes", [
    ("lm_head.weight", torch.zeros(3, 2), "(265, 128), got (3, 2)"),
    ("lm_head.weight", None, "(265, 128), got None"),
    ("extra.weight", torch.zeros(1), "None, got (1,)"),
])
def test_weights_that_do_not_fit_change_nothing(make, name, tensor, shapes):
    engine = make()
    before = engine.generate(PROMPTS, GREEDY)
    tensors = dict(other_model().state_dict())
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(UserError) as error:
        engine.sync_weights(tensors)
    assert str(error.value) == f"checkpoint given to the engine: tensor {name} must have shape {shapes}"
    assert engine.weights_version == 0
    assert ids_of(engine.generate(PROMPTS, GREEDY)) == ids_of(before)


def test_the_pages_memory_can_be_given_back_and_taken_again(make):
    engine = make()
    before = engine.generate(PROMPTS, SamplingParams(12, seed=3))
    engine.release_kv()
    assert engine.cache is None and engine.pool.cached == 0
    with pytest.raises(UserError, match="the KV memory is given back; call restore_kv first"):
        engine.submit(PROMPTS[0], GREEDY)
    engine.restore_kv()
    assert ids_of(engine.generate(PROMPTS, SamplingParams(12, seed=3))) == ids_of(before)
    assert_idle(engine)


def test_restoring_what_was_not_given_back_changes_nothing(make):
    engine = make()
    first = engine.generate(PROMPTS[:1], GREEDY)
    engine.restore_kv()
    assert ids_of(engine.generate(PROMPTS[:1], GREEDY)) == ids_of(first)
    request = engine.submit(PROMPTS[0], GREEDY)
    for _ in range(3):
        engine.step()
    engine.restore_kv()
    while not request.done:
        engine.step()
    assert ids_of([request.completions()]) == ids_of(first)
