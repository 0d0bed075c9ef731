"""The server on a real socket: streams that leave, wait, read slowly or break off, the queue, loading, stopping."""

import asyncio
import json
import random
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from fake_engine import FakeEngine, endless, live, until

from nanochat.common import UserError
from nanochat.engine import SamplingParams
from nanochat.server import Settings, create_app
from nanochat.server.errors import ApiError
from nanochat.server.job import Job
from nanochat.server.serve import Protocol, serve

HI = {"messages": [{"role": "user", "content": "hi"}]}


@contextmanager
def serving(*engines, **settings):
    """Serve the engines; yields the server."""
    app = create_app([lambda engine=engine: engine for engine in engines], Settings(**settings))
    with live(app) as server:
        yield server


class Client:
    """One connection, one request, read as it comes."""

    def __init__(self, server, body=b"", path="/v1/chat/completions", method="POST", **headers):
        self.socket = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)
        self.data = b""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body),
                 "Connection": "close", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    def read_until(self, text):
        while text.encode() not in self.data:
            new = self.socket.recv(65536)
            assert new, f"the server closed before {text!r}: {self.data[-500:]}"
            self.data += new
        return self

    def rest(self):
        """Return everything up to the end of the connection, as text."""
        while new := self.socket.recv(65536):
            self.data += new
        self.socket.close()
        return self.data.decode()

    def leave(self):
        self.socket.close()


def status(text):
    return int(text.split(" ", 2)[1])


def get(server, path):
    return Client(server, path=path, method="GET").rest()


def ask(server, stream=True, **body):
    return Client(server, {**HI, "stream": stream, **body})


def is_idle(server):
    pool = server.pool
    return not (pool.jobs or pool.waiting or any(engine.requests for engine in pool.engines))


# --- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("event", [("text", "x"), None], ids=["decode", "prefill"])
def test_a_client_that_leaves_frees_its_row_within_two_steps(stream, event):
    engine = FakeEngine(lambda *_: endless(event), step_seconds=0.05)
    with serving(engine) as server:
        client = ask(server, stream)
        until(lambda: engine.steps >= 2)
        client.leave()
        before = engine.steps
        until(lambda: engine.aborted)
        assert engine.steps - before <= 2
        until(lambda: 'nanochat_request_failures_total{code="disconnected"} 1.0' in get(server, "/metrics"))
        assert is_idle(server)


def test_a_client_that_leaves_the_queue_never_reaches_the_engine():
    engine = FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01, max_batch=1)
    with serving(engine) as server:
        first = ask(server).read_until("content")
        second = ask(server)
        until(lambda: server.pool.waiting == 1)
        second.leave()
        until(lambda: server.pool.waiting == 0)
        first.leave()
        until(lambda: is_idle(server))
        assert len(engine.submitted) == 1


def test_a_client_that_does_not_read_loses_its_request():
    engine = FakeEngine(lambda *_: endless(("text", "x" * 20_000)), step_seconds=0.001)
    with serving(engine) as server:
        client = ask(server)
        until(lambda: engine.aborted and not engine.requests)
        client.leave()
        until(lambda: 'request_failures_total{code="slow_reader"} 1.0' in get(server, "/metrics"))
        assert is_idle(server)


def test_unread_output_counts_until_it_is_read():
    async def story():
        job = Job([[1]], SamplingParams(), buffer_bytes=1000)
        reader, event = aiter(job), (0, ("text", "x" * 100))
        for _ in range(10):
            job.receive([event, event], [])
            assert [await anext(reader), await anext(reader)] == [event, event]
        assert not job.done
        job.receive([event] * 3, [])
        assert job.cancelled and job.error.code == "slow_reader" and job.error.headers == {"x-should-retry": "false"}
        with pytest.raises(ApiError):
            await anext(reader)

    asyncio.run(story())


def test_a_client_that_does_not_read_loses_its_connection(monkeypatch, capfd):
    monkeypatch.setattr("nanochat.server.serve.HEADER_SECONDS", 0.2)
    engine = FakeEngine(lambda *_: endless(("text", "x" * 20_000)), step_seconds=0.001)
    with serving(engine, send_timeout=0.5) as server:
        client = ask(server)
        until(lambda: not server.server_state.connections)
        assert "Traceback" not in capfd.readouterr().err
        client.leave()
        assert status(ask(server, max_tokens=1).read_until("content").data.decode()) == 200


# --- streaming ------------------------------------------------------------------------------------


def test_text_arrives_while_the_engine_still_works_on_the_rest():
    def reply(prompt, sample):
        yield "text", "early"
        engine.gate.clear()  # for the steps after this one
        yield None
        yield "text", "late"
        yield "finish", "stop"

    engine = FakeEngine(reply)
    with serving(engine) as server:
        client = ask(server).read_until("early")
        assert b"late" not in client.data
        assert status(get(server, "/health")) == 200  # a step that takes long does not hold up the event loop
        engine.gate.set()
        assert client.rest().endswith("data: [DONE]\n\n\r\n0\r\n\r\n")


