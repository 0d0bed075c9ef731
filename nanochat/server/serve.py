"""Runs the application under uvicorn: the socket, the end on a signal, the log."""

import asyncio
import logging
import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.common import UserError

HEADER_SECONDS = 10.0  # within once and twice this a request must have come


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} must be an address that is free, it is not "
                        f"({getattr(error, 'strerror', None) or error})") from error


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish. Raises UserError when the engine gives up."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("nanochat.server").setLevel(logging.INFO)
    server = Server(app)
    server.run(sockets=[listener])
    if app.state.pool.failure:
        raise UserError(app.state.pool.failure)


class Protocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients who do not ask, or do not read the end of an answer: uvicorn waits forever."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.idle_after: object = self  # the request after which it was idle at the last look; itself: it was not
        self.next_look = self.loop.call_later(HEADER_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.next_look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP where no answer has begun; the request it belongs to has lost its client."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        self.transport.close()
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _look(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing():
            self.transport.abort()
        elif idle and self.idle_after is self.cycle:
            self.transport.close()
        self.idle_after = self.cycle if idle else self
        self.next_look = self.loop.call_later(HEADER_SECONDS, self._look)


class Server(uvicorn.Server):
    """uvicorn that drains the engine's queue when it stops, and stops when the engine gives up."""

    def __init__(self, app: FastAPI):
        self.pool = app.state.pool
        super().__init__(uvicorn.Config(app, http=Protocol, log_level="error", access_log=False, server_header=False,
                                        proxy_headers=False,
                                        timeout_graceful_shutdown=round(self.pool.settings.drain) + 2))
        self.pool.on_failure = self.stop

    def stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.create_task(self.pool.drain())
        await super().shutdown(sockets)
        drain.cancel()
