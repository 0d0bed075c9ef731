"""Who may ask, for what, and what leaves: tokens, hosts, headers, files, log lines, and special tokens in texts."""

import itertools
import json
import logging
import random
import socket
import unicodedata

import pytest
from fake_engine import FakeEngine, client_of, live

from nanochat.server import Settings, create_app
from nanochat.server.security import allowed_host, plain
from nanochat.tokenizer import SPECIAL_TOKENS

TOKEN = "s3cret-token"
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def guarded():
    with client_of(FakeEngine(), token=TOKEN) as client:
        yield client


# --- who may ask ----------------------------------------------------------------------------------


def test_every_route_but_health_asks_for_the_token(guarded):
    schema = guarded.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    routes = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    asked = [*routes, ("get", "/openapi.json"), ("get", "/nothing"), ("get", "//health"), ("get", "/health/"),
             ("post", "/static/../v1/models")]
    for method, path in asked:
        if path == "/health":
            assert guarded.get(path).status_code == 200
            continue
        response = guarded.request(method, "http://localhost" + path.replace("{model}", "nanochat"), json=HI)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer", path
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("header, status", [
    (f"Bearer {TOKEN}", 200), (f"bearer {TOKEN}", 200), (f"BEARER {TOKEN}", 200), (TOKEN, 401),
    (f"Bearer {TOKEN}x", 401), (f"Bearer  {TOKEN}", 401), (f"Bearer {TOKEN[:-1]}", 401), ("Bearer ", 401), ("", 401),
    (f"Basic {TOKEN}", 401), ("Bearer", 401), (f"Bearer{TOKEN}", 401), (f"Bearer {TOKEN.upper()}", 401),
])
def test_the_token_must_be_exact(guarded, header, status):
    assert guarded.get("/v1/models", headers={"Authorization": header}).status_code == status


def test_tokens_are_compared_in_constant_time(guarded, monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or False)
    assert guarded.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert compared == [(b"Bearer x", b"Bearer " + TOKEN.encode())]


@pytest.mark.parametrize("host, allowed", [
    ("localhost", True), ("localhost:8000", True), ("LOCALHOST", True), ("127.0.0.1:80", True), ("[::1]:8000", True),
    ("[::1]", True), ("192.168.1.7:8000", True), ("box.lan:8000", True), ("BOX.lan", True), ("evil.example", False),
    ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False),
    ("evil.example#127.0.0.1", False), ("user@127.0.0.1", False), ("127.0.0.1@evil.example", False), ("[evil]", False),
])
def test_names_outside_the_list_are_refused(host, allowed):
    """A page could point its own name at this machine; an IP address it cannot."""
    assert allowed_host(host, frozenset({"box.lan"})) == allowed


def test_a_foreign_host_gets_nothing():
    with client_of(FakeEngine()) as client:
        for path in ("/", "/health", "/v1/models"):
            response = client.get(path, headers={"Host": "evil.example"})
            assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_host"


