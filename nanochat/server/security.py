"""What every request passes first - the size of its headers, its Host, the token - and the headers every answer bears.

A page of some other site may point its own name at this machine and have the browser ask us (DNS rebinding). It cannot
do so under an IP address, so those are let in, and names only from a list.
"""

import hmac
import ipaddress
import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.server.errors import ApiError
from nanochat.server.settings import MAX_HEADER_BYTES, Settings

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = logging.getLogger("nanochat.server")


class Guard:
    """ASGI middleware. public: paths that ask for no token; count is told the status of every answer."""

    def __init__(self, app: ASGIApp, settings: Settings, public: frozenset[str], count: Callable[[int], None]):
        self.app, self.settings, self.public, self.count = app, settings, public, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)
        finally:
            self.count(status)
            log.info("%s %s %d %.0f ms", scope["method"], plain(scope["path"]), status,
                     1000 * (time.monotonic() - start))

    def _check(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            raise ApiError(431, f"headers must have at most {MAX_HEADER_BYTES} bytes, got {size}", "headers_too_large")
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not allowed_host(host, self.settings.allowed_hosts):
            raise ApiError(400, f"the Host header must name localhost, an IP address or an allowed host, got {host!r}",
                           "invalid_host")
        if self.settings.token is not None and scope["path"] not in self.public:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            wanted = b"Bearer " + self.settings.token.encode()
            if not hmac.compare_digest(scheme.capitalize() + b" " + given, wanted):  # schemes have no case
                raise ApiError(401, "this server asks for its token as `Authorization: Bearer ...`", "invalid_api_key",
                               headers={"WWW-Authenticate": "Bearer"})


def allowed_host(host: str, names: frozenset[str]) -> bool:
    """Say whether a Host header, with or without a port, is an IP address, localhost or one of `names`."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost" or name.lower() in names
    return True


def plain(text: str) -> str:
    """Return text for a log line: ASCII, with line ends and escape codes made visible, so that nobody forges a line."""
    return text.encode("unicode_escape").decode("ascii")
