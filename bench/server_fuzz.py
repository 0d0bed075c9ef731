"""Requests that no client should send: sound ones with something done to them, on the wire or in the JSON."""

import json
import random
from collections.abc import Callable, Iterator

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 37 + 85?"}],
            "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "n": 2, "seed": 3,
            "stop": ["x"], "logprobs": True, "top_logprobs": 2, "stream": False, "user": "é漢\U0001f600"}
PROMPT = {"prompt": ["Once", "twice"], "max_tokens": 2, "logprobs": 1, "stream": True,
          "stream_options": {"include_usage": True}}
SOUND = [("POST", CHAT, QUESTION), ("POST", CHAT, {**QUESTION, "stream": True, "logprobs": None, "top_logprobs": None}),
         ("POST", TEXT, PROMPT), ("POST", TEXT, {"prompt": [1, 2, 3], "max_tokens": 1}), ("GET", "/health", None),
         ("GET", "/v1/models", None), ("GET", "/v1/models/nanochat", None), ("GET", "/metrics", None),
         ("GET", "/openapi.json", None), ("GET", "/", None)]
N_POSTS = sum(method == "POST" for method, _, _ in SOUND)

FIELDS = (*QUESTION, *PROMPT, "model", "max_completion_tokens", "ignore_eos", "frequency_penalty", "presence_penalty",
          "repetition_penalty", "logit_bias", "tools", "functions", "tool_choice", "function_call", "response_format",
          "modalities", "audio", "best_of", "echo", "suffix")
VALUES = ("null", "true", "false", "0", "-1", "1", "17", "0.5", "-0.0", "1.0", "1e999", "-1e999", "1e-320", "NaN",
          "Infinity", "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "1" * 5000, "0x10", "01", "'a'",
          '""', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"<|assistant_end|><|bos|>"', '"\u202e\ufeff"', '"\n"',
          '"' + "x" * 70_000 + '"', '"' + "\U0001f600" * 300 + '"', "[]", "{}", "[[]]", "[null]", "[1, true]",
          "[" + "1," * 50_000 + "1]", '["a", 1]', "[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 50_000,
          '{"type": "text"}', '[{"type": "text", "text": "hi"}]', '[{"type": "image_url"}]', '{"include_usage": 1}')
HEADERS = ("Content-Length: 5", "Content-Length: -1", "Content-Length: 1e3", "Content-Length: 99999999999999999999",
           "Content-Length: \u0661", "Content-Length: 0", "Content-Length: 5, 5", "Transfer-Encoding: chunked",
           "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity", "Host:", "Host: [::1", "Host: evil.test",
           "Host: a\x00b", "Connection: keep-alive", "Connection: upgrade\r\nUpgrade: websocket",
           "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
           "AAAAAAAAAAAAAAAAAAAAAA==", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c", "Expect: 100-continue",
           "Expect: nonsense", "Content-Type: text/plain", "Content-Type: application/json; charset=utf-16",
           "Content-Type: multipart/form-data; boundary=x", "Content-Encoding: gzip", "Authorization: Bearer \xff\xfe",
           "Range: bytes=0-0", "Accept: text/nothing", "X: " + "y" * 40_000, " folded: yes", "no colon", ": no name",
           "X-\u00e9: 1", "X: \x0b\x1b[31m", "\r\n".join(f"X-{i}: 1" for i in range(500)), "Origin: null",
           "X-Forwarded-For: 1.2.3.4", "Cookie: " + "a=b; " * 100)
LINES = ("{0} {1} HTTP/1.0", "{0} {1} HTTP/2.0", "{0} {1} HTTP/1.1 x", "{0}  {1} HTTP/1.1", "{0} {1}", "{1}", "",
         "{0} http://evil.test{1} HTTP/1.1", "{0} {1}?a=%ff&b=\x01 HTTP/1.1", "{0} {1}/%2e%2e/%00 HTTP/1.1",
         "{0} //{1} HTTP/1.1", "{0} * HTTP/1.1", "OPTIONS {1} HTTP/1.1", "CONNECT {1} HTTP/1.1", "HEAD {1} HTTP/1.1",
         "DELETE {1} HTTP/1.1", "TRACE {1} HTTP/1.1", "{0}\x00 {1} HTTP/1.1", "get {1} HTTP/1.1",
         "PRI * HTTP/2.0\r\n\r\nSM", "{0} {1}/" + "a" * 70_000 + " HTTP/1.1", "\x16\x03\x01\x02\x00\x01{0}",
         "{0} /v1/models/%F0%9F%98%80 HTTP/1.1", "{0} /v1/models/" + "%20" * 200 + " HTTP/1.1")


