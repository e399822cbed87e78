"""Users at rest in PostgreSQL, for any number of processes and machines; needs `fssa-fast[postgres]`.

By psycopg and not by SQLAlchemy for both databases: how a change is locked, made whole and erased is what differs most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import psycopg
import torch
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fssa_fast.users.connections import Connections
from fssa_fast.users.limits import is_storable
from fssa_fast.users.store import Change, Choices, Option, Stamp, StoreConflict, StoredUser, StoreError, tensor_bytes

Postgres = psycopg.Connection[tuple]


class PostgresStore:
    """A user store in a PostgreSQL database, in tables whose names begin with `fssa_`, made where there are none.

    Safe between threads, processes and machines. A change that has returned is as durable as the server makes its
    commits (`synchronous_commit`). Where the connection is lost the call raises StoreError, and the next one connects
    anew; of a change it is then not known whether it was made, and its user's version tells.

    What is removed is no longer found; when the server's own files and logs let it go is for its vacuum and archives.

    Args:
        url: "postgresql://user@host/database?options", or another connection string of libpq. Passwords in it are not
            shown in errors.
    """

    VERSION = 1

    def __init__(self, url: str) -> None:
        try:
            given = conninfo_to_dict(url)
        except psycopg.Error as error:
            raise StoreError("store: expected a connection string of PostgreSQL, got one that is none") from error
        # A server that is gone is noticed in seconds, where the user of this class has not said otherwise.
        limits = {"connect_timeout": 10, "tcp_user_timeout": 30_000}
        self._connection = make_conninfo(url, **{name: value for name, value in limits.items() if name not in given})
        self.where = f"postgresql://{given.get('host', 'localhost')}/{given.get('dbname', '')}"
        self._idle = Connections(self._connect)
        with self._transaction() as db:
            self._prepare(db)

    def _connect(self) -> Postgres:
        db: Postgres = psycopg.connect(self._connection, autocommit=True)
        if db.info.parameter_status("server_encoding") != "UTF8":
            db.close()
            raise StoreError(f"{self.where}: expected a database in UTF8")
        db.execute("SET lock_timeout = '30s'")
        return db

    def _prepare(self, db: Postgres) -> None:
        # Whoever comes second waits, and finds the tables.
        db.execute("SELECT pg_advisory_xact_lock(hashtext('fssa_users'))")
        if db.execute("SELECT to_regclass('fssa_about')").fetchone() == (None,):
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute("INSERT INTO fssa_about VALUES ('version', %s)", (str(self.VERSION),))
        row = db.execute("SELECT value FROM fssa_about WHERE key = 'version'").fetchone()
        if row != (str(self.VERSION),):
            raise StoreError(
                f"{self.where}: expected format version {self.VERSION}, got {row and row[0]}, written by another "
                "version of fssa_fast"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if self._idle.closed:
            raise StoreError(f"{self.where}: expected an open store, got one that has been closed")
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            self._idle.drop()  # what has ended this connection has ended the others too
            raise StoreError(f"{self.where}: {error}; the next call connects anew") from error
        except psycopg.Error as error:
            raise StoreError(f"{self.where}: {error}") from error

    @contextmanager
    def _reading(self) -> Iterator[Postgres]:
        with self._errors(), self._idle.one() as db:
            yield db

    @contextmanager
    def _transaction(self, kind: str = "") -> Iterator[Postgres]:
        with self._errors(), self._idle.one() as db, db.transaction():
            if kind:
                db.execute(f"SET TRANSACTION {kind}")
            yield db

    # ------------------------------------------------------------ the interface

    def about(self) -> dict[str, str]:
        with self._reading() as db:
            return dict(db.execute("SELECT key, value FROM fssa_about WHERE key <> 'version'").fetchall())

    def set_about(self, values: Mapping[str, str | None]) -> None:
        with self._transaction() as db:
            for key, value in values.items():
                if value is None:
                    db.execute("DELETE FROM fssa_about WHERE key = %s", (key,))
                else:
                    insert = "INSERT INTO fssa_about VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = %s"
                    db.execute(insert, (key, value, value))

    def get(self, name: str) -> StoredUser | None:
        if not is_storable(name):
            return None
        with self._reading() as db:
            row = db.execute(
                "SELECT version, strength, latent, cardinality(choices), u.id, fingerprint FROM fssa_users u "
                "JOIN fssa_encoders e ON e.id = encoder WHERE name = %s",
                (name,),
            ).fetchone()
        if row is None:
            return None
        version, strength, packed, length, number, encoder = row
        with self._intact(name):
            latent = torch.from_numpy(np.frombuffer(packed, np.int16).copy()).view(torch.bfloat16)
        count = None if length is None else length // 2
        return StoredUser(name, version, strength, latent, encoder, count, (number, version))

    @contextmanager
    def _intact(self, name: str) -> Iterator[None]:
        """What is read in the block is a user's as it was written, or a StoreError is raised."""
        try:
            yield
        except (ValueError, KeyError) as error:
            raise StoreError(f"{self.where}: user {name!r} is damaged: {error}") from error

    def choices(self, name: str) -> Choices | None:
        if not is_storable(name):
            return None
        with self._transaction("ISOLATION LEVEL REPEATABLE READ READ ONLY") as db:  # both reads of one state
            row = db.execute("SELECT choices FROM fssa_users WHERE name = %s", (name,)).fetchone()
            if row is None or row[0] is None:
                return None
            with self._intact(name):
                return _options(db, row[0])

    def stamp(self, name: str) -> Stamp | None:
        if not is_storable(name):
            return None
        with self._reading() as db:
            row = db.execute("SELECT id, version FROM fssa_users WHERE name = %s", (name,)).fetchone()
        return None if row is None else (row[0], row[1])

    def put(self, changes: Sequence[Change]) -> list[Stamp]:
        while True:
            try:
                with self._transaction() as db:
                    # In one order, so that changes of the same users and options wait for each other, not in a circle.
                    order = sorted(range(len(changes)), key=lambda index: changes[index].user.name)
                    there = {index: self._locked(db, changes[index]) for index in order}
                    numbers = _refer(db, changes)
                    before = [there[index][1] or [] for index in order if changes[index].replaces]
                    _let_go(db, [number for one in before for number in one])
                    return [
                        self._put(db, change, there[index][0], numbers) for index, change in enumerate(changes)
                    ]
            except StoreError as error:
                # Uses of options that are let go may still be locked in a circle; of all, the server ends one.
                if not isinstance(error.__cause__, psycopg.errors.DeadlockDetected):
                    raise

    def _locked(self, db: Postgres, change: Change) -> tuple[int, list[int] | None]:
        """The number and choices of a user as they are, and stay until the change is made; (0, None) for a new one."""
        name, version = change.user.name, change.user.version
        row = db.execute("SELECT id, version, choices FROM fssa_users WHERE name = %s FOR UPDATE", (name,)).fetchone()
        there = 0 if row is None else row[1]
        if there != version - 1:
            raise self._conflict(change, there)
        return (0, None) if row is None else (row[0], row[2])

    def _conflict(self, change: Change, there: int) -> StoreConflict:
        name, before = change.user.name, change.user.version - 1
        return StoreConflict(f"{self.where}: user {name!r}: expected version {before} there, got {there}")

    def _put(self, db: Postgres, change: Change, number: int, numbers: Mapping[bytes, int]) -> Stamp:
        user, ids = change.user, None
        if change.choices is not None:
            ids = [numbers[option.key()] for pair in change.choices for option in pair]
        encoder = _encoder(db, user.encoder)
        values = (user.version, user.strength, tensor_bytes(user.latent.view(torch.int16)), encoder)
        if not number:
            row = db.execute(
                "INSERT INTO fssa_users (version, strength, latent, encoder, choices, name) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO NOTHING RETURNING id",
                (*values, ids, user.name),
            ).fetchone()
            if row is None:  # somebody has added it since it was looked for
                raise self._conflict(change, 1)
            return row[0], user.version
        # No choices are kept: NULL || ids is NULL.
        choices = "%s" if change.replaces else "choices || %s::bigint[]"
        db.execute(
            "UPDATE fssa_users SET version = %s, strength = %s, latent = %s, encoder = %s, "
            f"choices = {choices} WHERE id = %s",
            (*values, ids if change.replaces else ids or [], number),
        )
        return number, user.version

    def remove(self, name: str) -> bool:
        if not is_storable(name):
            return False
        while True:
            try:
                with self._transaction() as db:
                    delete = "DELETE FROM fssa_users WHERE name = %s RETURNING choices"
                    row = db.execute(delete, (name,)).fetchone()
                    _let_go(db, row[0] or [] if row else [])
                    return row is not None
            except StoreError as error:
                if not isinstance(error.__cause__, psycopg.errors.DeadlockDetected):
                    raise

    def names(self, after: str = "", *, not_by: str | None = None) -> Iterator[str]:
        last = after
        while True:  # a page at a time: nothing is locked in between
            with self._reading() as db:
                page = db.execute(
                    "SELECT name FROM fssa_users u JOIN fssa_encoders e ON e.id = encoder "
                    "WHERE name > %s AND (%s::text IS NULL OR fingerprint <> %s) ORDER BY name LIMIT 1000",
                    (last, not_by, not_by),
                ).fetchall()
            if not page:
                return
            yield from (name for (name,) in page)
            last = page[-1][0]

    def __len__(self) -> int:
        with self._reading() as db:
            row = db.execute("SELECT count(*) FROM fssa_users").fetchone()
        return 0 if row is None else row[0]

    def close(self) -> None:
        self._idle.close()


