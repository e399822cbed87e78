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

from fssa_fast.users.connections import Connections
from fssa_fast.users.limits import is_storable
from fssa_fast.users.store import Change, Choices, Option, Stamp, StoreConflict, StoredUser, StoreError, tensor_bytes


class SqliteStore:
    """A user store in one SQLite file, made where there is none. Safe between threads and between processes.

    A change that has returned survives the process being killed and the machine losing power. Readers have connections
    of their own and never wait for a writer, of this process or another. The files are the owner's alone (0600).

    What is removed or replaced is overwritten with zeros, and the log that has older pages is emptied, before the call
    returns; so no record of it is left. SQLite does not clean the space between records, where a copy may be left of
    one that it has moved from page to page to balance them: `compact` makes the file anew without it.
    """

    APPLICATION = 0x66737361  # "fssa"
    VERSION = 2
    WAIT = 30.0  # seconds for another process's write to end
    ERASE = 5.0  # seconds for readers of the log to end, before `remove` says that they keep it

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = os.path.realpath(path)  # connections are opened later too, whatever the working directory then
        self._writing = threading.RLock()
        self._unerased = False  # something was removed, and the log not emptied since
        with self._errors():
            self._make_file()
            self._db = self._connect()
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise
        self._readers = Connections(self._connect)

    def _make_file(self) -> None:
        """Makes the file, readable by its owner only from its first moment; SQLite gives its log the same mode."""
        with _MAKING:  # to close a file that another thread's SQLite has just opened would end that one's locks
            try:
                os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except FileExistsError:
                pass
            except OSError as error:
                raise StoreError(f"{self.path}: unable to open: {error.strerror}") from error

    def _connect(self) -> sqlite3.Connection:
        with _MAKING:
            # Transactions are begun and ended here, not by the module.
            db = sqlite3.connect(self._file, timeout=self.WAIT, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # what is removed is not left in free pages
        db.execute("PRAGMA temp_store = MEMORY")  # nor in files beside
        return db

    def _prepare(self) -> None:
        with self._errors():
            application = self._db.execute("PRAGMA application_id").fetchone()[0]
            empty = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty and application != self.APPLICATION:
            raise StoreError(f"{self.path}: expected a user store, got another program's database")
        version = self._version()
        if version > self.VERSION:
            raise StoreError(
                f"{self.path}: expected format version {self.VERSION} or older, got {version}, written by a newer "
                "version of fssa_fast"
            )
        with self._errors():
            if empty:
                self._db.execute("PRAGMA page_size = 16384")  # pages that embeddings fill
            self._db.execute("PRAGMA journal_mode = WAL")
        if version < self.VERSION:
            with self._transaction() as db:
                if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in _SCHEMA:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {self.APPLICATION}")
                elif self._version() == 1:
                    for statement in _FROM_VERSION_1:
                        db.execute(statement)
                db.execute(f"PRAGMA user_version = {self.VERSION}")
        self._empty_log(0.0)  # a process that was killed may have left there what was removed

    def _version(self) -> int:
        with self._errors():
            return self._db.execute("PRAGMA user_version").fetchone()[0]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError) as error:  # OverflowError: a number that SQLite cannot hold
            raise StoreError(f"{self.path}: {error}") from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            if self._readers.closed:
                raise StoreError(f"{self.path}: expected an open store, got one that has been closed")
            with self._readers.one() as db:
                yield db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            if self._unerased:
                self._empty_log(0.0)

    # ------------------------------------------------------------ erasing

    def _empty_log(self, wait: float) -> bool:
        """Moves the log into the database and cuts it to nothing, waiting for those who read it. False: they go on."""
        with self._writing, self._errors():
            self._db.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
            try:
                (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {round(1000 * self.WAIT)}")
            self._unerased = bool(busy)
            return not busy

    def _erase(self, done: str) -> None:
        self._unerased = True
        if not self._empty_log(self.ERASE):
            raise StoreError(
                f"{self.path}: {done}, but a reader of the database has kept its log for {self.ERASE:g} s, and older "
                "copies in it; they go with the next change, or when the store is closed"
            )

    def compact(self) -> None:
        """Makes the file anew, as small as can be, without what SQLite may have left between records.

        Takes as long as it takes to write the file twice, and room for it; others wait with their changes.
        """
        with self._writing, self._errors():
            self._db.execute("VACUUM")
            self._erase("the database is compact")

    # ------------------------------------------------------------ the interface

    def about(self) -> dict[str, str]:
        with self._reading() as db:
            return dict(db.execute("SELECT key, value FROM about"))

    def set_about(self, values: Mapping[str, str | None]) -> None:
        with self._transaction() as db:
            for key, value in values.items():
                if value is None:
                    db.execute("DELETE FROM about WHERE key = ?", (key,))
                else:
                    db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, value))

    def get(self, name: str) -> StoredUser | None:
        if not is_storable(name):
            return None
        with self._reading() as db:
            row = db.execute(
                "SELECT version, strength, latent, length(choices), users.id, coalesce(fingerprint, '') FROM users "
                "LEFT JOIN encoders ON encoders.id = encoder WHERE name = ?",
                (name,),
            ).fetchone()
        if row is None:
            return None
        with self._intact(name):
            version, strength, packed, length, number, encoder = row
            latent = torch.from_numpy(np.frombuffer(packed, np.int16).copy()).view(torch.bfloat16)
            count = None if length is None else length // 8
            return StoredUser(name, int(version), float(strength), latent, str(encoder), count, (number, version))

    @contextmanager
    def _intact(self, name: str) -> Iterator[None]:
        """What is read in the block is a user's as it was written, or a StoreError is raised."""
        try:
            yield
        except (TypeError, ValueError, KeyError, struct.error) as error:
            raise StoreError(f"{self.path}: user {name!r} is damaged: {error}") from error

    def choices(self, name: str) -> Choices | None:
        if not is_storable(name):
            return None
        with self._reading() as db:
            db.execute("BEGIN")  # both reads of one state
            row = db.execute("SELECT choices FROM users WHERE name = ?", (name,)).fetchone()
            found = None
            if row is not None and row[0] is not None:
                with self._intact(name):
                    found = _options(db, _unpack(row[0]))
            db.execute("COMMIT")
        return found

    def stamp(self, name: str) -> Stamp | None:
        if not is_storable(name):
            return None
        with self._reading() as db:
            return db.execute("SELECT id, version FROM users WHERE name = ?", (name,)).fetchone()

    def put(self, changes: Sequence[Change]) -> list[Stamp]:
        with self._writing:
            with self._transaction() as db:
                stamps = [self._put(db, change) for change in changes]
            if any(change.replaces and change.user.version > 1 for change in changes):
                self._erase("the users are changed")
        return stamps

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
        with self._intact(user.name):
            packed = None
            if change.choices is not None:
                ids = [_refer(db, option) for pair in change.choices for option in pair]
                packed = struct.pack(f"<{len(ids)}I", *ids)
            if change.replaces:
                _let_go(db, before)
            elif row is not None:
                packed = before if not change.choices or before is None or packed is None else before + packed
        values = (
            user.version, user.strength, tensor_bytes(user.latent.view(torch.int16)), packed,
            _encoder(db, user.encoder), user.name,
        )  # fmt: skip
        if row is None:
            insert = (
                "INSERT INTO users (version, strength, latent, choices, encoder, name) VALUES (?, ?, ?, ?, ?, ?) "
                "RETURNING id"
            )
            (number,) = db.execute(insert, values).fetchone()
        else:
            change_one = "version = ?, strength = ?, latent = ?, choices = ?, encoder = ?"
            db.execute(f"UPDATE users SET {change_one} WHERE name = ?", values)
        return number, user.version

    def remove(self, name: str) -> bool:
        if not is_storable(name):
            return False
        with self._writing:
            with self._transaction() as db:
                row = db.execute("SELECT choices FROM users WHERE name = ?", (name,)).fetchone()
                if row is not None:
                    with self._intact(name):
                        _let_go(db, row[0])
                    db.execute("DELETE FROM users WHERE name = ?", (name,))
            if row is not None:
                self._erase(f"user {name!r} is removed")
        return row is not None

    def names(self, after: str = "", *, not_by: str | None = None) -> Iterator[str]:
        last = after
        while True:  # a page at a time: nothing is locked in between
            with self._reading() as db:
                page = db.execute(
                    "SELECT name FROM users LEFT JOIN encoders ON encoders.id = encoder "
                    "WHERE name > ? AND (? IS NULL OR fingerprint IS NOT ?) ORDER BY name LIMIT 1000",
                    (last, not_by, not_by),
                )
                names = [name for (name,) in page.fetchall()]
            if not names:
                return
            yield from names
            last = names[-1]

    def __len__(self) -> int:
        with self._reading() as db:
            return db.execute("SELECT count(*) FROM users").fetchone()[0]

    def close(self) -> None:
        self._readers.close()
        with self._writing, self._errors():
            if self._unerased:
                self._empty_log(0.0)
            self._db.close()


