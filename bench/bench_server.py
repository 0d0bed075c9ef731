"""The server under load, chaos and hostile input, in a process of its own beside its clients.

    python -m bench.bench_server                          # everything: minutes, most of them for the schema
    python -m bench.bench_server --only load --seconds 10
    python -m pytest bench/bench_server.py -s

load: streams from a paced engine (1 ms a step, no model), every word checked, while a third process asks /health.
alike: 16 greedy streams at once from a random model of 4 layers, against the same requests one at a time; rounds in
turns. fuzz: sound requests that were damaged, see server_fuzz.py. schema: schemathesis on /openapi.json. chaos: clients
that leave, stall and send garbage, then one that asks as it should. One table; the last line is JSON. The run fails
where a count misses its goal; times and sizes that do are only marked, they are the machine's too.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench import server_fuzz
from bench.server_fuzz import CHAT, request
from bench.server_process import WORDS, Process, server
from nanochat.common import UserError, run_script

PROBE_SECONDS = 0.02  # between two looks at /health
PATIENCE_SECONDS = 60.0  # of a client that waits for an answer it must get
SILENCE_SECONDS = 0.5  # after which a client that sent garbage leaves
IDLE_SECONDS = 30.0  # half a request is given up within these
ROWS = 16
OTHER_5XX = "5(?!03).."


@dataclass(frozen=True)
class Row:
    """A figure and what it should be at most or at least."""

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        return ((self.at_most is None or self.value <= self.at_most)
                and (self.at_least is None or self.value >= self.at_least))

    @property
    def is_fault(self) -> bool:
        """Say whether it is a count that misses its goal."""
        return not self.met and not self.unit

    def __str__(self) -> str:
        goals = [f"{name} {goal:g}" for name, goal in (("at most", self.at_most), ("at least", self.at_least))
                 if goal is not None]
        value = f"{self.value:,.0f}" if self.value == int(self.value) else f"{self.value:,.1f}"
        verdict = "" if not goals else "met" if self.met else "NOT MET"
        return f"{self.what:<62} {value:>10} {self.unit:<8} {' '.join(goals):<16} {verdict}".rstrip()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--streams", type=int, default=200, help="streams at once")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the streams run")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the streams of the model")
    parser.add_argument("--fuzz", type=int, default=20_000, help="damaged requests")
    parser.add_argument("--cases", type=int, default=2000, help="schemathesis's requests")
    parser.add_argument("--clients", type=int, default=1000, help="clients of the chaos")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--only must name some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    load_before = os.getloadavg()[0]
    rows = []
    for part in parts:
        started = time.monotonic()
        new = [*PARTS[part](args), Row(f"{part}: took", round(time.monotonic() - started, 1), "s")]
        print(*new, sep="\n", flush=True)
        rows += new
    print(json.dumps({"bench": "server", "cores": len(os.sched_getaffinity(0)), "load_average_before": load_before,
                      **{f"{row.what} {row.unit}".strip(): row.value for row in rows}}))
    if faults := [row.what for row in rows if row.is_fault]:
        raise UserError(f"{len(faults)} counts miss their goal: {'; '.join(faults)}")


# --- clients ----------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(port: int, data: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """Send the bytes and give what comes back to the block; then hang up, at once and without a farewell."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        yield reader
    finally:
        writer.transport.abort()


async def exchange(port: int, data: bytes, silence: float = PATIENCE_SECONDS) -> bytes:
    """Send the bytes; return what comes back until the server hangs up, or says nothing for that many seconds."""
    answer = b""
    try:
        async with connected(port, data) as reader:
            while new := await asyncio.wait_for(reader.read(65536), silence):
                answer += new
    except (TimeoutError, ConnectionError):
        pass
    return answer


async def each(items: Iterable, at_once: int, work: Callable[..., Awaitable]) -> list:
    """Return work(item) of all items, `at_once` at a time, in the order in which they end."""
    items, results = iter(items), []

    async def take() -> None:
        for item in items:
            results.append(await work(item))

    await asyncio.gather(*(take() for _ in range(at_once)))
    return results


