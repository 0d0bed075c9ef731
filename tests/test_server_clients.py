"""OpenAI's own client against the server with a real, tiny model: both modes, errors, and answers that do not depend
on who else asks."""

import threading
import time
import urllib.request

import openai
import pytest
from fake_engine import FakeEngine, endless, live, until
from tiny_engine import CheckedEngine, assert_idle, byte_tokenizer, random_model
from tiny_engine import one_thread as one_thread

from nanochat.engine import SamplingParams
from nanochat.server import Settings, create_app

QUESTION = [{"role": "user", "content": "What is 37 plus 85?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def client_for(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", timeout=30,
                         **{"api_key": "any", "max_retries": 0, **options})


def answering(tokenizer, *said):
    """A model sure of what it says to QUESTION: texts, special tokens' names among them."""
    model = random_model()
    start = len(tokenizer.render_for_completion({"messages": QUESTION}))
    for part in said:
        special = part.startswith("<|")
        ids = [tokenizer.special_id(part)] if special else [*part.encode()]
        model.script = {**model.script, **dict(enumerate(ids, start))}
        start += len(ids)
    return model


@pytest.fixture
def serving(tokenizer):
    """Serve a model; returns its client, and checks at the end that every page is free."""
    opened = []

    def start(model=None, **settings):
        engine = CheckedEngine(model or random_model(), tokenizer, max_batch=16)
        opened.append((engine, live(create_app(lambda: engine, Settings(**settings)))))
        return client_for(opened[-1][1].__enter__())

    yield start
    for engine, server in opened:
        try:
            until(lambda engine=engine: not engine.running and not engine.waiting)
            assert_idle(engine)
        finally:
            server.__exit__(None, None, None)


def create(client, **options):
    return client.chat.completions.create(**{"model": "nanochat", "messages": QUESTION, **options})


def streamed(client, **options):
    """The text of a streamed answer, and its last finish reason."""
    text, reason = "", None
    for chunk in create(client, stream=True, **options):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


# --- answers --------------------------------------------------------------------------------------


def test_both_modes_give_what_the_engine_gives(serving, tokenizer):
    client = serving()
    prompt = tokenizer.render_for_completion({"messages": QUESTION})
    for sampling in ({"temperature": 0}, {"temperature": 1.5, "seed": 7, "top_p": 0.9}):
        params = SamplingParams(max_tokens=20, **{"top_k": 50, **sampling})
        ((want,),) = CheckedEngine(random_model(), tokenizer).generate([prompt], params)
        whole = create(client, max_tokens=20, **sampling)
        assert whole.choices[0].message.content == want.text == streamed(client, max_tokens=20, **sampling)[0]
        assert whole.usage.completion_tokens == len(want.ids) and whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.prompt_tokens_details.cached_tokens == len(prompt) // 16 * 16
    assert whole.model_extra["seed"] == 7 and whole.model_extra["timings"]["predicted_n"] == len(want.ids)


def test_sixteen_streams_at_once_say_what_each_says_alone(serving):
    client = serving()
    asked = [dict(messages=[{"role": "user", "content": f"{'x' * (3 * i)} {i}"}], max_tokens=12, seed=i,
                  temperature=i % 2 * 1.0) for i in range(16)]
    alone = [streamed(client, **options) for options in asked]
    together = [None] * 16

    def ask(i):
        together[i] = streamed(client, **asked[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len({text for text, _ in alone}) > 12


def test_the_tool_runs_on_the_server_and_no_special_token_leaks(serving, tokenizer):
    model = answering(tokenizer, "<|python_start|>", "37+85", "<|python_end|>")
    start = max(model.script) + 1 + len("122") + 2
    model.script |= dict(enumerate([*"It is 122.".encode(), tokenizer.special_id("<|assistant_end|>")], start))
    client = serving(model)
    message = create(client, temperature=0).choices[0].message
    assert message.content == "It is 122."
    assert message.model_extra["tool_trace"] == [{"input": "37+85", "output": "122"}]
    deltas = [chunk.choices[0].delta for chunk in create(client, temperature=0, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "It is 122."
    assert [delta.model_extra["tool_trace"] for delta in deltas if "tool_trace" in delta.model_extra] == [
        [{"input": "37+85", "output": "122"}]]


def test_special_tokens_the_model_misplaces_stay_hidden(serving, tokenizer):
    client = serving(answering(tokenizer, "a", "<|user_start|>", "b", "<|output_start|>", "hidden", "<|output_end|>",
                               "<|python_end|>", "c", "<|assistant_end|>"))
    assert create(client, temperature=0).choices[0].message.content == "abc"
    assert streamed(client, temperature=0) == ("abc", "stop")


def test_characters_arrive_whole(serving, tokenizer):
    client = serving(answering(tokenizer, "é漢\U0001f600!", "<|assistant_end|>"))
    pieces = [chunk.choices[0].delta.content for chunk in create(client, temperature=0, stream=True)]
    assert [piece for piece in pieces if piece] == ["é", "漢", "\U0001f600", "!"]


def test_stop_strings_end_the_text_before_them(serving, tokenizer):
    client = serving(answering(tokenizer, "one two three", "<|assistant_end|>"))
    assert streamed(client, temperature=0, stop="tw") == ("one ", "stop")
    assert streamed(client, temperature=0, stop=["three", "x"]) == ("one two ", "stop")
    assert streamed(client, temperature=0, max_tokens=3) == ("one", "length")


def test_log_probabilities_are_those_of_the_engine(serving, tokenizer):
    client = serving()
    prompt = tokenizer.render_for_completion({"messages": QUESTION})
    params = SamplingParams(max_tokens=5, temperature=0.8, top_k=50, seed=3, logprobs=2)
    ((want,),) = CheckedEngine(random_model(), tokenizer).generate([prompt], params)
    options = dict(max_tokens=5, temperature=0.8, seed=3, logprobs=True, top_logprobs=2)
    content = create(client, **options).choices[0].logprobs.content
    visible = [i for i, id in enumerate(want.ids) if id < 256]
    assert [token.bytes for token in content] == [[want.ids[i]] for i in visible]
    assert [token.logprob for token in content] == pytest.approx([want.logprobs[i] for i in visible], abs=1e-5)
    assert all(len(token.top_logprobs) == 2 for token in content)
    streams = [chunk.choices[0].logprobs for chunk in create(client, stream=True, **options)]
    assert [token for logprobs in streams if logprobs for token in logprobs.content] == content


def test_text_offsets_are_where_each_token_s_character_begins(serving, tokenizer):
    model = answering(tokenizer, "Aé漢B", "<|python_start|>", "1+1", "<|python_end|>")
    start = max(model.script) + 1 + len("2") + 2
    model.script |= dict(enumerate([*"Cé".encode(), tokenizer.special_id("<|assistant_end|>")], start))
    prompt = tokenizer.render_for_completion({"messages": QUESTION})
    options = dict(model="nanochat", prompt=prompt, temperature=0, max_tokens=40, logprobs=0, stop="Bx")  # holds B back
    (choice,) = serving(model).completions.create(**options).choices
    assert choice.text == "Aé漢BCé" and choice.logprobs.text_offset == [0, 1, 1, 2, 2, 2, 3, 4, 5, 5]
    chunks = serving(model).completions.create(stream=True, **options)
    assert sum((chunk.choices[0].logprobs.text_offset for chunk in chunks), []) == choice.logprobs.text_offset


def test_completions_by_text_and_by_ids_are_the_same(serving, tokenizer):
    client = serving()
    options = dict(model="nanochat", max_tokens=10, temperature=0)
    by_text = client.completions.create(prompt="Once", **options)
    by_ids = client.completions.create(prompt=[tokenizer.bos_id, *b"Once"], **options)
    pieces = client.completions.create(prompt="Once", stream=True, **options)
    assert by_text.choices[0].text == by_ids.choices[0].text == "".join(chunk.choices[0].text for chunk in pieces)
    both = client.completions.create(prompt=["Once", "Twice"], n=2, **options)
    assert [choice.text for choice in both.choices[:2]] == [by_text.choices[0].text] * 2


def test_the_model_is_listed(serving):
    client = serving()
    (model,) = client.models.list().data
    assert model.id == "nanochat" and client.models.retrieve("nanochat") == model


# --- errors ---------------------------------------------------------------------------------------


def test_errors_are_the_client_s_exceptions(serving):
    client = serving(token="t")
    with pytest.raises(openai.AuthenticationError) as caught:
        create(client)
    assert caught.value.code == "invalid_api_key"
    client = client.with_options(api_key="t")
    for error, options in ((openai.BadRequestError, {"temperature": 9}), (openai.BadRequestError, {"max_tokens": 1000}),
                           (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
                           (openai.NotFoundError, {"model": "gpt-4"}), (openai.APIStatusError, {"user": "x" * 2**20})):
        with pytest.raises(error) as caught:
            create(client, **options)
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, messages=[{"role": "user", "content": "x" * 1000}])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_busy_and_stopping_servers_are_the_client_s_exceptions():
    engine = FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01, max_batch=1)
    with live(create_app(lambda: engine, Settings(queue=1, drain=0.1))) as server:
        client = client_for(server)
        stream = create(client, stream=True)
        next(stream)
        waiting = threading.Thread(target=lambda: pytest.raises(openai.InternalServerError, create, client))
        waiting.start()
        until(lambda: server.pool.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            create(client)
        assert int(caught.value.response.headers["retry-after"]) > 0
        server.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        waiting.join()


@pytest.mark.parametrize("engine, code", [
    (FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01), "timeout"),
    (FakeEngine(failing_steps=1), "engine_error")])
def test_what_the_engine_has_worked_on_in_vain_is_not_asked_again(engine, code):
    with live(create_app(lambda: engine, Settings(request_timeout=0.05))) as server:
        client = client_for(server, max_retries=openai.DEFAULT_MAX_RETRIES)
        with pytest.raises(openai.InternalServerError) as caught:
            create(client)
        assert caught.value.code == code
        asked = [request for request in engine.submitted if request.prompt != [engine.tokenizer.bos_id]]
        assert len(asked) == 1  # and the trial of an engine that has failed


def test_a_client_that_closes_its_stream_frees_the_pages(serving):
    model = random_model()
    forward = model.forward_paged
    model.forward_paged = lambda *args: time.sleep(0.02) or forward(*args)  # 60 tokens take longer than to close
    client = serving(model)
    stream = create(client, stream=True, max_tokens=60, extra_body={"ignore_eos": True})
    next(stream)
    stream.close()  # the fixture checks the pages

    def metrics():
        with urllib.request.urlopen(str(client.base_url.join("/metrics"))) as answer:
            return answer.read().decode()

    until(lambda: 'nanochat_request_failures_total{code="disconnected"} 1.0' in metrics())
