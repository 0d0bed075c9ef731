"""The server's JSON, with an engine that says what it is told: OpenAI's shapes, streams, extras, and refusals."""

import json
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine, client_of

from nanochat.common import UserError
from nanochat.engine import Completion, SamplingParams
from nanochat.engine.request import Times
from nanochat.server.answers import timings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = (("text", "It is "), ("tool", "37+85", "122"), ("text", "122."), ("finish", "stop"))


@pytest.fixture
def server():
    """Start a server whose engine has the given options; returns its client."""
    opened = []

    def start(*reply, settings=None, **options):
        client = client_of(FakeEngine(*reply, **options), **(settings or {}))
        opened.append(client)
        return client.__enter__()

    yield start
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def hello():
    """A client of a server that says Hello to everything."""
    with client_of(FakeEngine()) as client:
        yield client


def engine_of(client):
    return client.app.state.pool.engines[0]


def post(client, path=CHAT, **body):
    body = {"prompt": "hi", **body} if path == TEXT else {"messages": HI, **body}
    return client.post(path, json=body)


def chunks(client, path=CHAT, **body):
    """The stream's chunks, after checking what holds for every stream."""
    response = post(client, path, stream=True, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
    events = [event for event in response.text.split("\n\n") if event and not event.startswith(":")]
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
    found = [json.loads(event[6:]) for event in events[:-1]]
    assert len({chunk["id"] for chunk in found if "id" in chunk}) == 1
    return found


def error(response, status, code=None):
    """The error's body, after checking its shape and status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert code is None or response.json()["error"]["code"] == code
    return response.json()["error"]


# --- answers --------------------------------------------------------------------------------------


def test_a_whole_chat_answer(hello):
    answer = post(hello, n=2, seed=5).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "nanochat" and answer["seed"] == 5
    message = {"role": "assistant", "content": "Hello", "refusal": None, "tool_trace": []}
    assert answer["choices"] == [{"index": i, "message": message, "finish_reason": "stop", "logprobs": None}
                                 for i in (0, 1)]
    prompt = len("hi") + 4  # <|bos|><|user_start|>hi<|user_end|><|assistant_start|>
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4,
                               "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["timings"]["predicted_n"] == 4 and answer["timings"]["prompt_n"] == prompt


def test_a_streamed_chat_answer(hello):
    first, *middle, last = chunks(hello, seed=5)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and first["seed"] == 5
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [{"content": "Hel"}, {"content": "lo"}]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *middle))
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last["timings"]["predicted_n"] == 2 and last["seed"] == 5
    assert {chunk["object"] for chunk in (first, *middle, last)} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in (first, *middle, last))


def test_streamed_choices_carry_their_index(server):
    def reply(prompt, sample):
        return ("text", f"{sample}!"), ("finish", "stop")

    for path, text in ((CHAT, lambda choice: choice["delta"].get("content")), (TEXT, lambda choice: choice["text"])):
        said = {}
        for chunk in chunks(server(reply), path, n=3):
            for choice in chunk["choices"]:
                said.setdefault(choice["index"], []).append(text(choice) or "")
        assert {i: "".join(pieces) for i, pieces in said.items()} == {0: "0!", 1: "1!", 2: "2!"}


def test_usage_comes_in_a_chunk_of_its_own(hello):
    *others, last = chunks(hello, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2 and "timings" in last
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in others)
    for options in (None, {}, {"include_usage": None}, {"include_usage": False}):
        assert not any("usage" in chunk for chunk in chunks(hello, stream_options=options))


@pytest.mark.parametrize("reason, shown", [("stop", "stop"), ("length", "length"), ("context", "length")])
def test_finish_reasons_are_true(server, reason, shown):
    client = server((("text", "a"), ("finish", reason)))
    assert post(client).json()["choices"][0]["finish_reason"] == shown
    assert chunks(client)[-1]["choices"][0]["finish_reason"] == shown


@pytest.mark.parametrize("reason, code", [("timeout", "timeout"), ("error", "engine_error"), ("abort", "cancelled")])
def test_an_answer_that_breaks_off_is_an_error(server, reason, code):
    client = server((("text", "a"), ("finish", reason)))
    assert error(post(client), 503, code)["type"] == "service_unavailable_error"
    assert chunks(client)[-1]["error"]["code"] == code  # [DONE] follows: chunks() checks it


def test_tool_calls_are_shown_beside_the_text(server):
    client = server(TOOL)
    call = {"input": "37+85", "output": "122"}
    message = post(client).json()["choices"][0]["message"]
    assert message["content"] == "It is 122." and message["tool_trace"] == [call]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(client)]
    assert deltas[1:-1] == [{"content": "It is "}, {"tool_trace": [call]}, {"content": "122."}]
    choice = post(client, TEXT).json()["choices"][0]
    assert choice["text"] == "It is 122." and choice["tool_trace"] == [call]
    assert [chunk["choices"][0].get("tool_trace") for chunk in chunks(client, TEXT)] == [None, [call], None, None]


def test_log_probabilities(server):
    two_bytes = "é".encode()
    reply = (("token", 65, -0.5, ((65, -0.5), (66, -1.5))), ("text", "A"),
             ("token", two_bytes[0], -1.0, ((67, float("-inf")),)),
             ("token", two_bytes[1], -2.0, ()), ("text", "é"),
             ("token", two_bytes[0], -3.0, ()), ("finish", "length"))
    client = server(reply)
    content = post(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {"token": "A", "logprob": -0.5, "bytes": [65],
                          "top_logprobs": [{"token": "A", "logprob": -0.5, "bytes": [65]},
                                           {"token": "B", "logprob": -1.5, "bytes": [66]}]}
    assert [token["bytes"] for token in content] == [[65], [195], [169], [195]]
    assert content[1]["top_logprobs"][0]["logprob"] == -9999.0  # JSON has no infinity
    streamed = [choice["logprobs"]["content"] for chunk in chunks(client, logprobs=True, top_logprobs=2)
                for choice in chunk["choices"]]
    assert [len(tokens) for tokens in streamed] == [0, 1, 2, 1, 0]
    assert [token for tokens in streamed for token in tokens] == content

    logprobs = post(client, TEXT, logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["A", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xc3"]
    assert logprobs["token_logprobs"] == [-0.5, -1.0, -2.0, -3.0] and logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"A": -0.5, "B": -1.5}
    assert engine_of(client).submitted[0].params.logprobs == 2
    assert post(client).json()["choices"][0]["logprobs"] is None


def test_timings_are_exact():
    def sample(started, first_token, done, tokens, cached):
        return Completion([0] * tokens, [], [], "stop", "", [], prompt_tokens=10, cached_tokens=cached,
                          times=Times(0.5, started, first_token, done))

    job = SimpleNamespace(queued=0.0, params=SamplingParams(n=2), choices=4, completions=[
        sample(1.0, 2.0, 4.0, 5, 4), sample(1.0, 2.5, 6.0, 9, 4), sample(3.0, 3.5, 5.0, 2, 0),
        sample(3.0, None, 5.0, 0, 0)])
    assert timings(job) == {
        "cache_n": 4, "prompt_n": 16, "prompt_ms": 1000.0, "prompt_per_second": 16.0,
        "predicted_n": 16, "predicted_ms": 4000.0, "predicted_per_second": 3.25,  # 13 after each choice's first
        "queue_ms": 1000.0, "time_to_first_token_ms": 2000.0}
    job.completions, job.choices = [sample(None, None, 1.0, 0, 0)] * 2, 2  # no room for a token
    assert timings(job)["predicted_per_second"] == 0.0 and timings(job)["queue_ms"] == 1000.0


def test_events_are_ascii(server):
    """Some clients take U+2028 inside an event for the end of a line."""
    text = "a\u2028b\u0085c\r\nd\U0001f600"
    response = post(server((("text", text), ("finish", "stop"))), stream=True)
    assert response.text.isascii() and "\r" not in response.text
    assert json.loads(response.text.split("\n\n")[1][6:])["choices"][0]["delta"]["content"] == text


def test_completions_continue_texts_and_ids(server):
    client = server()
    answer = post(client, TEXT, prompt=["hi", "you"], n=2).json()
    assert answer["object"] == "text_completion" and [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0] == {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop",
                                    "tool_trace": []}
    assert answer["usage"]["prompt_tokens"] == 3 + 4 and answer["usage"]["completion_tokens"] == 8
    post(client, TEXT, prompt=[1, 2, 3])
    post(client, TEXT, prompt=[[1], [2, 3]])
    post(client, TEXT, prompt="")
    bos = engine_of(client).tokenizer.bos_id
    assert [request.prompt for request in engine_of(client).submitted] == [
        [bos, *b"hi"], [bos, *b"you"], [1, 2, 3], [1], [2, 3], [bos]]


def test_messages_are_rendered_as_the_tokenizer_does(server):
    client = server()
    tokenizer = engine_of(client).tokenizer
    conversation = [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "ho"}, *HI]
    post(client, messages=conversation)
    post(client, messages=[{**conversation[0], "role": "developer"}, *conversation[1:]])
    post(client, messages=[{**conversation[0], "content": [{"type": "text", "text": "Be "}, {
        "type": "text", "text": "brief."}]}, *conversation[1:]])
    want = tokenizer.render_for_completion({"messages": conversation})
    assert [request.prompt for request in engine_of(client).submitted] == [want] * 3


def test_sampling_reaches_the_engine(server):
    client = server()
    post(client, max_tokens=7, max_completion_tokens=8, temperature=0.25, top_k=3, top_p=0.5, min_p=0.125, n=2,
         stop=["a", "b"], seed=2**63 - 1, ignore_eos=True)
    post(client, max_tokens=7, stop="ab", temperature=1e-9, top_k=0, top_p=1)
    given, edges = (request.params for request in engine_of(client).submitted)
    assert (given.max_tokens, given.temperature, given.top_k, given.top_p, given.min_p, given.n, given.stop, given.seed,
            given.ignore_eos) == (8, 0.25, 3, 0.5, 0.125, 2, ("a", "b"), 2**63 - 1, True)
    assert (edges.max_tokens, edges.stop, edges.temperature, edges.top_k) == (7, ("ab",), 0.0, None)


def test_defaults_are_the_server_s_and_seeds_are_random(server):
    client = server(context=1024)
    seeds = {post(client, temperature=None).json()["seed"] for _ in range(4)}
    assert len(seeds) == 4 and max(seeds) < 2**53  # exact in JavaScript, too
    params = engine_of(client).submitted[0].params
    shown = client.get("/v1/models").json()["data"][0]["defaults"]
    assert {name: getattr(params, name) for name in shown} == shown
    assert engine_of(client).submitted[0].params.max_tokens == 512
    post(client, messages=[{"role": "user", "content": "x" * 900}])
    assert engine_of(client).submitted[-1].params.max_tokens == 1024 - 904  # as far as the context has room


def test_harmless_unknown_fields_are_ignored(hello):
    unknown = dict(user="u", metadata={"a": 1}, parallel_tool_calls=True, store=False, what=[[1]])
    assert post(hello, **unknown).status_code == 200
    neutral = dict(tools=[], tool_choice="none", response_format={"type": "text"}, frequency_penalty=0.0, logit_bias={},
                   presence_penalty=0, modalities=["text"], logprobs=False, stop=None)
    assert post(hello, **neutral).status_code == 200


@pytest.mark.parametrize("field", [
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"functions": [{}]}, {"tool_choice": "required"},
    {"response_format": {"type": "json_object"}}, {"frequency_penalty": 0.5}, {"presence_penalty": -1},
    {"repetition_penalty": 1.1}, {"logit_bias": {"50256": -100}}, {"modalities": ["audio"]}, {"audio": {"voice": "x"}},
    {"web_search_options": {}},
])
def test_fields_that_would_change_the_answer_are_refused(hello, field):
    (name,) = field
    found = error(post(hello, **field), 400, "unsupported_value")
    assert found["param"].split(".")[0] == name and "must be left out" in found["message"]


@pytest.mark.parametrize("field", [{"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"logit_bias": {"1": 1}}])
def test_completion_fields_that_would_change_the_answer_are_refused(hello, field):
    error(post(hello, TEXT, **field), 400, "unsupported_value")


def test_models_health_and_the_schema(server):
    client = server()
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "nanochat" and model["object"] == "model" and model["max_model_len"] == 1024
    assert client.get("/v1/models/nanochat").json() == model
    error(client.get("/v1/models/gpt-4"), 404, "model_not_found")
    assert client.get("/health").json() == {"status": "ok"}
    for path in ("/health", "/", "/static/main.js"):  # `wget --spider` and some load balancers ask so
        assert client.head(path).status_code == 200
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/health", "/metrics", "/v1/models", "/v1/models/{model}", CHAT, TEXT}
    assert "422" not in schema["paths"][CHAT]["post"]["responses"]


def test_metrics_count(server):
    client = server(TOOL)
    post(client, n=2)
    post(client, n=0)
    text = client.get("/metrics").text
    for line in ('request_success_total{finished_reason="stop"} 2.0', "prompt_tokens_total 6.0",
                 "generation_tokens_total 6.0", 'tool_calls_total{result="answered"} 2.0',
                 'http_responses_total{status="400"} 1.0', "e2e_request_latency_seconds_count 2.0",
                 "num_requests_running 0.0", "num_requests_waiting 0.0", "kv_cache_usage_perc 0.0",
                 "time_to_first_token_seconds_count 2.0", "num_preemptions_total 0.0"):
        assert f"nanochat_{line}\n" in text


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, param", [
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k"), ({"top_k": 1.0}, "top_k"),
    ({"top_k": True}, "top_k"), ({"min_p": 1}, "min_p"), ({"n": 0}, "n"), ({"n": 17}, "n"),
    ({"n": True}, "n"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"seed": 0.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"), ({"max_tokens": 10**30}, "max_tokens"),
    ({"stop": ""}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": ["a", 1]}, "stop.1"),
    ({"stop": "x" * 257}, "stop"),
    ({"stream": 1}, "stream"), ({"stream": "true"}, "stream"), ({"top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"), ({"model": 5}, "model"), ({"stream_options": []}, "stream_options"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": HI * 501}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content.0"),
])
def test_values_outside_their_range_are_named(hello, body, param):
    found = error(post(hello, **body), 400, "invalid_value")
    assert found["param"] == param and found["message"].startswith(f"{param}: ")
    assert found["type"] == "invalid_request_error"


IDS_OR_TEXTS = "prompt: must be a string, or a list of strings, of token ids or of lists of token ids"


@pytest.mark.parametrize("path, body, sentence", [
    (CHAT, {"stop": ["a"] * 5}, "stop: list should have at most 4 items"), (CHAT, {"stop": ""}, "stop: string should"),
    (CHAT, {"stop": ["a", 1]}, "stop.1: input should be a valid string, got 1"),
    (CHAT, {"stop": 5}, "stop: must be a string or a list of strings, got 5"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]},
     "messages.0.content: must be a string or a list of text parts, got 5"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages.0.content.0.text: field required"),
    (TEXT, {"prompt": ["a"] * 17}, "prompt: list should have at most 16 items"),
    (TEXT, {"prompt": [[1]] * 17}, "prompt: list should have at most 16 items"),
    (TEXT, {"prompt": []}, "prompt: list should have at least 1 item"),
    (TEXT, {"prompt": ["a", 1, "b"]}, "prompt.1: input should be a valid string, got 1"),
    (TEXT, {"prompt": [1] * 100 + ["a"]}, "prompt.100: input should be a valid integer, got 'a'"),
    (TEXT, {"prompt": [1] * 100 + [-1]}, "prompt.100: input should be greater than or equal to 0, got -1"),
    (TEXT, {"prompt": [[1], []]}, "prompt.1: list should have at least 1 item"),
    (TEXT, {"prompt": [[1], [2, "a"]]}, "prompt.1.1: input should be a valid integer, got 'a'"),
    (TEXT, {"prompt": 5}, f"{IDS_OR_TEXTS}, got 5"), (TEXT, {"prompt": [None]}, f"{IDS_OR_TEXTS}, got [None]"),
])
def test_where_several_types_are_taken_the_rule_is_that_of_the_one_meant(hello, path, body, sentence):
    assert error(post(hello, path, **body), 400, "invalid_value")["message"].startswith(sentence)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "assistant"], ["user", "user"], ["system"],
                                   ["user", "system", "user"], ["system", "system", "user"],
                                   ["assistant", "user"], ["system", "assistant", "user"]])
def test_turns_out_of_order_are_refused(hello, roles):
    error(post(hello, messages=[{"role": role, "content": "x"} for role in roles]), 400, "invalid_value")


def test_what_does_not_fit_the_context_is_refused_with_numbers(server):
    client = server(context=100)
    found = error(post(client, max_tokens=95), 400, "context_length_exceeded")
    assert "100" in found["message"] and "got 6 for the prompt and 95 for the answer" in found["message"]
    assert post(client, max_tokens=94).status_code == 200
    long = [{"role": "user", "content": "x" * 96}]
    assert error(post(client, messages=long), 400, "context_length_exceeded")["param"] == "messages"
    found = error(post(client, TEXT, prompt=["a", "x" * 100], max_tokens=1), 400, "context_length_exceeded")
    assert found["param"] == "prompt"


def test_more_choices_than_allowed_are_refused(hello):
    error(post(hello, TEXT, prompt=["a"] * 5, n=4), 400, "invalid_value")
    assert post(hello, TEXT, prompt=["a"] * 4, n=4).status_code == 200


def test_another_model_is_not_found(hello):
    assert error(post(hello, model="gpt-4"), 404, "model_not_found")["param"] == "model"
    assert post(hello, model="nanochat").status_code == 200


def test_what_the_engine_refuses_is_the_client_s_mistake(server):
    found = error(post(server(refuse=UserError("the pool has 3 pages")), stream=True), 400)
    assert found["message"] == "the pool has 3 pages"


def test_of_several_prompts_one_that_is_refused_takes_the_others_along(server):
    client = server()
    error(post(client, TEXT, prompt=[[1, 2], [99_999]]), 400)
    assert [request.prompt for request in engine_of(client).aborted] == [[1, 2]]
    assert post(client).status_code == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"messages": NaN}', b'{"a": "\xed\xa0\x80"}', b"[" * 100_000,
    b'{"a": ' * 5000 + b"1" + b"}" * 5000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"1" * 5000,
    b'{"messages": [{"role": "user", "content": "hi"}], "n": 1e999}', b'\xef\xbb\xbf{}',
    b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
])
def test_a_body_that_is_no_sound_json_is_refused(hello, body):
    error(hello.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken(hello, kind):
    """Another content type needs no permission from the browser: any page could send it here."""
    content = json.dumps({"messages": HI}).encode()
    error(hello.post(CHAT, content=content, headers={"content-type": kind}), 400)


def test_unknown_routes_and_methods(server):
    client = server()
    for path in ("/v1/nothing", "/v1/chat/completions/", "/docs", "/redoc", "/static/nothing.js"):
        error(client.get(path), 404, "not_found")
    assert error(client.get(CHAT), 405, "method_not_allowed") and client.get(CHAT).headers["allow"] == "POST"
