"""Databases that the tests of stores run on, each made anew for a test."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from fssa_fast.users import SqliteStore, UserStore


class Sqlite:
    """A SQLite file that is not there yet."""

    def __init__(self, folder: Path) -> None:
        self.where: Any = folder / "users.db"

    def open(self) -> UserStore:
        """A store over it; every call another one."""
        return SqliteStore(self.where)

    def sql(self, query: str, *values: Any) -> list[tuple]:
        """What a query finds, by a connection of its own; tables are named {users}, {options}, ..."""
        db = sqlite3.connect(self.where, isolation_level=None)
        try:
            return db.execute(query.format_map(_Names("")), values).fetchall()
        finally:
            db.close()

    def bytes(self) -> bytes:
        """All that is in its files."""
        names = [str(self.where) + end for end in ("", "-wal", "-shm")]
        return b"".join(Path(name).read_bytes() for name in names if os.path.exists(name))


class _Names(dict):
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __missing__(self, key: str) -> str:
        return self.prefix + key