def status(answer: bytes) -> int | None:
    """Return the status of an answer, None when there is none."""
    found = re.match(rb"(?:HTTP/1\.1 100 [^\r]*\r\n\r\n)?HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else None


def chat(text: str, **options) -> bytes:
    return request("POST", CHAT, {"messages": [{"role": "user", "content": text}], **options})


def said(answer: bytes) -> str | None:
    """Return the text of a streamed answer, None when it is not one that is complete."""
    if status(answer) != 200 or b'"error"' in answer or b"data: [DONE]" not in answer:
        return None
    return "".join(map(json.loads, re.findall(rb'"content":("(?:[^"\\]|\\.)*")', answer)))


# --- load -------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> list[Row]:
    with (server("paced") as process,
          ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool):
        pool.submit(abs, 0).result()  # it has started
        alone = probe(process, until=lambda seconds: seconds > 2)
        streams = pool.submit(run_streams, process.port, args.streams, args.seconds)
        before = []

        def over(seconds: float) -> bool:
            if seconds > args.seconds / 4 and not before:
                before.append(process.rss)
            return streams.done()

        beside = probe(process, until=over)
        figures = streams.result()
        growth = process.rss - before[0]
        mistakes = process.mistakes()
    wrong, answers = figures["wrong"], figures["answers"]
    name = f"load: {args.streams} streams"
    return [Row(f"{name}: complete answers", answers, at_least=args.streams),
            Row(f"{name}: wrong ones", wrong, at_most=0),
            Row(f"{name}: words", figures["words"] / figures["seconds"], "/s"),
            Row(f"{name}: first word, median", figures["first_ms"], "ms"),
            Row(f"{name}: /health, answers that are not 200", beside.count(None), at_most=0),
            *(Row(f"{where}: /health, {which}", quantile(times, q), "ms", at_most=limit)
              for where, times, limits in (("load: idle", alone, (None, None)), (name, beside, (None, 50)))
              for which, q, limit in (("median", 50, limits[0]), ("99th percentile", 99, limits[1]))),
            Row(f"{name}: memory gained after the first quarter", growth, "MiB", at_most=20),
            Row(f"{name}: mistakes in the log", mistakes, at_most=0)]


def run_streams(port: int, streams: int, seconds: float) -> dict[str, float]:
    """Keep that many streams open for so long; return what they said. Runs in a process of its own."""
    deadline = time.monotonic() + seconds
    dice = random.Random(0)
    first, words, answers, wrong = [], 0, 0, 0

    async def one(_: int) -> None:
        nonlocal words, answers, wrong
        while time.monotonic() < deadline:
            n = dice.randrange(50, 350)
            started, answer = time.monotonic(), b""
            async with connected(port, chat("go", stream=True, max_tokens=n)) as reader:
                while new := await asyncio.wait_for(reader.read(65536), PATIENCE_SECONDS):
                    if b'"content":"0 "' in new and b'"content":"0 "' not in answer:
                        first.append(1000 * (time.monotonic() - started))
                    answer += new
            right = said(answer) == "".join(WORDS[:n])
            answers, wrong, words = answers + right, wrong + (not right), words + n * right

    started = time.monotonic()
    asyncio.run(each(range(streams), streams, one))
    return {"answers": answers, "wrong": wrong, "words": words, "first_ms": statistics.median(first),
            "seconds": time.monotonic() - started}


def probe(process: Process, until: Callable[[float], bool]) -> list[float | None]:
    """Ask /health again and again, each time on a new connection; return milliseconds, None for a failure."""
    started, times = time.monotonic(), []
    while not until(time.monotonic() - started):
        begin = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=10)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            times.append(1000 * (time.monotonic() - begin) if answer.status == 200 else None)
        except OSError:
            times.append(None)
        connection.close()
        time.sleep(PROBE_SECONDS)
    return times


def quantile(times: list[float | None], percent: int) -> float:
    return statistics.quantiles([time for time in times if time is not None], n=100)[percent - 1]


# --- alike ------------------------------------------------------------------------------------------


def alike(args: argparse.Namespace) -> list[Row]:
    asked = [chat(f"{'word ' * i}{i}", stream=True, max_tokens=64, temperature=0, ignore_eos=True) for i in range(ROWS)]
    ratios, speeds, equal = [], {1: [], ROWS: []}, ROWS
    with server("tiny") as process:
        for i in range(args.rounds + 1):
            texts = {}
            for at_once in (1, ROWS):
                started = time.monotonic()
                texts[at_once] = asyncio.run(answers_in_order(process.port, asked, at_once))
                speeds[at_once].append(64 * ROWS / (time.monotonic() - started))
            assert len({*texts[1]} - {None}) > ROWS // 2, "answers must differ, or equal ones show nothing"
            equal = min(equal, sum(a is not None and a == b for a, b in zip(texts[1], texts[ROWS], strict=True)))
            ratios.append(speeds[ROWS][i] / speeds[1][i])
    ratios = ratios[1:]
    name = f"alike: {ROWS} streams"
    return [Row(f"{name}: equal to alone, in the worst round", equal, at_least=ROWS),
            *(Row(f"alike: {n} at a time, median", statistics.median(speeds[n][1:]), "token/s") for n in (1, ROWS)),
            *(Row(f"{name}: gain, {which.__name__}", which(ratios), "x") for which in (statistics.median, min, max)),
            Row("alike: pages held at the end", process.held, at_most=0)]


