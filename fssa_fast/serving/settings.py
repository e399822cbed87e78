"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    name: of the policy in `model`; `name:base` is the untouched model.
    create_users: whether a user nobody has heard of is answered as PRIOR and made by the first choice; else it is 404.
    body_bytes: the longest body of a request. body_seconds: how long one may take to come, and how long a client may
        leave what it is sent unread.
    remember_seconds: how long completions are remembered for feedback, and writes for their idempotency keys.
    remember_bytes: how much of either is kept at most; the oldest go first.
    """

    name: str
    create_users: bool = False
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    remember_seconds: float = 3600.0
    remember_bytes: int = 64 << 20