_MAKING = threading.Lock()

_SCHEMA = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE encoders (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE)",
    # AUTOINCREMENT: an id is never given twice, so that (id, version) names one state of one user for ever.
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, "
    "strength REAL NOT NULL, latent BLOB NOT NULL, choices BLOB, encoder INTEGER NOT NULL DEFAULT 1)",
    "CREATE TABLE options (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, uses INTEGER NOT NULL, "
    "embedding BLOB NOT NULL, text TEXT, prompt TEXT NOT NULL)",
)

# Version 1 had one encoder for all. No user is written anew: the default is that one's number.
_FROM_VERSION_1 = (
    _SCHEMA[1],
    "INSERT INTO encoders (id, fingerprint) VALUES (1, coalesce((SELECT value FROM about WHERE key = 'encoder'), ''))",
    "ALTER TABLE users ADD COLUMN encoder INTEGER NOT NULL DEFAULT 1",
)


def _encoder(db: sqlite3.Connection, fingerprint: str) -> int:
    """The number of an encoder, given now if it has none."""
    row = db.execute("SELECT id FROM encoders WHERE fingerprint = ?", (fingerprint,)).fetchone()
    if row is None:
        row = db.execute("INSERT INTO encoders (fingerprint) VALUES (?) RETURNING id", (fingerprint,)).fetchone()
    return row[0]