async def answers_in_order(port: int, asked: list[bytes], at_once: int) -> list[str | None]:
    async def one(item: tuple[int, bytes]) -> tuple[int, str | None]:
        return item[0], said(await exchange(port, item[1]))

    return [text for _, text in sorted(await each(enumerate(asked), at_once, one))]


# --- fuzz -------------------------------------------------------------------------------------------


def fuzz(args: argparse.Namespace) -> list[Row]:
    with server("tiny") as process:
        normal = chat("hello", stream=True, max_tokens=8, temperature=0)
        before = said(asyncio.run(exchange(process.port, normal)))
        answers = asyncio.run(each(server_fuzz.requests(args.fuzz), 32, lambda data: exchange(
            process.port, data, SILENCE_SECONDS)))
        kinds = Counter((status(answer) or (600 if answer else 0)) // 100 for answer in answers)
        idle = process.wait_idle(IDLE_SECONDS)
        rows = [Row(f"fuzz: {args.fuzz} requests, {label}", kinds[kind], at_most=goal) for label, kind, goal in (
                    ("answered 2xx", 2, None), ("answered 4xx", 4, None), ("answered 5xx", 5, 0),
                    ("not answered", 0, None),
                    ("answered with no status", 6, 0))]
        rows += [Row("fuzz: 503 by the server's own count", process.answered("503"), at_most=0),
                 Row("fuzz: other 5xx by the server's own count", process.answered(OTHER_5XX), at_most=0),
                 Row("fuzz: normal request like before", said(asyncio.run(exchange(process.port, normal))) == before
                     is not None, at_least=1),
                 Row("fuzz: engine idle and process alive", idle and process.child.poll() is None, at_least=1),
                 Row("fuzz: mistakes in the log", process.mistakes(), at_most=0)]
    return [*rows, Row("fuzz: pages held at the end", process.held, at_most=0)]


# --- schema -----------------------------------------------------------------------------------------


def schema(args: argparse.Namespace) -> list[Row]:
    with server("tiny") as process:
        statuses, violations = schema_cases(process.url, args.cases)
        rows = [Row("schema: cases", len(statuses), at_least=args.cases),
                *(Row(f"schema: answered {kind}xx", sum(one // 100 == kind for one in statuses), at_least=goal)
                  for kind, goal in ((2, 1), (4, 1))),
                Row("schema: answered 5xx", sum(one >= 500 for one in statuses), at_most=0),
                Row("schema: violations", len(violations), at_most=0),
                Row("schema: mistakes in the log", process.mistakes(), at_most=0)]
    for text in violations[:3]:
        print(text)
    return rows


def schema_cases(url: str, cases: int) -> tuple[list[int], list[str]]:
    """Send at least so many requests made up from /openapi.json, sound and unsound; return statuses and violations."""
    try:
        import hypothesis
        import requests
        import schemathesis
        from schemathesis.specs.openapi.checks import positive_data_acceptance
    except ImportError as error:
        raise UserError(f"this part needs {error.name}, which bash scripts/setup.sh --tests installs") from None
    found = schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json", timeout=10).json())
    found.config.base_url = url
    session, statuses, violations = requests.Session(), [], []

    def check(case) -> None:
        answer = case.call(session=session)
        statuses.append(answer.status_code)
        try:
            # What the schema cannot say - turns, what fits the context - makes some sound requests a 400.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])
            if answer.status_code >= 400:
                assert set(json.loads(answer.content)["error"]) == {"message", "type", "param", "code"}
        except (BaseExceptionGroup, AssertionError, ValueError, KeyError) as error:  # a group: its failures
            violations.append(str(error))

    posts = [one.ok() for one in found.get_all_operations() if one.ok().method == "post"]
    kinds = [(post, mode) for post in posts for mode in schemathesis.GenerationMode]
    limits = hypothesis.settings(max_examples=-(-cases // len(kinds)), deadline=None, database=None, derandomize=True,
                                 suppress_health_check=list(hypothesis.HealthCheck))
    for post, mode in kinds:
        limits(hypothesis.given(post.as_strategy(generation_mode=mode))(check))()
    return statuses, violations


# --- chaos ------------------------------------------------------------------------------------------


def chaos(args: argparse.Namespace) -> list[Row]:
    dice = random.Random(0)
    with server("tiny") as process:
        asyncio.run(exchange(process.port, chat("hello", max_tokens=8)))
        files = process.files
        actions = dice.choices(list(ACTIONS), k=args.clients)
        wrong = asyncio.run(each(actions, 100, lambda action: ACTIONS[action](process.port, dice))).count(False)
        idle = process.wait_idle(IDLE_SECONDS)
        started = time.monotonic()
        answer = asyncio.run(exchange(process.port, chat("hello", max_tokens=8)))
        seconds = time.monotonic() - started
        leaked = wait_for_least(lambda: process.files - files, IDLE_SECONDS)
        metrics = process.metrics()
        rows = [Row(f"chaos: {args.clients} clients, wrongly answered", wrong, at_most=0),
                *(Row(f"chaos: clients that {name}", n) for name, n in sorted(Counter(actions).items())),
                Row("chaos: told to come back later, 429", process.answered("429")),
                Row("chaos: waited or read too long, 503", process.answered("503")),
                Row("chaos: other 5xx", process.answered(OTHER_5XX), at_most=0),
                Row("chaos: then a normal request is answered", status(answer) == 200, at_least=1),
                Row("chaos: then a normal request takes", seconds, "s", at_most=1),
                Row("chaos: then nothing runs, waits or holds pages", idle, at_least=1),
                Row("chaos: then open files more than before", leaked, at_most=0),
                Row("chaos: requests cut by their clients", metrics.get(
                    'nanochat_request_failures_total{code="disconnected"}', 0)),
                Row("chaos: mistakes in the log", process.mistakes(), at_most=0)]
    return [*rows, Row("chaos: pages held at the end", process.held, at_most=0)]


def wait_for_least(figure: Callable[[], int], seconds: float) -> int:
    """Return the figure once it is at most 0, or what it is after so many seconds."""
    deadline = time.monotonic() + seconds
    while (value := figure()) > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    return max(value, 0)


async def leave(port: int, dice: random.Random) -> None:
    """Read up to the k-th token, then go."""
    async with connected(port, chat("hello", stream=True, max_tokens=100, n=dice.randrange(1, 4))) as reader:
        for _ in range(dice.randrange(60)):
            await reader.readline()


async def stall(port: int, dice: random.Random) -> None:
    """Read a byte now and then, then go."""
    long = chat("hello", stream=True, max_tokens=100, n=4, logprobs=True, top_logprobs=20)
    async with connected(port, long) as reader:
        for _ in range(dice.randrange(40)):
            await reader.read(1)
            await asyncio.sleep(0.02)


async def vanish(port: int, dice: random.Random) -> None:
    """Ask and go, not caring for an answer."""
    async with connected(port, chat("hello", stream=dice.random() < 0.5, max_tokens=100)):
        await asyncio.sleep(dice.choice([0, 0.01, 0.1]))


async def babble(port: int, dice: random.Random) -> None:
    await exchange(port, dice.randbytes(dice.randrange(1, 2000)), SILENCE_SECONDS)


async def break_off(port: int, dice: random.Random) -> None:
    """Send half a request, wait, and go."""
    whole = chat("hello " * 50)
    await exchange(port, whole[:dice.randrange(len(whole))], SILENCE_SECONDS)


async def ask(port: int, dice: random.Random) -> bool:
    """Ask as one should, streamed or not, with a stop string or not; say whether the answer is in order."""
    stream = dice.random() < 0.5
    answer = await exchange(port, chat("hello", stream=stream, max_tokens=dice.randrange(1, 50),
                                       stop=dice.choice([None, "a", ["e", "o"]])))
    ended = said(answer) is not None if stream else b'"usage":' in answer
    return status(answer) in (429, 503) or (status(answer) == 200 and ended)


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "load": load, "alike": alike, "fuzz": fuzz, "schema": schema, "chaos": chaos}
ACTIONS: dict[str, Callable[[int, random.Random], Awaitable]] = {
    "leave": leave, "stall": stall, "vanish": vanish, "babble": babble, "break off": break_off, "ask": ask}


def bench_server() -> None:
    """For `pytest bench/`: the default run."""
    main(parse_args([]))


if __name__ == "__main__":
    run_script(parse_args, main)
