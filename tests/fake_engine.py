"""An engine without a model, for the server: every request gets the events it is told to, one a step."""

import math
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

from starlette.testclient import TestClient

from nanochat.engine import Completion
from nanochat.engine.request import Times
from nanochat.server import Settings, create_app
from nanochat.server.serve import Server, listen
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

VOCAB = 256 + len(SPECIAL_TOKENS)
HELLO = (("text", "Hel"), ("text", "lo"), ("finish", "stop"))


def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train(["no merges"], VOCAB)


def endless(event):
    """A reply that never ends by itself."""
    while True:
        yield event


class FakeRequest:
    """The events of n samples, and what of them has been said."""

    def __init__(self, prompt, params, replies, deadline):
        self.prompt, self.params, self.deadline = prompt, params, deadline
        self.replies = [iter(reply) for reply in replies]
        self.said = [[] for _ in replies]
        self.new = []
        self.queued = self.started = time.monotonic()

    @property
    def done(self):
        return all(said and said[-1][0] == "finish" for said in self.said)

    def say(self, i, event):
        if event and not (self.said[i] and self.said[i][-1][0] == "finish"):
            self.said[i].append(event)
            self.new.append((i, event))

    def take_events(self):
        new, self.new = self.new, []
        return new

    def completions(self):
        return [self._completion(said) for said in self.said]

    def _completion(self, said):
        tokens = [event for event in said if event[0] in ("text", "tool")]
        now = time.monotonic()
        times = Times(self.queued, self.started, self.started, now)
        text = "".join(event[1] for event in said if event[0] == "text")
        calls = [event[1:] for event in said if event[0] == "tool"]
        return Completion([0] * len(tokens), [1] * len(tokens), [0.0] * len(tokens), said[-1][1], text, calls,
                          prompt_tokens=len(self.prompt), times=times)


class FakeEngine:
    """reply: events, or a function from (prompt as text, sample) to them. step_seconds: how long a step sleeps.

    An event None says nothing in its step, as in prefill. refuse: the exception that `submit` raises.
    failing_steps: how many steps raise. gate: steps wait while it is cleared.
    """

    def __init__(self, reply=HELLO, *, step_seconds=0.0, max_batch=64, context=1024, refuse=None,
                 failing_steps=0):
        self.reply = reply if callable(reply) else lambda prompt, sample: reply
        self.step_seconds, self.max_batch, self.context, self.refuse = step_seconds, max_batch, context, refuse
        self.failing_steps = failing_steps
        self.gate = threading.Event()
        self.gate.set()
        self.tokenizer, self.tools = byte_tokenizer(), "calculator"
        self.requests: list[FakeRequest] = []
        self.submitted: list[FakeRequest] = []
        self.aborted: list[FakeRequest] = []
        self.waiting = []
        self.steps = 0

    @property
    def running(self):
        return [said for request in self.requests for said in request.said]

    @property
    def pool(self):
        return SimpleNamespace(live=len(self.running), total=100)

    def submit(self, prompt, params, timeout=math.inf):
        if self.refuse:
            raise self.refuse
        text = self.tokenizer.decode(prompt)
        replies = [self.reply(text, sample) for sample in range(params.n)]
        request = FakeRequest(prompt, params, replies, time.monotonic() + timeout)
        self.requests.append(request)
        self.submitted.append(request)
        return request

    def step(self):
        self.gate.wait(10)
        self.steps += 1
        if self.failing_steps:
            self.failing_steps -= 1
            raise RuntimeError("a step that fails")
        time.sleep(self.step_seconds)
        for request in self.requests:
            for i, reply in enumerate(request.replies):
                late = time.monotonic() > request.deadline
                request.say(i, ("finish", "timeout") if late else next(reply, ("finish", "length")))
        self.requests = [request for request in self.requests if not request.done]

    def abort(self, request):
        for i in range(len(request.said)):
            request.say(i, ("finish", "abort"))
        if request in self.requests:
            self.requests.remove(request)
            self.aborted.append(request)

    def reset(self):
        for request in list(self.requests):
            self.abort(request)

    def stats(self):
        return {"steps": self.steps, "preemptions": 0, "cached_tokens": 0}


@contextmanager
def client_of(engine, **settings):
    """A client of an app in this process, without a socket."""
    app = create_app(lambda: engine, Settings(**settings))
    with TestClient(app, base_url="http://localhost") as client:
        until(lambda: app.state.pool.state != "loading")
        yield client
    assert_ended(app)


@contextmanager
def live(app, loaded=True):
    """Serve the app on a free loopback port, in a thread; yields the server, whose `url` is where."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(app)
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started and (not loaded or app.state.pool.state != "loading"))
            yield server
        finally:
            server.stop()
            thread.join()
    assert_ended(app)


def assert_ended(app):
    assert not [worker for worker in app.state.pool.workers if worker.is_alive()]


def until(condition, seconds=10.0):
    """Wait for the condition; fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
