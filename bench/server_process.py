"""The server in a process of its own, for bench_server.py and its tests.

    python -m bench.server_process paced    # no model: 1 ms a step, a word for every row
    python -m bench.server_process tiny     # the engine itself over a random model of 4 layers, 16 rows

It prints its port; SIGTERM ends it, and then it prints how many pages are still held.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil

from nanochat.common import run_script

ROOT = Path(__file__).resolve().parent.parent
STEP_SECONDS = 0.001
START_SECONDS = 120.0
WORDS = [f"{i} " for i in range(4096)]  # what a row of the paced engine says


class Process:
    """A running server: its port, and what can be known of it from outside."""

    def __init__(self, child: subprocess.Popen, log: Path):
        self.child, self.log = child, log
        self.port = int(child.stdout.readline())
        self.system = psutil.Process(child.pid)
        self.held: int | None = None  # pages, once it has ended

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def rss(self) -> float:
        """Return its resident memory in MiB."""
        return self.system.memory_info().rss / 2**20

    @property
    def files(self) -> int:
        """Return how many files it has open, sockets among them."""
        return self.system.num_fds()

    def metrics(self) -> dict[str, float]:
        """Return /metrics as {name with labels: value}."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def answered(self, status: str) -> int:
        """Return how many answers it counted whose status matches the regular expression."""
        pattern = re.compile(rf'nanochat_http_responses_total{{status="{status}"}}')
        return int(sum(value for name, value in self.metrics().items() if pattern.fullmatch(name)))

    def busy(self) -> bool:
        """Say whether a request is in the queue or the engine, or a row holds pages."""
        metrics = self.metrics()
        return any(metrics[f"nanochat_{name}"] for name in (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def wait_idle(self, seconds: float) -> bool:
        """Wait until it is not busy any more; say whether that came true."""
        deadline = time.monotonic() + seconds
        while busy := self.busy():
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return not busy

    def mistakes(self) -> int:
        """Return how many tracebacks its log has."""
        return self.log.read_text(encoding="utf-8").count("Traceback (most recent call last)")


@contextmanager
def server(engine: str) -> Iterator[Process]:
    """Run the server; `held` is known behind the block."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file, subprocess.Popen(
                [sys.executable, "-m", "bench.server_process", engine], cwd=ROOT, stdout=subprocess.PIPE, stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
            try:
                process = Process(child, log)
                _wait_ready(process)
                yield process
                child.terminate()
                process.held = json.loads(child.stdout.read())["held"]
            finally:
                child.kill()


def _wait_ready(process: Process) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.child.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{process.url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {process.log.read_text(encoding='utf-8')}")


# --- in the server's process ------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=["paced", "tiny"])
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from nanochat.server import Defaults, Settings, create_app
    from nanochat.server.serve import listen, serve

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
    engine = PacedEngine() if args.engine == "paced" else tiny_engine()
    app = create_app(lambda: engine, Settings(queue=4 * engine.max_batch, defaults=Defaults(max_tokens=16)))
    with listen("127.0.0.1", 0) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(app, listener)
    engine.check()
    print(json.dumps({"held": engine.pool.live}))


def tiny_engine():
    from bench import bench_engine
    from nanochat.engine import Engine

    model, tokenizer, _ = bench_engine.random_tiny(bench_engine.parse_args(["--device", "cpu"]))
    return Engine(model, tokenizer, max_batch=16)


class PacedEngine:
    """What the server needs of an engine, without a model: one choice per request, as many words as asked for."""

    max_batch, context, tools, waiting = 1024, 4096, "off", ()

    def __init__(self):
        from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

        self.tokenizer = Tokenizer.train(["no merges"], 256 + len(SPECIAL_TOKENS))
        self.running: list[PacedRequest] = []
        self.steps = 0

    @property
    def pool(self) -> SimpleNamespace:
        return SimpleNamespace(live=len(self.running), total=self.max_batch)

    def submit(self, prompt, params, timeout) -> "PacedRequest":
        self.running.append(PacedRequest(prompt, params))
        return self.running[-1]

    def step(self) -> None:
        time.sleep(STEP_SECONDS)
        self.steps += 1
        for request in self.running:
            request.say()
        self.running = [request for request in self.running if not request.done]

    def abort(self, request: "PacedRequest") -> None:
        if not request.done:
            request.finish("abort")
            self.running.remove(request)

    def stats(self) -> dict[str, int]:
        return {"steps": self.steps, "preemptions": 0, "cached_tokens": 0}

    def check(self) -> None:
        """Nothing can be lost."""


class PacedRequest:
    def __init__(self, prompt, params):
        self.prompt, self.params = prompt, params
        self.said, self.new, self.reason = 0, [], ""
        self.queued = time.monotonic()

    @property
    def done(self) -> bool:
        return bool(self.reason)

    def say(self) -> None:
        self.new.append((0, ("text", WORDS[self.said])))
        self.said += 1
        if self.said == self.params.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        self.reason = reason
        self.new.append((0, ("finish", reason)))

    def take_events(self) -> list[tuple]:
        new, self.new = self.new, []
        return new

    def completions(self) -> list:
        from nanochat.engine import Completion
        from nanochat.engine.request import Times

        times = Times(self.queued, self.queued, self.queued, time.monotonic())
        n = self.said
        return [Completion([0] * n, [1] * n, [0.0] * n, self.reason, "", [], prompt_tokens=len(self.prompt),
                           times=times)]


if __name__ == "__main__":
    run_script(parse_args, main)