def test_silence_is_filled_with_pings():
    engine = FakeEngine()
    engine.gate.clear()
    with serving(engine, ping=0.05) as server:
        client = ask(server).read_until(": ping\n\n")
        engine.gate.set()
        client.read_until("[DONE]")


def test_many_streams_at_once_each_get_their_own_text():
    def reply(prompt, sample):
        name = prompt[prompt.index("user-"):][:8]
        return (*(("text", f"{name}:{i} ") for i in range(10)), ("finish", "stop"))

    with serving(FakeEngine(reply, step_seconds=0.02, max_batch=64)) as server:
        clients = [ask(server, messages=[{"role": "user", "content": f"user-{i:03}"}]) for i in range(48)]
        for i, client in enumerate(clients):
            deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in client.rest().splitlines()
                      if line.startswith("data: {")]
            assert "".join(delta.get("content", "") for delta in deltas) == "".join(
                f"user-{i:03}:{k} " for k in range(10))


# --- the queue ------------------------------------------------------------------------------------


def test_a_full_queue_answers_429_and_when_to_come_again():
    engine = FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01, max_batch=1)
    with serving(engine, queue=2) as server:
        clients = [ask(server).read_until("content")]
        for waiting in (1, 2):
            clients.append(ask(server))
            until(lambda: server.pool.waiting == waiting)
        for stream in (True, False):
            text = ask(server, stream).rest()
            assert status(text) == 429 and "retry-after: " in text and '"code":"queue_full"' in text
        for client in clients:
            client.leave()
        until(lambda: is_idle(server))


def test_waiting_has_an_end():
    engine = FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01, max_batch=1)
    with serving(engine, queue_timeout=0.1) as server:
        first = ask(server).read_until("content")
        text = ask(server).rest()
        assert status(text) == 503 and '"code":"queue_timeout"' in text and "retry-after: " in text
        assert server.pool.waiting == 0
        first.leave()


def test_two_engines_share_one_queue():
    engines = [FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01, max_batch=3) for _ in range(2)]
    with serving(*engines) as server:
        clients = [ask(server).read_until("content") for _ in range(4)]
        assert [len(engine.requests) for engine in engines] == [2, 2]
        clients += [ask(server).read_until("content") for _ in range(2)]
        waiting = ask(server)
        until(lambda: server.pool.waiting == 1)
        clients.pop().leave()
        waiting.read_until("content")  # takes the place that has become free
        for client in (*clients, waiting):
            client.leave()


def test_an_engine_that_works_too_long_on_a_request_gives_it_up():
    engine = FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01)
    with serving(engine, request_timeout=0.05) as server:
        assert '"code":"timeout"' in ask(server).read_until("[DONE]").data.decode()
        text = ask(server, stream=False).rest()
        assert status(text) == 503 and '"code":"timeout"' in text
        assert "x-should-retry: false" in text and "retry-after" not in text


# --- loading, failing, stopping -------------------------------------------------------------------


def test_while_the_model_loads_requests_are_told_so():
    loaded = threading.Event()

    def factory():
        loaded.wait(10)
        return FakeEngine()

    app = create_app(factory, Settings())
    with live(app, loaded=False) as server:
        for text in (get(server, "/health"), ask(server).rest(), get(server, "/v1/models")):
            assert status(text) == 503 and '"code":"loading"' in text and "retry-after: " in text
        text = Client(server, path="/health", method="HEAD").rest()
        assert status(text) == 503 and text.endswith("\r\n\r\n")
        assert status(get(server, "/metrics")) == 200
        loaded.set()
        until(lambda: status(get(server, "/health")) == 200)
        assert "Hel" in ask(server).rest()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_sentence():
    def factory():
        raise UserError("there is no tokenizer at /nowhere")

    app = create_app(factory, Settings())
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UserError, match="there is no tokenizer at"):
        serve(app, listener)


def test_a_failed_step_fails_its_requests_and_no_later_ones(caplog):
    engine = FakeEngine(failing_steps=1)
    with serving(engine) as server:
        text = ask(server, stream=False).rest()
        assert status(text) == 503 and '"code":"engine_error"' in text and "a step that fails" not in text
        assert "x-should-retry: false" in text and "retry-after" not in text
        assert "a step that fails" in caplog.text
        assert 'nanochat_request_failures_total{code="engine_error"} 1.0' in get(server, "/metrics")
        assert status(ask(server, stream=False).rest()) == 200
        assert is_idle(server)


@pytest.mark.parametrize("fault", [{"failing_steps": 1000}, {"refuse": RuntimeError("no more")}])
def test_an_engine_that_keeps_failing_ends_the_server(fault):
    with serving(FakeEngine(**fault)) as server:
        assert '"code":"engine_error"' in ask(server).rest()
        until(lambda: server.should_exit)
        assert server.pool.state == "failed" and "failed again" in server.pool.failure


