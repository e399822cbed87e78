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

from fssa_fast.serving.guard import HEADER_BYTES

HEADER_SECONDS = 10.0


class _Protocol(H11Protocol):
    """Cuts a connection off that has not sent a whole request's headers in time, be it the first or a later one."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._due = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._due is None and not self._answering():
            self._due = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        super().data_received(data)
        if self._answering():
            self._nothing_due()

    def connection_lost(self, exc: Exception | None) -> None:
        self._nothing_due()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:  # of a request that came and was answered within one call
        self._nothing_due()
        super().on_response_complete()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _nothing_due(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class Server(uvicorn.Server):
    """At the first signal new requests are answered 503, and running ones end.

    Those that are not done in time are told that the server ends, and it stops; a second signal does not wait for that.
    Options are uvicorn's.
    """

    def __init__(self, app: FastAPI, grace_seconds: float, **options: Any) -> None:
        config = uvicorn.Config(
            app, http=_Protocol, h11_max_incomplete_event_size=HEADER_BYTES, access_log=False, server_header=False,
            log_level="warning", timeout_keep_alive=15, timeout_graceful_shutdown=5, **options,
        )  # fmt: skip
        super().__init__(config)
        self._service, self._grace = app.state.service, grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
        else:
            self._service.draining = True
            self._end = time.monotonic() + self._grace

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining:
            late = time.monotonic() > self._end
            if late:
                await asyncio.to_thread(self._service.end)
            if late or not self._service.open_requests:
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
    server = Server(app, grace_seconds, host=host, port=port, **options)
    asyncio.run(server.serve())
