"""Requests that wait: among them users take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

from fssa_fast.generation.requests import Request


class QueueFull(RuntimeError):
    """As many requests wait, of all users or of this one, as the engine lets wait."""


class Waiting:
    """One line for each user, and a line of users: whose request is taken goes to its end.

    So a request of a user who has no others waits for at most one of each other user. Not safe between threads.
    """

    def __init__(self, limit: int, limit_per_user: int) -> None:
        self._limit, self._limit_per_user = limit, limit_per_user
        self._lines: OrderedDict[tuple[str, ...], OrderedDict[Request, None]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def check(self, user: tuple[str, ...], more: int) -> None:
        """Raises QueueFull where so many more requests of this user may not wait."""
        if self._count + more > self._limit:
            raise QueueFull(f"engine: expected at most {self._limit} waiting requests; try again later")
        if len(self._lines.get(user, ())) + more > self._limit_per_user:
            raise QueueFull(
                f"user: expected at most {self._limit_per_user} waiting requests of {', '.join(user)}; try again later"
            )

    def add(self, request: Request) -> None:
        """At the end of its user's line."""
        self._lines.setdefault(request.user, OrderedDict())[request] = None
        self._count += 1

    def put_back(self, request: Request) -> None:
        """Before all others."""
        self.add(request)
        self._lines[request.user].move_to_end(request, last=False)
        self._lines.move_to_end(request.user, last=False)

    def first(self, passed: Container[Request] = ()) -> Request | None:
        """The first request of the user whose turn it is, users aside whose first one has been passed over."""
        return next((first for line in self._lines.values() if (first := next(iter(line))) not in passed), None)

    def take(self, request: Request) -> None:
        """Takes a request out; its user's turn is over."""
        self.discard(request)
        if request.user in self._lines:
            self._lines.move_to_end(request.user)

    def discard(self, request: Request) -> bool:
        """Takes a request out, and nobody's turn is over; False where it does not wait."""
        line = self._lines.get(request.user)
        if line is None or request not in line:
            return False
        del line[request]
        self._count -= 1
        if not line:
            del self._lines[request.user]
        return True

    def all(self) -> list[Request]:
        """Everything that waits."""
        return [request for line in self._lines.values() for request in line]