_SCHEMA = (
    "CREATE TABLE fssa_about (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE fssa_encoders (id INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
    "fingerprint TEXT NOT NULL UNIQUE)",
    # Names in the order of their characters, whatever the database's language. An id is never given twice, so that
    # (id, version) names one state of one user for ever.
    "CREATE TABLE fssa_users (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
    'name TEXT COLLATE "C" NOT NULL UNIQUE, '
    "version BIGINT NOT NULL, strength DOUBLE PRECISION NOT NULL, latent BYTEA NOT NULL, choices BIGINT[], "
    "encoder INTEGER NOT NULL REFERENCES fssa_encoders)",
    "CREATE TABLE fssa_options (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key BYTEA NOT NULL UNIQUE, "
    "uses BIGINT NOT NULL, embedding BYTEA NOT NULL, text TEXT, prompt TEXT NOT NULL)",
)


def _encoder(db: Postgres, fingerprint: str) -> int:
    """The number of an encoder, given now if it has none."""
    find = "SELECT id FROM fssa_encoders WHERE fingerprint = %s"
    row = db.execute(find, (fingerprint,)).fetchone()
    if row is None:
        db.execute("INSERT INTO fssa_encoders (fingerprint) VALUES (%s) ON CONFLICT DO NOTHING", (fingerprint,))
        row = db.execute(find, (fingerprint,)).fetchone()
        assert row is not None
    return row[0]