def test_a_stopping_server_lets_answers_finish_and_takes_no_new_ones():
    engine = FakeEngine((*(("text", f"{i} ") for i in range(30)), ("finish", "stop")), step_seconds=0.01, max_batch=1)
    with serving(engine) as server:
        running = ask(server).read_until('"0 "')
        waiting = ask(server)
        until(lambda: server.pool.waiting == 1)
        server.stop()
        text = running.rest()
        assert '"29 "' in text and '"finish_reason":"stop"' in text and "[DONE]" in text
        text = waiting.rest()
        assert status(text) == 503 and '"code":"draining"' in text
        with pytest.raises(OSError):
            ask(server)


def test_a_stopping_server_cuts_off_what_takes_too_long():
    engine = FakeEngine(lambda *_: endless(("text", "x")), step_seconds=0.01)
    with serving(engine, drain=0.2) as server:
        clients = [ask(server).read_until("content"), ask(server, stream=False)]
        until(lambda: len(engine.requests) == 2)
        server.stop()
        streamed, whole = (client.rest() for client in clients)
        events = [line for line in streamed.splitlines() if line.startswith("data: ")]
        assert '"code":"draining"' in events[-2] and events[-1] == "data: [DONE]"
        assert status(whole) == 503 and '"code":"draining"' in whole


# --- bodies and connections -----------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_before_it_is_read():
    with serving(FakeEngine()) as server:
        announced = Client(server, **{"Content-Length": 2**20 + 1})
        assert status(announced.rest()) == 413
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        chunked = Client(server, **{"Content-Length": None, "Transfer-Encoding": "chunked"})
        with pytest.raises(OSError):  # the server hangs up long before a gigabyte
            for _ in range(16_384):
                chunked.socket.sendall(chunk)
        exact = json.dumps({**HI, "user": ""}).encode()
        exact = exact[:-2] + b"x" * (2**20 - len(exact)) + exact[-2:]
        assert len(exact) == 2**20 and status(Client(server, exact).rest()) == 200


def test_the_status_of_a_chunked_body_over_the_limit_is_413():
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with serving(FakeEngine()) as server:
        client = Client(server, **{"Content-Length": None, "Transfer-Encoding": "chunked"})
        client.socket.sendall(chunk * 17)
        assert status(client.read_until("\r\n\r\n").data.decode()) == 413


def test_a_client_that_never_asks_is_hung_up_on(monkeypatch):
    monkeypatch.setattr("nanochat.server.serve.HEADER_SECONDS", 0.1)
    monkeypatch.setattr("nanochat.server.transport.BODY_SECONDS", 0.1)
    with serving(FakeEngine(step_seconds=0.2)) as server:
        silent = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)
        silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
        half = Client(server, b"{", **{"Content-Length": 10})
        patient = ask(server)
        assert silent.recv(100) == b""
        assert status(half.rest()) == 408
        assert "[DONE]" in patient.rest()  # a request under way may take its time
        silent.close()


def test_only_a_connection_without_a_request_between_two_looks_is_idle():
    protocol, transport = Protocol.__new__(Protocol), Mock(**{"is_closing.return_value": False})
    protocol.loop, protocol.transport, protocol.idle_after = Mock(), transport, protocol
    busy, answered, answered_too = (SimpleNamespace(response_complete=done) for done in (False, True, True))
    for cycle in (None, answered, answered_too, busy, busy, answered, busy):  # used, though idle at most looks
        protocol.cycle = cycle
        protocol._look()
    assert not transport.close.called
    for cycle in (answered_too, answered_too):
        protocol.cycle = cycle
        protocol._look()
    assert transport.close.call_count == 1 and not transport.abort.called
    transport.is_closing.return_value = True
    protocol._look()
    assert transport.abort.call_count == 1 and protocol.loop.call_later.call_count == 10


def test_whatever_clients_do_the_engine_is_idle_afterwards():
    engine = FakeEngine(lambda prompt, sample: (*[("text", "x" * 100)] * 50, ("finish", "stop")), step_seconds=0.001,
                        max_batch=4)
    dice = random.Random(0)

    def visit(server, action):
        if action == "garbage":
            Client(server, dice.randbytes(200)).rest()
        elif action == "half":
            Client(server, b'{"messages": ', **{"Content-Length": 5000}).leave()
        elif action == "leave":
            client = ask(server)
            for _ in range(dice.randrange(3)):
                client.socket.recv(500)
            client.leave()
        else:
            assert status(ask(server, stream=action == "stream").rest()) in (200, 429)

    with serving(engine, queue=8) as server:
        actions = dice.choices(["garbage", "half", "leave", "stream", "whole"], k=60)
        threads = [threading.Thread(target=visit, args=(server, action)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: is_idle(server))
        assert status(ask(server).rest()) == 200
