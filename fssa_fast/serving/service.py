"""What all routes of a server share."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Request
from starlette.responses import Response

from fssa_fast.data.history import History
from fssa_fast.generation import Engine
from fssa_fast.policy import SteerablePolicy
from fssa_fast.serving.bridge import Bridge
from fssa_fast.serving.errors import ApiError
from fssa_fast.serving.keys import Client, Keys
from fssa_fast.serving.metrics import Metrics
from fssa_fast.serving.remembered import Completion, Remembered, Written
from fssa_fast.serving.settings import Settings
from fssa_fast.serving.versions import Version, Versions
from fssa_fast.users import StoredUsers
from fssa_fast.users.store import UserStore

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


class Service:
    """The versions of a policy with their engines, their users at rest, and what the server remembers."""

    def __init__(
        self, versions: Versions, store: UserStore, keys: Keys, settings: Settings, history: History | None = None
    ) -> None:
        self.store, self.keys, self.settings, self.history = store, keys, settings, history
        self._in_use: Counter[Engine] = Counter()
        self.metrics = Metrics(lambda: self.versions)
        self.use(versions)
        self.bridge: Bridge  # once there is a loop
        self.draining = False
        self.open_requests = 0
        self.completions: Remembered[Completion] = Remembered(settings.remember_seconds, settings.remember_bytes)
        self.writes: Remembered[Written] = Remembered(settings.remember_seconds, settings.remember_bytes)
        # What may wait for the database or an encoder, of requests; streams have no thread.
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="fssa-serving")

    def use(self, versions: Versions) -> None:
        """Answers by these versions from now on; requests under way end as they began, by the engines they are in."""
        for version in versions:
            if not isinstance(version.policy.users, StoredUsers):
                raise ValueError("policy: expected one whose users are in a store, got one without; see use_store")
            version.engine.after_step = self.metrics.step.observe
        self.versions = versions

    @contextmanager
    def using(self, version: Version) -> Iterator[None]:
        """A block that a version's engine is needed in; it is entered before the event loop does anything else."""
        self._in_use[version.engine] += 1
        try:
            yield
        finally:
            self._in_use[version.engine] -= 1

    async def retire(self, version: Version) -> None:
        """Closes the engine of a version that answers nobody new, once those who use it have done so."""
        while self._in_use[version.engine]:
            await asyncio.sleep(0.05)
        del self._in_use[version.engine]
        await asyncio.to_thread(version.engine.close)

    @property
    def policy(self) -> SteerablePolicy:
        """The first version's."""
        return self.versions.first.policy

    @property
    def users(self) -> StoredUsers:
        """The first version's, by which choices are written."""
        users = self.policy.users
        assert isinstance(users, StoredUsers)
        return users

    async def call(
        self, function: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Value:
        """Calls a function that may block, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))

    def end(self) -> None:
        """Ends the engines, and with them the requests that run; those are told."""
        for version in self.versions:
            version.engine.close()

    def close(self) -> None:
        """Ends the engines and the threads. The store stays open."""
        self.end()
        self._threads.shutdown()


def service_of(request: Request) -> Service:
    """The service of a request's app."""
    return request.app.state.service


def client_of(request: Request) -> Client:
    """Who sends a request. Raises ApiError for none that the server knows."""
    client = service_of(request).keys.client(request.headers.get("authorization"))
    request.scope["fssa_namespace"] = client.namespace  # for the log
    return client


Serving = Annotated[Service, Depends(service_of)]
Asking = Annotated[Client, Depends(client_of)]


async def once(
    request: Request, service: Service, client: Client, write: Callable[[], Coroutine[Any, Any, Response]]
) -> Response:
    """Does a write, or, where its Idempotency-Key has been seen, answers as it was answered then.

    Raises ApiError for a key that another request had, or whose request is still under way. A write that failed may
    be tried again by the same key.
    """
    name = request.headers.get("idempotency-key")
    if name is None:
        return await write()
    if not 0 < len(name) <= 255:
        raise ApiError(400, "invalid_value", "Idempotency-Key: expected 1 to 255 characters", "Idempotency-Key")
    words = f"{request.method}\0{request.url.path}\0{request.url.query}\0".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(words + await request.body(), digest_size=16).digest()
    key = client.namespace, client.admin, name
    before = service.writes.get(key)
    if before is not None and before.digest != digest:
        raise ApiError(422, "idempotency_key_reused", "Idempotency-Key: expected a new one for another request",
                       "Idempotency-Key")  # fmt: skip
    if before is not None and before.status is None:
        raise ApiError(409, "idempotency_key_in_use", "a request with this Idempotency-Key is under way",
                       "Idempotency-Key")  # fmt: skip
    if before is not None:
        assert before.status is not None
        return Response(before.body, before.status, {"Idempotency-Replayed": "true"}, media_type="application/json")
    service.writes.put(key, Written(digest), 0)
    # Whatever becomes of the client, what is begun is done, and remembered.
    return await asyncio.shield(_remembered(service, key, digest, write))


async def _remembered(
    service: Service, key: Any, digest: bytes, write: Callable[[], Coroutine[Any, Any, Response]]
) -> Response:
    try:
        response = await write()
    except BaseException:
        service.writes.forget(key)
        raise
    body = bytes(response.body)
    service.writes.put(key, Written(digest, response.status_code, body), len(body))
    return response
