"""What the server remembers for a while: completions, so that they can be chosen between, and writes already done."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fssa_fast.data.history import Made

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """Values by key, each for so many seconds, and all of them within so many bytes: the oldest go first."""

    def __init__(self, seconds: float, limit: int) -> None:
        self._seconds, self._limit = seconds, limit
        self._values: OrderedDict[Hashable, tuple[float, int, Value]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """A value, or None where it was never there or is not any more."""
        with self._lock:
            found = self._values.get(key)
            return None if found is None or found[0] < time.monotonic() else found[2]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Remembers a value from now on; size: bytes that it takes, or so."""
        now = time.monotonic()
        with self._lock:
            self._drop(key)
            self._values[key] = now + self._seconds, size + 256, value
            self._bytes += size + 256
            while self._values and (self._bytes > self._limit or next(iter(self._values.values()))[0] < now):
                self._drop(next(iter(self._values)))

    def forget(self, key: Hashable) -> None:
        """Forgets a value."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        found = self._values.pop(key, None)
        if found is not None:
            self._bytes -= found[1]


@dataclass(frozen=True)
class Completion:
    """A completion as feedback needs it."""

    user: str | None  # the stored name, where it was made for one user
    prompt: str  # what was asked, as choices keep it
    answers: tuple[str, ...]
    made: Made

    def size(self) -> int:
        """Bytes of its texts, or so."""
        return 2 * (len(self.prompt) + sum(map(len, self.answers)))


@dataclass(frozen=True)
class Written:
    """A write that was done, or, while `status` is None, is being done."""

    digest: bytes
    status: int | None = None
    body: bytes = b""
