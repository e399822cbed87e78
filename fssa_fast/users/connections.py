"""Connections to a database, used by one thread at a time and kept for the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """What a connection has in any database's module."""

    def close(self) -> None:
        """Ends the connection."""


Connection = TypeVar("Connection", bound=Closable)


class Connections(Generic[Connection]):
    """As many connections as threads need at once, of which up to `KEPT` stay open when nobody uses them.

    A connection in whose block something was raised is closed: whether it is still good is not known.
    """

    KEPT = 8

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self.closed = False

    @contextmanager
    def one(self) -> Iterator[Connection]:
        """A connection for the block."""
        with self._lock:
            found = self._idle.pop() if self._idle else None
        connection = self._connect() if found is None else found
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            keep = not self.closed and len(self._idle) < self.KEPT
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def drop(self) -> None:
        """Closes those that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Closes all; those in use when their blocks end."""
        self.closed = True
        self.drop()
