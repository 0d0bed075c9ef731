"""The server in a process of its own under many clients, sound and hostile ones; the bench's parts with smaller counts.

What the bench found and was mended has a test of its own here.
"""

import asyncio

import pytest
from fake_engine import FakeEngine, live, until

from bench import bench_server, server_fuzz
from bench.bench_server import exchange, parse_args
from nanochat.engine import SamplingParams
from nanochat.server import Settings, create_app
from nanochat.server.job import Job
from nanochat.server.worker import SLICE, STEPS_AHEAD, Pool


@pytest.fixture
def served():
    """A server in this process, its engine and its port."""
    engine = FakeEngine()
    with live(create_app(lambda: engine, Settings())) as server:
        yield server, engine, int(server.url.rpartition(":")[2])


def test_a_body_that_breaks_off_never_reaches_the_engine(served):
    server, engine, port = served
    whole = server_fuzz.request("POST", server_fuzz.TEXT, {"prompt": "sound JSON, but shorter than announced"})
    longer = whole.replace(b"Content-Length: ", b"Content-Length: 1")
    asyncio.run(exchange(port, longer, 0.1))
    until(lambda: not server.server_state.tasks)
    assert engine.submitted == []
    assert bench_server.status(asyncio.run(exchange(port, whole))) == 200 and len(engine.submitted) == 1


@pytest.mark.parametrize("path, answered_first", [(server_fuzz.CHAT, False), ("/health", False), ("/nowhere", False),
                                                  ("/health", True), ("/nowhere", True)])
def test_a_request_that_ceases_to_be_http_leaves_no_traceback(served, capfd, caplog, path, answered_first):
    server, _, port = served
    head = server_fuzz.request("POST", path, b"", headers=("Transfer-Encoding: chunked",), length=False)

    async def send() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.replace(b"Connection: close\r\n", b""))
        first = await reader.read(5000) if answered_first else b""
        writer.write(b"no chunk\r\n")
        answer = first + await asyncio.wait_for(reader.read(), 10)  # it hangs up
        writer.close()
        return answer

    assert bench_server.status(asyncio.run(send())) in (400, 404, 405)
    until(lambda: not server.server_state.tasks)
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_no_step_overtakes_another_on_its_way_to_the_streams():
    """While the first step's news is passed on in slices the second's arrives, where jobs have moved up."""
    async def story() -> None:
        pool = Pool([FakeEngine], Settings())
        pool._loop = asyncio.get_running_loop()
        (worker,) = pool.workers
        jobs = [Job([[1]], SamplingParams(), 10**6) for _ in range(2 * SLICE + 1)]
        for step, present in enumerate((jobs, jobs[SLICE:])):
            worker._deliver([(job, [(0, (step,))], []) for job in present])
        while worker.ahead._value < STEPS_AHEAD:
            await asyncio.sleep(0)
        assert [list(job._events) for job in jobs] == [
            [(0, (step,)) for step in ((0, 1) if i >= SLICE else (0,))] for i in range(len(jobs))]

    asyncio.run(asyncio.wait_for(story(), 10))


@pytest.mark.slow
@pytest.mark.parametrize("part, counts", [
    ("load", ["--streams", "100", "--seconds", "3"]), ("fuzz", ["--fuzz", "1500"]), ("schema", ["--cases", "200"]),
    ("chaos", ["--clients", "150"])], ids=lambda value: value if isinstance(value, str) else "")
def test_no_count_of_the_bench_misses_its_goal(part, counts, figure):
    rows = bench_server.PARTS[part](parse_args(counts))
    figure("\n".join(map(str, rows)))
    assert not [str(row) for row in rows if row.is_fault]