def test_no_other_origin_is_let_in():
    with client_of(FakeEngine()) as client:
        origin = {"Origin": "http://evil.example"}
        preflight = client.options(CHAT, headers={**origin, "Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 405
        answer = client.post(CHAT, json=HI, headers=origin)
        assert not any(name.startswith("access-control-") for name in (*preflight.headers, *answer.headers))


def test_headers_have_a_limit():
    with client_of(FakeEngine()) as client:
        response = client.get("/health", headers={"x": "y" * 2**15})
        assert response.status_code == 431 and response.json()["error"]["code"] == "headers_too_large"
        assert client.get("/health", headers={"x": "y" * 2**14}).status_code == 200


def test_every_answer_bears_the_security_headers():
    with client_of(FakeEngine(), token=TOKEN) as client:
        for path in ("/health", "/", "/nothing", "/v1/models"):
            headers = client.get(path).headers
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
            assert "server" not in headers


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def page(monkeypatch, tmp_path):
    """A client of a server whose page is two files; a secret lies beside them, and a link to it among them."""
    folder = tmp_path / "static"
    folder.mkdir()
    (tmp_path / "secret.js").write_text("secret", encoding="utf-8")
    (folder / "index.html").write_text("<h1>chat</h1>", encoding="utf-8")
    (folder / "app.js").write_text("run()", encoding="utf-8")
    (folder / "notes.txt").write_text("secret", encoding="utf-8")
    (folder / "link.js").symlink_to(tmp_path / "secret.js")
    monkeypatch.setattr("nanochat.server.static_files.FOLDER", folder)
    with live(create_app(FakeEngine, Settings(token=TOKEN))) as server:
        yield server


def raw(server, *requests):
    """Send each request over a connection of its own; return all that comes back on them, in order."""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    connections = [socket.create_connection(address, timeout=10) for _ in requests]
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)
    answers = []
    for connection in connections:
        with connection, connection.makefile("rb") as stream:
            answers.append(stream.read())
    return answers


def test_the_page_is_served_to_everybody_from_a_fixed_table(page):
    for path, content, kind in ((b"/", b"<h1>chat</h1>", b"text/html; charset=utf-8"),
                                (b"/static/app.js", b"run()", b"text/javascript; charset=utf-8")):
        (answer,) = raw(page, b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path)
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(content)
        assert b"content-type: " + kind in answer and b"cache-control: no-cache" in answer
    (head,) = raw(page, b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")


OUTSIDE = [
    "/static/../secret.js", "/static/..%2fsecret.js", "/static/%2e%2e/secret.js", "/static/%2e%2e%2fsecret.js",
    "/static/..%5csecret.js", "/static/..\\secret.js", "/../secret.js", "/%2e%2e/secret.js", "/static//secret.js",
    "/static/./app.js", "//static/app.js", "/static/app.js%00", "/static/app.js/", "/static/", "/static", "/app.js",
    "/static/link.js", "/static/notes.txt", "/static/index.html", "/static/%2fetc/passwd", "/static/....//secret.js",
    "/static/app.js%20", "/STATIC/app.js", "/static/%c0%ae%c0%ae/secret.js", "file:///etc/passwd",
]


@pytest.mark.parametrize("token", ["", f"Authorization: Bearer {TOKEN}\r\n"], ids=["without token", "with token"])
def test_no_path_leads_out_of_the_table(page, token):
    head = f"HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{token}\r\n"
    answers = raw(page, *(f"GET {path} {head}".encode() for path in OUTSIDE))
    for path, answer in zip(OUTSIDE, answers, strict=True):
        assert answer.split(b" ", 2)[1] in (b"401", b"404", b"400"), path
        assert b"secret" not in answer.partition(b"\r\n\r\n")[2], path


# --- bytes that are no request --------------------------------------------------------------------


def garble(request, dice):
    """The request with a few of its bytes lost, changed or added."""
    request = bytearray(request)
    for _ in range(dice.randrange(1, 6)):
        at, new = dice.randrange(len(request)), dice.randbytes(dice.randrange(3))
        request[at:at + dice.randrange(2)] = new
    return bytes(request)


def test_garbled_requests_are_answered_with_a_client_error_or_not_at_all(monkeypatch):
    monkeypatch.setattr("nanochat.server.serve.HEADER_SECONDS", 0.1)
    monkeypatch.setattr("nanochat.server.transport.BODY_SECONDS", 0.1)
    body = json.dumps(HI).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    dice = random.Random(1)
    with live(create_app(FakeEngine, Settings())) as server:
        garbled = [garble(request, dice) for _ in range(300)]
        for sent, answer in zip(garbled, raw(server, *garbled), strict=True):
            assert answer == b"" or answer.split(b" ", 2)[1][:1] in (b"2", b"4"), (sent, answer)
        (answer,) = raw(server, request)
        assert answer.startswith(b"HTTP/1.1 200 ")


# --- logs -----------------------------------------------------------------------------------------


def test_logs_carry_no_text_unless_asked(caplog):
    secret = {"messages": [{"role": "user", "content": "my secret"}]}
    reply = (("text", "your\nsecret\x1b[31m"), ("finish", "stop"))
    for log_text in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO), client_of(FakeEngine(reply), token=TOKEN, log_text=log_text) as client:
            client.post(CHAT, json=secret, headers={"Authorization": f"Bearer {TOKEN}"})
            client.post(CHAT, json={"messages": secret}, headers={"Authorization": f"Bearer {TOKEN}"})
        ours = [record.getMessage() for record in caplog.records if record.name == "nanochat.server"]
        assert any(f"POST {CHAT} 200" in line for line in ours)
        assert any("secret" in line for line in ours) == log_text
        assert TOKEN not in caplog.text and all(line.isprintable() for line in ours)


def test_nobody_forges_a_log_line(caplog):
    with caplog.at_level(logging.INFO), client_of(FakeEngine()) as client:
        client.get("/x%0d%0a2026-01-01 GET /health 200%1b[2J")
    *_, line = [record.getMessage() for record in caplog.records if record.name == "nanochat.server"]
    assert line.startswith("GET /x\\r\\n2026-01-01 GET /health 200\\x1b[2J 404 ")
    assert plain("a\r\n\x1b\u2028\ud800é") == "a\\r\\n\\x1b\\u2028\\ud800\\xe9"


# --- special tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_no_text_becomes_a_special_token(role):
    """Every special token's name, whole, split across parts, doubled and in look-alikes, in every role."""
    with client_of(FakeEngine()) as client:
        engine = client.app.state.pool.engines[0]
        scaffold = None
        for name in SPECIAL_TOKENS:
            wide = name.translate({ord(c): chr(ord(c) + 0xFEE0) for c in "<|>_"})
            assert unicodedata.normalize("NFKC", wide) == name
            for parts in ([name], [name[:3], name[3:]], ["a" + name + "b"], [name, name], [wide], [name.upper()],
                          ["<|" + name + "|>"]):
                content = "".join(parts) if len(parts) == 1 else [{"type": "text", "text": part} for part in parts]
                turns = {"system": "s", "user": "u", "assistant": "a", role: content}
                messages = [{"role": r, "content": turns[r]} for r in ("system", "user", "assistant")]
                response = client.post(CHAT, json={"messages": [*messages, {"role": "user", "content": "u"}]})
                assert response.status_code == 200
                special = [id for id in engine.submitted[-1].prompt if id >= 256]
                scaffold = scaffold or special
                assert special == scaffold and "".join(parts) in engine.tokenizer.decode(engine.submitted[-1].prompt)


def test_no_field_becomes_a_special_token():
    fields = ({"stop": "{}"}, {"stop": ["{}"]}, {"user": "{}"}, {"model": "{}"}, {"{}": 1})
    with client_of(FakeEngine()) as client:
        engine = client.app.state.pool.engines[0]
        for name, field in itertools.product(SPECIAL_TOKENS, fields):
            body = json.loads(json.dumps(field).replace("{}", name)) if field != {"{}": 1} else {name: 1}
            assert client.post("/v1/completions", json={"prompt": name, **body}).status_code in (200, 404)
        prompts = {tuple(id for id in request.prompt if id >= 256) for request in engine.submitted}
        assert prompts == {(engine.tokenizer.bos_id,)} and len(engine.submitted) == len(SPECIAL_TOKENS) * 4
        stops = {request.params.stop for request in engine.submitted}
        assert stops == {(), *((name,) for name in SPECIAL_TOKENS)}
