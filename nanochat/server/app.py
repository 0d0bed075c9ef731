"""The application: the routes, the page's files, and the guard in front of both."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response

from nanochat.engine import Engine
from nanochat.server.api import Api
from nanochat.server.errors import add_error_handlers
from nanochat.server.security import Guard
from nanochat.server.settings import Settings
from nanochat.server.static_files import static_files
from nanochat.server.transport import StrictRoute
from nanochat.server.worker import Pool


def create_app(engine_factory: Callable[[], Engine] | list[Callable[[], Engine]], settings: Settings | None = None
               ) -> FastAPI:
    """Return the server as an ASGI application.

    engine_factory makes the engine, in the engine's own thread, while the server already answers; a list makes one
    engine each, say one per GPU, behind one queue. app.state.pool is that queue.
    """
    settings = settings or Settings()
    factories = engine_factory if isinstance(engine_factory, list) else [engine_factory]
    pool = Pool(factories, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool.start()
        yield
        await asyncio.to_thread(pool.stop)

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.pool = pool
    app.router.route_class = StrictRoute
    add_error_handlers(app)
    files = static_files()
    api = Api(pool, settings)
    api.add_to(app)
    add_pages(app, files)
    app.add_middleware(Guard, settings=settings, public=frozenset({"/health", *files}), count=api.metrics.answered)
    return app


def add_pages(app: FastAPI, files: dict[str, tuple[bytes, str]]) -> None:
    """Serve the chat page and what belongs to it, from memory."""
    def route(content: bytes, media_type: str) -> Callable:
        async def send() -> Response:
            return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})
        return send

    for path, (content, media_type) in files.items():
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(route(content, media_type))
