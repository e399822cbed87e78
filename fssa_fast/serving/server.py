"""uvicorn, with an end that loses no request, and an end to clients that never finish their headers."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 32 << 10
HEADER_SECONDS = 10.0


class _Protocol(H11Protocol):
    """Cuts a connection off that has not sent a whole request's headers in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """At the first signal new requests are answered 503 and running ones end; at the second, or in time, it stops."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_seconds: float) -> None:
        super().__init__(config)
        self._service, self._grace = app.state.service, grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
        else:
            self._service.draining = True
            self._end = time.monotonic() + self._grace

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and (not self._service.open_requests or time.monotonic() > self._end):
            self.should_exit = True
        return await super().on_tick(counter)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(app: FastAPI, *, host: str, port: int, grace_seconds: float = 30.0, **options: Any) -> None:
    """Serves until a signal; options are uvicorn's."""
    logger = logging.getLogger("fssa_fast.serving")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    config = uvicorn.Config(
        app, host=host, port=port, http=_Protocol, h11_max_incomplete_event_size=HEADER_BYTES, access_log=False,
        server_header=False, log_level="warning", timeout_keep_alive=15, timeout_graceful_shutdown=5, **options,
    )  # fmt: skip
    server = Server(config, app, grace_seconds)
    asyncio.run(server.serve())
