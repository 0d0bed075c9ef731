"""A data set hub on loopback that fails on purpose, for tests of downloads."""

import hashlib
import socket
import struct
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTML = b"<html><body>please log in to the network</body></html>"


class FaultServer:
    """Serves `files`, path -> bytes, with sha256 ETags; each GET first takes the next of `faults`, each HEAD the next
    of `head_faults`. A fault is a name that _Handler knows; `forever` is taken when the queue is empty.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.head_faults: deque[str] = deque()
        self.forever = ""
        self.gets: list[tuple[str, str]] = []  # path, Range
        self.stalled, self.resume = threading.Event(), threading.Event()
        self.etag = True
        self.lock = threading.Lock()

    def serve(self, repo: str, path: str, data: bytes) -> None:
        self.files[f"/datasets/{repo}/resolve/main/{path}"] = data


@contextmanager
def running():
    """A FaultServer with its `url` set, stopped at the end."""
    faults = FaultServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"faults": faults}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that went away
    faults.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield faults
    finally:
        faults.resume.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultServer

    def do_HEAD(self):
        with self.faults.lock:
            fault = self.faults.head_faults.popleft() if self.faults.head_faults else ""
        self.answer(fault)

    def do_GET(self):
        faults = self.faults
        if self.path.startswith("/api/"):  # huggingface_hub asks once a day who its clients are
            return self.send(404, b"", {})
        with faults.lock:
            faults.gets.append((self.path, self.headers.get("Range", "")))
            fault = faults.faults.popleft() if faults.faults else faults.forever
        return self.answer(fault)

    def answer(self, fault: str) -> None:
        data = self.faults.files.get(self.path.split("?")[0])
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if fault in ("408", "500", "503", "429", "401"):
            return self.send(int(fault), b"busy", {"Retry-After": "0"} if fault in ("503", "429") else {})
        if fault == "redirect loop":
            return self.send(302, b"", {"Location": self.path})
        if fault == "html":
            return self.send(200, HTML, {"Content-Type": "text/html"})
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        headers = {"X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if self.faults.etag:
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        if asked and fault == "no such range":
            return self.send(416, b"", {})
        if fault == "other range":  # as long as the one asked for
            data = data[7:] + data[:7]
        if asked and fault != "200 to range":
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.body(206, data[start:], headers, fault)
        return self.body(200, data, headers, fault)

    def body(self, status: int, body: bytes, headers: dict, fault: str) -> None:
        if fault == "wrong bytes":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "too long":
            return self.send(status, body + b"more", headers | {"Connection": "close"}, length=None)
        if fault.startswith(("cut at ", "reset at ")):  # percent; the connection is closed in order or reset
            self.send(status, body, headers, keep=int(fault.split()[2]) * len(body) // 100)
            if fault.startswith("reset"):
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return None
        if fault == "cut without length":
            return self.send(status, body, headers | {"Connection": "close"}, length=None, keep=len(body) // 2)
        if fault == "chunked cut":
            self.send(status, b"", headers | {"Transfer-Encoding": "chunked"}, length=None)
            half = body[:len(body) // 2]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(half), half))
            self.close_connection = True
        elif fault.startswith("stall at "):
            self.send(status, body[:int(fault.split()[2])], headers, length=len(body))
            self.wfile.flush()
            self.faults.stalled.set()
            self.faults.resume.wait()
            self.close_connection = True
        elif fault == "one byte at a time":
            self.send(status, b"", headers, length=len(body))
            for i in range(len(body)):
                self.wfile.write(body[i:i + 1])
                if self.faults.resume.wait(0.02):
                    return
        else:
            self.send(status, body, headers)

    def send(self, status: int, body: bytes, headers: dict, *, length: int | None = -1, keep: int | None = None):
        """Answer with `body`; `length` is announced instead of its own (None announces none), `keep` bytes are sent."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:keep])
        if keep is not None:
            self.close_connection = True

    def log_message(self, *args):
        pass