def _refer(db: Postgres, changes: Sequence[Change]) -> dict[bytes, int]:
    """The numbers of all options of these changes by their keys, with as many more uses of each."""
    listed = [option for change in changes for pair in change.choices or () for option in pair]
    options = {option.key(): option for option in listed}
    uses = Counter(option.key() for option in listed)
    numbers = {}
    for key in sorted(options):  # in one order: see put
        option = options[key]
        row = db.execute(
            "INSERT INTO fssa_options AS o (key, uses, embedding, text, prompt) VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (key) DO UPDATE SET uses = o.uses + excluded.uses RETURNING id",
            (key, uses[key], tensor_bytes(option.embedding.float()), option.text, option.prompt),
        ).fetchone()
        assert row is not None
        numbers[key] = row[0]
    return numbers


def _let_go(db: Postgres, numbers: Sequence[int]) -> None:
    """Ends these uses of options, and those options that nobody uses now."""
    uses = Counter(numbers)
    if not uses:
        return
    listed = sorted(uses)
    db.execute(
        "UPDATE fssa_options o SET uses = o.uses - gone.n FROM unnest(%s::bigint[], %s::bigint[]) AS gone(id, n) "
        "WHERE o.id = gone.id",
        (listed, [uses[number] for number in listed]),
    )
    db.execute("DELETE FROM fssa_options WHERE id = ANY(%s) AND uses <= 0", (listed,))


def _options(db: Postgres, ids: Sequence[int]) -> Choices:
    rows = db.execute(
        "SELECT id, embedding, text, prompt FROM fssa_options WHERE id = ANY(%s)", (list(dict.fromkeys(ids)),)
    )
    found = {
        number: Option(torch.from_numpy(np.frombuffer(embedding, np.float32).copy()), text, prompt)
        for number, embedding, text, prompt in rows
    }
    missing = [number for number in ids if number not in found]
    if missing:
        raise ValueError(f"it refers to option {missing[0]}, which is not there")
    return [(found[a], found[b]) for a, b in zip(ids[::2], ids[1::2], strict=True)]