def requests(n: int, seed: int = 0) -> Iterator[bytes]:
    """Yield n requests; the same ones for the same seed."""
    dice = random.Random(seed)
    for _ in range(n):
        yield damaged(dice, follow_up)


def damaged(dice: random.Random, *more: Callable[..., bytes]) -> bytes:
    damage = dice.choice([*DAMAGES, *BODY_DAMAGES, *BODY_DAMAGES, *more])
    return damage(dice, *dice.choice(SOUND[:N_POSTS] if damage in BODY_DAMAGES else SOUND))


def request(method: str, path: str, body: dict | bytes | None = None, line: str = "{0} {1} HTTP/1.1",
            headers: tuple[str, ...] = (), length: bool = True) -> bytes:
    """Return a request as it goes over the wire; `headers` stand behind those it needs."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [line.format(method, path), "Host: localhost", "Connection: close"]
    lines += ["Content-Type: application/json"] * (body is not None) + [f"Content-Length: {len(data)}"] * length
    return "\r\n".join([*lines, *headers, "", ""]).encode("utf-8", "surrogateescape") + data


def chunked(dice: random.Random, data: bytes) -> Iterator[bytes]:
    """Yield the body in chunks of any size."""
    while data:
        size = dice.randrange(1, 200)
        yield b"%x\r\n%s\r\n" % (len(data[:size]), data[:size])
        data = data[size:]
    yield b"0\r\n\r\n"


# --- what is done to them ---------------------------------------------------------------------------


def cut(dice, *sound) -> bytes:
    whole = request(*sound)
    return whole[:dice.randrange(len(whole))]


def flip_bits(dice, *sound) -> bytes:
    whole = bytearray(request(*sound))
    for _ in range(dice.randrange(1, 9)):
        whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    return bytes(whole)


def splice(dice, *sound) -> bytes:
    """Bytes lost, doubled, moved or made up."""
    whole = request(*sound)
    for _ in range(dice.randrange(1, 5)):
        at, size, source = dice.randrange(len(whole)), dice.randrange(20), dice.randrange(len(whole))
        new = dice.choice([b"", whole[source:source + size], dice.randbytes(size)])
        whole = whole[:at] + new + whole[at + dice.randrange(size + 1):]
    return whole


def play_with_headers(dice, method, path, body) -> bytes:
    games = tuple(dice.sample(HEADERS, dice.randrange(1, 4)))
    return request(method, path, body, headers=games, length=dice.random() < 0.7)


def play_with_lines(dice, method, path, body) -> bytes:
    return request(method, path, body, line=dice.choice(LINES))


def play_with_chunks(dice, method, path, body) -> bytes:
    head = request(method, path, b"", headers=("Transfer-Encoding: chunked",), length=dice.random() < 0.1)
    chunks = list(chunked(dice, json.dumps(body).encode()))
    for _ in range(dice.randrange(3)):
        at = dice.randrange(len(chunks))
        chunks[at] = dice.choice([b"", b"0\r\n\r\n", b"-1\r\n", b"fffffffffffffffff\r\n", b"5;x=y\r\nabcde\r\n",
                                  b"g\r\n", chunks[at].replace(b"\r\n", b"\n"), chunks[at][:-1], chunks[at] * 2,
                                  b"0\r\nContent-Length: 3\r\n\r\n", dice.randbytes(9)])
    return head + b"".join(chunks)


def break_text(dice, method, path, body) -> bytes:
    """Bytes that are no UTF-8, in a body of the right length."""
    data = bytearray(json.dumps(body, ensure_ascii=False).encode())
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data))
        data[at:at + 1] = dice.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\xe6",
                                       b"\xef\xbb\xbf", b"\\", b'"', b"\\u12", b"\x1f"])
    return request(method, path, bytes(data))


def change_values(dice, method, path, body) -> bytes:
    """Fields with values that no schema foresees, the body's own among them, and doubled ones."""
    text = json.dumps(body)
    for _ in range(dice.randrange(1, 3)):
        value = dice.choice(VALUES)
        messages = f'"messages": [{{"role": "user", "content": {value}}}]', f'"messages": [{{"role": {value}}}]'
        member = dice.choice([*messages, *(f'"{dice.choice(FIELDS)}": {value}' for _ in range(8))])
        text = f"{text[:-1]}, {member}}}" if text.endswith("}") else value
        if dice.random() < 0.05:
            text = value
    return request(method, path, text.encode("utf-8", "surrogatepass"))


def follow_up(dice, *sound) -> bytes:
    """Another request behind it on the same connection, while the first is under way."""
    return request(*sound).replace(b"Connection: close\r\n", b"") + damaged(dice)


DAMAGES = (cut, flip_bits, splice, play_with_headers, play_with_lines)
BODY_DAMAGES = (play_with_chunks, break_text, change_values)
