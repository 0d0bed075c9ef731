"""What the server's bench makes of what it sees: it must be able to fail."""

import pytest
from fake_engine import FakeEngine, live

from bench import bench_server, server_fuzz
from bench.bench_server import Row, said, status
from nanochat.common import UserError
from nanochat.server import Settings, create_app
from nanochat.server.answers import Answer

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EVENTS = b'data: {"content":"a\\"b "}\n\ndata: {"content":"\\u00e9"}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("row, met, fault", [
    (Row("errors", 0, at_most=0), True, False), (Row("errors", 1, at_most=0), False, True),
    (Row("equal", 16, at_least=16), True, False), (Row("equal", 15, at_least=16), False, True),
    (Row("p99", 51.0, "ms", at_most=50), False, False), (Row("p99", 49.0, "ms", at_most=50), True, False),
    (Row("speed", 1.0, "/s"), True, False)])
def test_a_count_that_misses_its_goal_is_a_fault_and_a_time_is_only_marked(row, met, fault):
    assert (row.met, row.is_fault) == (met, fault)
    assert ("NOT MET" in str(row)) == (not met)


def test_a_fault_fails_the_bench_after_the_table(monkeypatch, capsys):
    monkeypatch.setattr(bench_server, "PARTS", {"fuzz": lambda args: [Row("errors", 3, at_most=0)]})
    with pytest.raises(UserError, match="1 counts miss their goal: errors"):
        bench_server.main(bench_server.parse_args(["--only", "fuzz"]))
    *_, last = capsys.readouterr().out.splitlines()
    assert '"errors": 3' in last
    with pytest.raises(UserError, match="--only must name some of fuzz, got laod"):
        bench_server.main(bench_server.parse_args(["--only", "laod"]))


def test_only_a_complete_answer_has_a_text():
    assert said(HEAD + EVENTS + DONE) == 'a"b é'
    for broken in (HEAD + EVENTS, HEAD + EVENTS + b'data: {"error":{}}\n\n' + DONE, b"",
                   HEAD.replace(b"200", b"503") + EVENTS + DONE):
        assert said(broken) is None


@pytest.mark.parametrize("answer, code", [(HEAD, 200), (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD, 200), (b"", None),
                                          (b"HTTP/1.1 20", None), (b"\x16\x03", None)])
def test_the_status_is_the_final_answer_s(answer, code):
    assert status(answer) == code


def test_the_same_seed_makes_the_same_requests_all_of_them_different():
    made = list(server_fuzz.requests(300, seed=1))
    assert made == list(server_fuzz.requests(300, seed=1))
    assert len(set(made)) > 290 and made != list(server_fuzz.requests(300, seed=2))


def test_a_request_is_as_long_as_it_says():
    whole = server_fuzz.request("POST", "/x", {"a": "é"}, headers=("X: 1",))
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /x HTTP/1.1\r\nHost: ") and head.endswith(b"\r\nX: 1")
    assert f"Content-Length: {len(body)}\r\n".encode() in head


@pytest.mark.slow
def test_an_answer_that_breaks_the_schema_is_a_violation(monkeypatch):
    monkeypatch.setattr(Answer, "usage", lambda self: {"prompt_tokens": "many"})
    with live(create_app(FakeEngine, Settings())) as server:
        statuses, violations = bench_server.schema_cases(server.url, 40)
    assert 0 < len(violations) <= statuses.count(200) and len(statuses) >= 40