def _refer(db: sqlite3.Connection, option: Option) -> int:
    """The number of an option, with one more use of it."""
    return db.execute(
        "INSERT INTO options (key, uses, embedding, text, prompt) VALUES (?, 1, ?, ?, ?) "
        "ON CONFLICT (key) DO UPDATE SET uses = uses + 1 RETURNING id",
        (option.key(), tensor_bytes(option.embedding.float()), option.text, option.prompt),
    ).fetchone()[0]


def _let_go(db: sqlite3.Connection, packed: bytes | None) -> None:
    """Ends one user's uses of options, and those options that nobody uses now."""
    uses = Counter(_unpack(packed or b""))
    db.executemany("UPDATE options SET uses = uses - ? WHERE id = ?", [(n, number) for number, n in uses.items()])
    db.executemany("DELETE FROM options WHERE id = ? AND uses <= 0", [(number,) for number in uses])


def _options(db: sqlite3.Connection, ids: Sequence[int]) -> Choices:
    found: dict[int, Option] = {}
    wanted = list(dict.fromkeys(ids))
    for start in range(0, len(wanted), 500):
        part = wanted[start : start + 500]
        marks = ",".join("?" * len(part))
        rows = db.execute(f"SELECT id, embedding, text, prompt FROM options WHERE id IN ({marks})", part)
        for number, embedding, text, prompt in rows:
            if not isinstance(prompt, str) or not isinstance(text, (str, type(None))):
                raise ValueError(f"option {number} has a text that is none")
            found[number] = Option(torch.from_numpy(np.frombuffer(embedding, np.float32).copy()), text, prompt)
    missing = [number for number in wanted if number not in found]
    if missing:
        raise ValueError(f"it refers to option {missing[0]}, which is not there")
    return [(found[a], found[b]) for a, b in zip(ids[::2], ids[1::2], strict=True)]


def _unpack(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 4}I", packed)
