"""Runs the application under uvicorn: the socket, the end on a signal, the log."""

import asyncio
import logging
import socket

import uvicorn
from fastapi import FastAPI

from nanochat.common import UserError


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
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    server = Server(app)
    server.run(sockets=[listener])
    if app.state.pool.state == "failed":
        raise UserError(app.state.pool.failure)


class Server(uvicorn.Server):
    """uvicorn that drains the engine's queue when it stops, and stops when the engine gives up."""

    def __init__(self, app: FastAPI):
        self.pool = app.state.pool
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                        timeout_graceful_shutdown=round(self.pool.settings.drain) + 2))
        self.pool.on_failure = self.stop

    def stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.create_task(self.pool.drain())
        await super().shutdown(sockets)
        drain.cancel()
