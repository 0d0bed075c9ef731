"""Between HTTP and our handlers: bodies read with a limit, streams that are closed for sure, clients that leave."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from nanochat.server.errors import ApiError
from nanochat.server.settings import BODY_SECONDS, MAX_BODY_BYTES, Settings

log = logging.getLogger("nanochat.server")
AppStatus.disable_automatic_graceful_drain()  # streams end by Pool.drain, which lets them finish


class StrictRequest(Request):
    """Reads no more than a body may have, and only JSON that means the same to everybody."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            announced = self.headers.get("content-length", "0")
            body, most = bytearray(), int(announced) if announced.isdecimal() else 0
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    while most <= MAX_BODY_BYTES:
                        message = await self.receive()
                        if message["type"] == "http.disconnect":
                            raise ApiError(499, "the client has left", "disconnected")
                        body += message.get("body", b"")
                        most = max(most, len(body))
                        if not message.get("more_body"):
                            break
            except TimeoutError:
                raise ApiError(408, f"a request body must arrive within {BODY_SECONDS:g} s", "timeout") from None
            if most > MAX_BODY_BYTES:
                raise ApiError(413, f"a request body must have at most {MAX_BODY_BYTES} bytes", "body_too_large")
            self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the request body must be JSON in UTF-8: {error}", "invalid_json") from None


class StrictRoute(APIRoute):
    """A route whose handler gets a StrictRequest."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))
        return handle_strictly


class JobStream(EventSourceResponse):
    """Streams an answer, with pings in its silences; calls `close` at the end, which may come before the beginning."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None], settings: Settings):
        super().__init__(chunks, ping=settings.ping, send_timeout=settings.send_timeout,
                         ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"))
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("a client did not read its answer")
        finally:
            self.close()


async def or_disconnect(request: Request, work: Awaitable) -> Any:
    """Return what `work` gives; when the client leaves first, cancel it and raise ApiError."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(499, "the client has left", "disconnected")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
