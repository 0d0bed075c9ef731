"""What an operator chooses, and the limits and defaults of every request, in one place."""

from dataclasses import dataclass

MAX_BODY_BYTES = 2**20
MAX_HEADER_BYTES = 2**15
BODY_SECONDS = 30.0  # in which a body must arrive
MAX_MESSAGES = 500
MAX_SAMPLES = 16  # of one request: prompts times n


@dataclass(frozen=True)
class Defaults:
    """Sampling where a request does not say; max_tokens is cut to what the context leaves."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 512


@dataclass(frozen=True)
class Settings:
    """How the server runs. Times are in seconds.

    token: what clients must send as `Authorization: Bearer ...`, None for nobody asks. allowed_hosts: names in the Host
    header besides localhost and IP addresses. queue: most requests waiting for the engine; more get 429, and one that
    waits longer than queue_timeout gets 503. request_timeout: of a request in the engine. drain: what running requests
    get to finish when the server stops. buffer_bytes: unread output of a client that ends its request.
    """

    model: str = "nanochat"
    token: str | None = None
    allowed_hosts: frozenset[str] = frozenset()
    queue: int = 64
    queue_timeout: float = 30.0
    request_timeout: float = 600.0
    drain: float = 10.0
    ping: float = 15.0
    send_timeout: float = 30.0
    buffer_bytes: int = 2**18
    log_text: bool = False
    defaults: Defaults = Defaults()
