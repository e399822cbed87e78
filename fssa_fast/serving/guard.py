"""What stands around all routes: limits of bodies and of slow clients, headers, the log, shutting down."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fssa_fast.serving import traces
from fssa_fast.serving.errors import ApiError, shutting_down
from fssa_fast.serving.forms import SLASH
from fssa_fast.serving.service import Service

logger = logging.getLogger("fssa_fast.serving")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HEADER_BYTES = 32 << 10
_ALWAYS = ("/health", "/ready", "/metrics")  # answered while the server shuts down, too


class Guard:
    """Middleware around the whole app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service
        scope["path"] = _routed(scope)
        exchange = _Exchange(service, receive, send, self._headers)
        refused = self._refused(scope)
        service.open_requests += 1
        with traces.request(scope) as span:
            try:
                if refused is not None:
                    await refused.response()(scope, exchange.receive, exchange.send)
                else:
                    await self._app(scope, exchange.receive, exchange.send)
            except ApiError as error:  # of reading the body
                if exchange.status is None:
                    await error.response()(scope, exchange.receive, exchange.send)
            except TimeoutError:
                exchange.status = exchange.status or 408  # the client reads nothing: the connection is closed
            finally:
                service.open_requests -= 1
                self._log(scope, exchange, span)

    def _refused(self, scope: Scope) -> ApiError | None:
        if self._service.draining and scope["path"] not in _ALWAYS:
            return shutting_down()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:  # they came in one piece
            return ApiError(431, "headers_too_long", f"headers: expected at most {HEADER_BYTES} bytes", None,
                            {"Connection": "close"})  # fmt: skip
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._service.settings.body_bytes:
            return _too_long(self._service)
        return None

    def _log(self, scope: Scope, exchange: _Exchange, span: traces.Span) -> None:
        route = getattr(scope.get("route"), "path", "other")  # the pattern: a path may hold a user's name
        seconds = time.perf_counter() - exchange.began
        status = exchange.status or 499
        traces.answered(span, scope["method"], route, status)
        self._service.metrics.requests.labels(route, status).inc()
        self._service.metrics.seconds.labels(route).observe(seconds)
        if logger.isEnabledFor(logging.INFO):
            line = {"request": exchange.number, "method": scope["method"], "route": route, "status": status,
                    "ms": round(1000 * seconds, 1), "namespace": scope.get("fssa_namespace")}  # fmt: skip
            logger.info(json.dumps(line))


def _routed(scope: Scope) -> str:
    """The path by which a route is found: a slash that was sent as %2F is part of a name, and ends none."""
    return unquote(scope["raw_path"].decode("ascii").replace("%2F", SLASH).replace("%2f", SLASH))


class _Exchange:
    """One request and its answer, with the limits on both."""

    def __init__(self, service: Service, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._service, self._receive, self._send, self._headers = service, receive, send, headers
        self.number = uuid.uuid4().hex
        self.began = time.perf_counter()
        self.status: int | None = None
        self._bytes, self._whole = 0, False

    async def receive(self) -> Message:
        if self._whole:  # now only the client's going can come
            return await self._receive()
        left = self._service.settings.body_seconds - (time.perf_counter() - self.began)
        try:
            async with asyncio.timeout(max(left, 0.0)):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "too_slow", "the body did not come in time", None, {"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > self._service.settings.body_bytes:
                raise _too_long(self._service)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [*self._headers, (b"x-request-id", self.number.encode())]
            message = {**message, "headers": [*message["headers"], *own]}
        async with asyncio.timeout(self._service.settings.body_seconds):  # a client that does not read holds a row
            await self._send(message)


def _too_long(service: Service) -> ApiError:
    return ApiError(413, "body_too_long", f"body: expected at most {service.settings.body_bytes} bytes", None,
                    {"Connection": "close"})  # fmt: skip
