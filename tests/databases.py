"""Databases that the tests of stores run on, each made anew for a test."""

from __future__ import annotations

import glob
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from fssa_fast.users import SqliteStore, UserStore
from fssa_fast.users.postgres_store import PostgresStore


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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else can write in the block, as if another process did."""
        db = sqlite3.connect(self.where, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.close()

    def bytes(self) -> bytes:
        """All that is in its files."""
        names = [str(self.where) + end for end in ("", "-wal", "-shm")]
        return b"".join(Path(name).read_bytes() for name in names if os.path.exists(name))


class Server:
    """A PostgreSQL server of our own on a Unix socket, of Debian's package `postgresql`; it never runs as root."""

    def __init__(self) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
        self.programs = found[-1] if found else os.path.dirname(shutil.which("initdb") or "")
        if not self.programs:
            raise FileNotFoundError("no PostgreSQL server is installed: apt-get install postgresql")
        self.folder = tempfile.mkdtemp(prefix="pg-")
        self.rights: dict[str, Any] = {"cwd": self.folder}
        if os.getuid() == 0:  # it does not run as root
            shutil.chown(self.folder, "postgres", "postgres")
            self.rights |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        self._run("initdb", "-D", "data", "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale", "C", "-N")
        self._numbers = itertools.count()
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [os.path.join(self.programs, program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self.rights)

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        options = ["-k", self.folder, "-c", "listen_addresses=", "-c", "fsync=off"]  # a killed process loses nothing
        command = [os.path.join(self.programs, "postgres"), "-D", "data", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **self.rights
        )
        end = time.monotonic() + 60
        while True:
            try:
                return self._run("pg_isready", "-h", self.folder)
            except subprocess.CalledProcessError:
                assert self.process.poll() is None and time.monotonic() < end, "PostgreSQL does not start"
                time.sleep(0.05)

    def kill(self) -> None:
        """Kills it; the processes that it has started end when they notice."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ends it, and takes its files away."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self) -> Postgres:
        """A place for a store's tables that nobody else has."""
        schema = f"store{next(self._numbers)}"
        with psycopg.connect(f"postgresql://tests@/postgres?host={self.folder}", autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {schema}")
        return Postgres(f"postgresql://tests@/postgres?host={self.folder}&options=-csearch_path%3D{schema}")


class Postgres:
    """A place for a store in a PostgreSQL database."""

    def __init__(self, where: str) -> None:
        self.where = where

    def open(self) -> UserStore:
        """A store over it; every call another one."""
        return PostgresStore(self.where)

    def sql(self, query: str, *values: Any) -> list[tuple]:
        """As `Sqlite.sql`."""
        with psycopg.connect(self.where, autocommit=True) as db:
            found = db.execute(query.format_map(_Names("fssa_")), values)
            return found.fetchall() if found.description else []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """As `Sqlite.locked`."""
        with psycopg.connect(self.where) as db:
            db.execute("LOCK TABLE fssa_users IN EXCLUSIVE MODE")
            yield


class _Names(dict):
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __missing__(self, key: str) -> str:
        return self.prefix + key
