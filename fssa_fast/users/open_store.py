"""Which database a store's name means."""

from __future__ import annotations

import os

from fssa_fast.users.sqlite_store import SqliteStore
from fssa_fast.users.store import UserStore


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether this names a PostgreSQL database, and no file."""
    return isinstance(where, str) and where.startswith(("postgresql://", "postgres://"))


def open_store(where: str | os.PathLike[str]) -> UserStore:
    """The store in a PostgreSQL database by its URL, or in a SQLite file by its path.

    Raises StoreError; ImportError for a URL where `fssa-fast[postgres]` is not installed.
    """
    if not is_url(where):
        return SqliteStore(where)
    try:
        from fssa_fast.users.postgres_store import PostgresStore
    except ImportError as error:
        raise ImportError(f"store: expected psycopg for PostgreSQL, from fssa-fast[postgres]; got: {error}") from error
    return PostgresStore(str(where))
