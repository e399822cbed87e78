"""Any number of replicas of the server, on Ray Serve; needs `fssa-fast[ray]`.

A user is a row of kilobytes that every replica makes from the same database, so that any replica serves anybody. What
replicas share beside it: the completions of the last hour, in one actor, so that feedback may come to any of them.
`app` builds the application from a Serve config file, or for `fssa serve --ray`.

The versions of an adapter are the deployment's `user_config`: where that changes, one replica after the other makes
the new ones on the base model that it has, and answers by them from then on; requests under way end as they began.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig

from fssa_fast.data.history import History
from fssa_fast.serving.app import make_app
from fssa_fast.serving.keys import read_keys
from fssa_fast.serving.remembered import Completion, Remembered
from fssa_fast.serving.service import Service
from fssa_fast.serving.settings import Settings
from fssa_fast.serving.versions import Shelf, Version, Versions
from fssa_fast.users import open_store

logger = logging.getLogger("fssa_fast.serving")

BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(BaseModel):
    """What `app` is told, in a Serve config file under `args`; the names are those of `fssa serve`, and mean the same.

    api_keys: a file of keys that every replica finds. without_keys: True answers everybody who calls the server by a
        name of the loopback, which Serve's proxies must then not be reached from outside.
    cpus, gpus: of one replica. by_session: requests with the same header `x-session-id` go to the same replica, which
        has their prompts' beginnings in its cache; others to any.
    history: a folder; each replica writes a file of its own.
    """

    model_config = ConfigDict(extra="forbid")

    policy: str
    store: str
    base: str | None = None
    embedder: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    name: str | None = None
    api_keys: str | None = None
    without_keys: bool = False
    create_users: bool = False
    rows: int = Field(32, ge=1)
    cache_tokens: int = Field(16384, ge=1)
    waiting: int = Field(1024, ge=1)
    grace: float = Field(30.0, gt=0)
    history: str | None = None
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    by_session: bool = False


class HeldVersion(BaseModel):
    """A version in `user_config`: where it is saved, and its share of the users."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    share: float = Field(1.0, ge=0)


class Held(BaseModel):
    """`user_config`: all versions by their names, the first one first, and what decides between them."""

    model_config = ConfigDict(extra="forbid")

    versions: dict[str, HeldVersion] = Field(min_length=1)
    experiment: str = ""


class _Memory:
    """What all replicas remember, in an actor."""

    def __init__(self, seconds: float, limit: int) -> None:
        self._values: Remembered[Completion] = Remembered(seconds, limit)

    def get(self, key: Hashable) -> Completion | None:
        return self._values.get(key)

    def put(self, key: Hashable, value: Completion, size: int) -> None:
        self._values.put(key, value, size)


class SharedCompletions(Remembered[Completion]):
    """Completions of this replica, and, asked of the actor that all replicas tell theirs, of the others."""

    def __init__(self, seconds: float, limit: int, actor: Any) -> None:
        super().__init__(seconds, limit)
        self._actor = actor

    def get(self, key: Hashable) -> Completion | None:
        found = super().get(key)
        for pause in (0.0, 0.1):  # what another replica has just told may be on its way
            if found is None:
                time.sleep(pause)
                found = ray.get(self._actor.get.remote(key), timeout=10)
        return found

    def put(self, key: Hashable, value: Completion, size: int) -> None:
        super().put(key, value, size)
        self._actor.put.remote(key, value, size)


