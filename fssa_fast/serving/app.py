"""The server's app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, Response

from fssa_fast import __version__
from fssa_fast.data.history import History
from fssa_fast.serving import completions, errors, people
from fssa_fast.serving.bridge import Bridge
from fssa_fast.serving.errors import ApiError, json_response
from fssa_fast.serving.guard import Guard
from fssa_fast.serving.keys import Key, Keys
from fssa_fast.serving.service import Asking, Service, Serving
from fssa_fast.serving.settings import Settings
from fssa_fast.serving.versions import Versions
from fssa_fast.users.store import UserStore

PAGE = Path(__file__).parent / "page"
_PARTS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


def make_app(
    versions: Versions,
    store: UserStore,
    settings: Settings,
    keys: list[Key] | None = None,
    *,
    history: History | None = None,
) -> FastAPI:
    """An app that serves the users of a policy, in one version or several; it closes the engines when it ends.

    Args:
        versions: of policies with tokenizers, and with their users in `store`; their engines with threads of their own.
        keys: whose requests are answered; None answers everybody, and only to the names of the loopback.
        history: where completions and choices are recorded; None records none.

    Raises ValueError for a policy without tokenizer or store.
    """
    if any(version.policy.tokenizer is None for version in versions):
        raise ValueError("policy: expected one with a tokenizer, got one without")
    service = Service(versions, store, Keys(keys), settings, history)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.bridge = Bridge(asyncio.get_running_loop())
        try:
            yield
        finally:
            service.draining = True
            await asyncio.to_thread(service.close)

    app = FastAPI(title="fssa_fast", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    app.include_router(completions.router)
    app.include_router(people.router)

    @app.get("/health", tags=["server"])
    async def health() -> Response:
        """Whether the server is alive."""
        return json_response({"status": "ok"})

    @app.get("/ready", tags=["server"])
    async def ready(service: Serving) -> Response:
        """Whether the server takes requests."""
        if service.draining:
            raise errors.shutting_down()
        return json_response({"status": "ok"})

    @app.get("/metrics", tags=["server"])
    async def metrics(service: Serving, client: Asking) -> Response:
        """Figures for Prometheus; with keys, for an admin's."""
        if not client.admin:
            raise ApiError(403, "admin_only", "metrics: expected an admin's key")
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in _PARTS:
            raise ApiError(404, "not_found", "Not Found")
        return FileResponse(PAGE / name, media_type=_PARTS[name])

    if keys is None:  # else a foreign page could reach it by a name of its own that leads to the loopback
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    app.add_middleware(Guard, service=service)
    return app
