"""Users at rest in one SQLite file."""

from __future__ import annotations

import os
import sqlite3
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fssa_fast.users.store import Change, Choices, Option, Stamp, StoreConflict, StoredUser, StoreError, tensor_bytes


class SqliteStore:
    """A user store in one SQLite file, made where there is none. Safe between threads and between processes.

    A change that has returned survives the process being killed and the machine losing power.
    """

    APPLICATION = 0x66737361  # "fssa"
    VERSION = 1

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        with self._errors():
            # Transactions are begun and ended here, not by the module.
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self._errors():
            application = self._db.execute("PRAGMA application_id").fetchone()[0]
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            empty = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty and application != self.APPLICATION:
            raise StoreError(f"{self.path}: expected a user store, got another program's database")
        if version > self.VERSION:
            raise StoreError(
                f"{self.path}: expected format version {self.VERSION} or older, got {version}, written by a newer "
                "version of fssa_fast"
            )
        with self._errors():
            if empty:
                self._db.execute("PRAGMA page_size = 16384")  # pages that embeddings fill
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")  # what is removed is not left in free pages
        with self._transaction() as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {self.APPLICATION}")
                db.execute(f"PRAGMA user_version = {self.VERSION}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def about(self) -> dict[str, str]:
        with self._lock, self._errors():
            return dict(self._db.execute("SELECT key, value FROM about"))

    def set_about(self, values: Mapping[str, str]) -> None:
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", list(values.items()))

    def get(self, name: str) -> StoredUser | None:
        with self._lock, self._errors():
            row = self._db.execute(
                "SELECT version, strength, latent, length(choices), id FROM users WHERE name = ?", (name,)
            ).fetchone()
        if row is None:
            return None
        version, strength, packed, length, number = row
        latent = torch.from_numpy(np.frombuffer(packed, np.int16).copy()).view(torch.bfloat16)
        return StoredUser(name, version, strength, latent, None if length is None else length // 8, (number, version))

    def choices(self, name: str) -> Choices | None:
        with self._lock, self._errors():
            self._db.execute("BEGIN")  # both reads of one state
            try:
                row = self._db.execute("SELECT choices FROM users WHERE name = ?", (name,)).fetchone()
                return None if row is None or row[0] is None else self._options(_unpack(row[0]))
            finally:
                self._db.execute("COMMIT")

    def _options(self, ids: Sequence[int]) -> Choices:
        found: dict[int, Option] = {}
        wanted = list(dict.fromkeys(ids))
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            marks = ",".join("?" * len(part))
            rows = self._db.execute(f"SELECT id, embedding, text, prompt FROM options WHERE id IN ({marks})", part)
            for number, embedding, text, prompt in rows:
                found[number] = Option(torch.from_numpy(np.frombuffer(embedding, np.float32).copy()), text, prompt)
        missing = [number for number in wanted if number not in found]
        if missing:
            raise StoreError(f"{self.path}: a user refers to option {missing[0]}, which is not there")
        return [(found[a], found[b]) for a, b in zip(ids[::2], ids[1::2], strict=True)]

    def stamp(self, name: str) -> Stamp | None:
        with self._lock, self._errors():
            return self._db.execute("SELECT id, version FROM users WHERE name = ?", (name,)).fetchone()

    def put(self, changes: Sequence[Change]) -> list[Stamp]:
        with self._transaction() as db:
            return [self._put(db, change) for change in changes]

    def _put(self, db: sqlite3.Connection, change: Change) -> Stamp:
        user = change.user
        number, there, before = 0, 0, None
        row = db.execute("SELECT id, version, choices FROM users WHERE name = ?", (user.name,)).fetchone()
        if row is not None:
            number, there, before = row
        if there != user.version - 1:
            raise StoreConflict(
                f"{self.path}: user {user.name!r}: expected version {user.version - 1} there, got {there}"
            )
        packed = None
        if change.choices is not None:
            ids = [self._refer(db, option) for pair in change.choices for option in pair]
            packed = struct.pack(f"<{len(ids)}I", *ids)
        if change.replaces:
            self._let_go(db, before)
        elif row is not None:
            packed = before if not change.choices or before is None or packed is None else before + packed
        values = (user.version, user.strength, tensor_bytes(user.latent.view(torch.int16)), packed, user.name)
        if row is None:
            insert = "INSERT INTO users (version, strength, latent, choices, name) VALUES (?, ?, ?, ?, ?) RETURNING id"
            (number,) = db.execute(insert, values).fetchone()
        else:
            db.execute("UPDATE users SET version = ?, strength = ?, latent = ?, choices = ? WHERE name = ?", values)
        return number, user.version

    @staticmethod
    def _refer(db: sqlite3.Connection, option: Option) -> int:
        """The number of an option, with one more use of it."""
        return db.execute(
            "INSERT INTO options (key, uses, embedding, text, prompt) VALUES (?, 1, ?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET uses = uses + 1 RETURNING id",
            (option.key(), tensor_bytes(option.embedding.float()), option.text, option.prompt),
        ).fetchone()[0]

    @staticmethod
    def _let_go(db: sqlite3.Connection, packed: bytes | None) -> None:
        """Ends one user's uses of options, and those options that nobody uses now."""
        uses = Counter(_unpack(packed or b""))
        db.executemany("UPDATE options SET uses = uses - ? WHERE id = ?", [(n, number) for number, n in uses.items()])
        db.executemany("DELETE FROM options WHERE id = ? AND uses = 0", [(number,) for number in uses])

    def remove(self, name: str) -> bool:
        with self._transaction() as db:
            row = db.execute("SELECT choices FROM users WHERE name = ?", (name,)).fetchone()
            if row is not None:
                self._let_go(db, row[0])
                db.execute("DELETE FROM users WHERE name = ?", (name,))
        return row is not None

    def names(self) -> Iterator[str]:
        last = ""
        while True:  # a page at a time: nothing is locked in between
            with self._lock, self._errors():
                page = self._db.execute("SELECT name FROM users WHERE name > ? ORDER BY name LIMIT 1000", (last,))
                names = [name for (name,) in page.fetchall()]
            if not names:
                return
            yield from names
            last = names[-1]

    def __len__(self) -> int:
        with self._lock, self._errors():
            return self._db.execute("SELECT count(*) FROM users").fetchone()[0]

    def close(self) -> None:
        with self._lock, self._errors():
            self._db.close()


_SCHEMA = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # AUTOINCREMENT: an id is never given twice, so that (id, version) names one state of one user for ever.
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, "
    "strength REAL NOT NULL, latent BLOB NOT NULL, choices BLOB)",
    "CREATE TABLE options (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, uses INTEGER NOT NULL, "
    "embedding BLOB NOT NULL, text TEXT, prompt TEXT NOT NULL)",
)


def _unpack(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 4}I", packed)