@serve.ingress()
class Replica:
    """One replica: a base model, the versions on it, and the server's app."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        given = Arguments(**arguments)
        self._store = open_store(given.store)
        rows = given.rows
        engine = {"max_rows": rows, "max_tokens": given.cache_tokens, "max_waiting": given.waiting}
        self._shelf = Shelf(
            Path(given.policy),
            given.base,
            given.embedder,
            self._store,
            {**engine, "step_tokens": max(256, rows)},
            shared=True,
            device_map="cuda" if given.gpus else "cpu",
            dtype=None if given.dtype is None else getattr(torch, given.dtype),
        )
        self._where = {"main": given.policy}
        context = serve.get_replica_context()
        self._history = None
        if given.history is not None:
            path = Path(given.history) / f"{context.replica_id.unique_id}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._history = History(path)
        settings = Settings(given.name or Path(given.policy).resolve().name, given.create_users)
        keys = None if given.api_keys is None else read_keys(Path(given.api_keys))
        versions = Versions([self._shelf.make("main", Path(given.policy))])
        self._app = make_app(versions, self._store, settings, keys, history=self._history)
        self._service: Service = self._app.state.service
        actor = ray.remote(_Memory).options(
            name=f"fssa-completions-{context.app_name}", namespace="fssa", num_cpus=0, lifetime="detached",
            get_if_exists=True, max_restarts=-1,
        )  # fmt: skip
        seconds, limit = settings.remember_seconds, settings.remember_bytes
        self._service.completions = SharedCompletions(seconds, limit, actor.remote(seconds, limit))
        self._retiring: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Answers by the versions of a `user_config` from now on. Raises ValueError; the old ones go on then."""
        held = Held(**config)
        before = {version.name: version for version in self._service.versions}

        def make() -> Versions:
            kept: list[Version] = []
            for name, one in held.versions.items():
                if self._where.get(name) == one.policy and name in before:
                    kept.append(Version(name, before[name].policy, before[name].engine, one.share))
                else:
                    kept.append(self._shelf.make(name, Path(one.policy), one.share))
            return Versions(kept, held.experiment)

        versions = await asyncio.to_thread(make)
        self._service.use(versions)
        self._where = {name: one.policy for name, one in held.versions.items()}
        if self._history is not None:
            self._history.experiment = held.experiment
        engines = {version.engine for version in versions}
        for version in before.values():
            if version.engine not in engines:
                task = asyncio.create_task(self._service.retire(version))
                self._retiring.add(task)  # the loop itself keeps no reference to it
                task.add_done_callback(self._retiring.discard)

    def check_health(self) -> None:
        """Raises RuntimeError where an engine has broken: Serve then replaces this replica."""
        for version in self._service.versions:
            if version.engine.closed:
                raise RuntimeError(f"the engine of version {version.name} is closed")


def application(arguments: Arguments, held: Held | None = None, **options: Any) -> serve.Application:
    """One deployment, "fssa", of replicas that hold these versions; None: `policy` alone. options: of the deployment.

    Raises ValueError where neither keys are given nor that there are none.
    """
    if (arguments.api_keys is None) != arguments.without_keys:
        raise ValueError("api_keys, without_keys: expected one of them")
    if arguments.by_session:
        options = {"request_router_config": RequestRouterConfig(request_router_class=cast(Any, BY_SESSION))} | options
    held = held or Held(versions={"main": HeldVersion(policy=arguments.policy, share=1.0)})
    deployment: Any = serve.deployment(
        Replica,
        name="fssa",
        # Beyond its rows a replica lets as many wait again; the proxies keep the rest for whoever is free first.
        max_ongoing_requests=2 * arguments.rows,
        user_config=held.model_dump(),
        graceful_shutdown_timeout_s=arguments.grace,
        max_surge_percent=100,  # a replacement is there before the one that it replaces goes
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )
    return deployment.options(**options).bind(arguments.model_dump())


def app(args: dict[str, Any]) -> serve.Application:
    """What a Serve config file builds: `import_path: fssa_fast.serving.ray:app`, and `args` as of `Arguments`.

    There the deployment "fssa" may be given `num_replicas` or an `autoscaling_config` (by requests that run or wait),
    and a `user_config` as of `Held`; without, it is one replica of `policy` alone.
    """
    return application(Arguments(**args))


def run(arguments: Arguments, held: Held, *, host: str, port: int, replicas: int) -> None:
    """Serves on this machine's Ray, or on the cluster that RAY_ADDRESS names, until a signal."""
    serve.start(http_options={"host": host, "port": port})
    serve.run(application(arguments, held, num_replicas=replicas), blocking=True)
