"""Who is asking: keys, each with a namespace of users and limits."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fssa_fast.serving.errors import ApiError
from fssa_fast.serving.forms import MAX_NAME

_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Key:
    """An entry of the file of keys; the key itself is nowhere, only its SHA-256, in hexadecimal.

    An admin's names are those of the database: `namespace/name` for the users of another key.
    requests_per_minute, tokens_per_minute (of prompts and answers), open_requests: None is without limit.
    """

    sha256: str
    namespace: str = ""
    admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    open_requests: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: expected 64 hexadecimal digits, got {self.sha256!r:.80}")
        if not isinstance(self.admin, bool):
            raise ValueError(f"admin: expected true or false, got {self.admin!r}")
        if self.admin and self.namespace:
            raise ValueError(f"namespace: expected none for an admin's key, got {self.namespace!r}")
        if not self.admin and not (isinstance(self.namespace, str) and _NAMESPACE.fullmatch(self.namespace)):
            raise ValueError(f"namespace: expected small letters, digits and hyphens, got {self.namespace!r}")
        for name in ("requests_per_minute", "tokens_per_minute", "open_requests"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected null or an integer, at least 1, got {value!r}")


class _Bucket:
    """So many a minute, as many at once; it may be overdrawn, and is then empty for longer."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute, self._left, self._when = per_minute, float(per_minute or 0), time.monotonic()

    def wait(self) -> float:
        """The seconds until there is one to take; 0: there is."""
        if self._per_minute is None:
            return 0.0
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._when) * self._per_minute / 60)
        self._when = now
        return max(0.0, (1.0 - self._left) * 60 / self._per_minute)

    def charge(self, amount: float) -> None:
        """Takes an amount whatever is left."""
        self._left -= amount


@dataclass
class Client:
    """One key while the server runs: whose users it sees, and how much it may ask for."""

    namespace: str = ""
    admin: bool = True
    key: Key | None = None
    running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._requests = _Bucket(self.key.requests_per_minute if self.key else None)
        self._tokens = _Bucket(self.key.tokens_per_minute if self.key else None)

    @property
    def prefix(self) -> str:
        """What the stored names of this key's users begin with; a namespace has no slash, so nobody else's do."""
        return f"{self.namespace}/" if self.namespace else ""

    def stored(self, name: str) -> str:
        """A user's name in the database. Raises ApiError for a name that no user can have."""
        if not 0 < len(name) <= MAX_NAME or name.startswith("__") or any(c < " " or c == "\x7f" for c in name):
            raise ApiError(
                400, "invalid_value", f"user: expected 1 to {MAX_NAME} characters, none of them a control character, "
                f"and not two underscores first; got {name!r:.80}", "user",
            )  # fmt: skip
        return self.prefix + name

    def public(self, stored: str) -> str:
        """A user's name as this key knows it."""
        return stored.removeprefix(self.prefix)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Holds one request. Raises ApiError beyond a limit."""
        with self._lock:
            limit = self.key.open_requests if self.key else None
            if limit is not None and self.running >= limit:
                raise _limited(f"at most {limit} requests of this key may be open", 1.0)
            for bucket, what in ((self._tokens, "tokens"), (self._requests, "requests")):
                if wait := bucket.wait():
                    raise _limited(f"this key's {what} a minute are used up", wait)
            self._requests.charge(1)
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def charge(self, tokens: int) -> None:
        """Counts tokens that were computed for this key."""
        with self._lock:
            self._tokens.charge(tokens)


def _limited(message: str, seconds: float) -> ApiError:
    return ApiError(429, "rate_limit_exceeded", message, None, {"Retry-After": str(int(seconds) + 1)})


class Keys:
    """The keys of a server. None: everybody is an admin, which is for the loopback only."""

    def __init__(self, keys: list[Key] | None) -> None:
        if keys is not None and len({key.sha256 for key in keys}) < len(keys):
            raise ValueError("keys: expected each once, got one twice")
        self._anyone = Client() if keys is None else None
        self._clients = [(bytes.fromhex(key.sha256), Client(key.namespace, key.admin, key)) for key in keys or ()]

    def client(self, authorization: str | None) -> Client:
        """Whose key this is, of a header's `Bearer KEY`. Raises ApiError for none of them."""
        if self._anyone is not None:
            return self._anyone
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise ApiError(401, "missing_api_key", "expected the header Authorization: Bearer KEY", None,
                           {"WWW-Authenticate": "Bearer"})  # fmt: skip
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, client in self._clients:  # all of them, so that the time says nothing
            if hmac.compare_digest(known, digest):
                found = client
        if found is None:
            raise ApiError(401, "invalid_api_key", "the key is none of this server's", None,
                           {"WWW-Authenticate": "Bearer"})  # fmt: skip
        return found


def read_keys(path: Path) -> list[Key]:
    """The keys of a file: {"keys": [{"sha256": ..., "namespace": ...}, ...]}. Raises ValueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [Key(**entry) for entry in found["keys"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected keys as `fssa key` writes them: {error}") from error


def add_key(path: Path, **options: Any) -> str:
    """Makes a key, adds it to a file that only its owner may read, and returns it: it is not to be had again."""
    secret = "fssa-" + secrets.token_urlsafe(32)
    keys = read_keys(path) if path.exists() else []
    keys.append(Key(hashlib.sha256(secret.encode()).hexdigest(), **options))
    part = path.with_name(path.name + ".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
    part.replace(path)
    return secret
