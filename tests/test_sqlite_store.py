"""Users at rest in SQLite: what is removed is gone from the files, older formats, damage, full disks."""

from __future__ import annotations

import os
import random
import sqlite3
import struct
import threading
from pathlib import Path

import pytest
import torch
from databases import Sqlite
from tiny import LATENT, WIDTH, make_choices, make_policy

from fssa_fast import Choice, SteerablePolicy
from fssa_fast.users import SqliteStore, StoredUsers, StoreError
from fssa_fast.users.store import Change, Option, StoredUser, tensor_bytes
from fssa_fast.users.stored_users import encoder_fingerprint


def option(seed: int, text: str | None = None) -> Option:
    return Option(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), text)


def stored(name: str, version: int = 1, strength: float = 1.0) -> StoredUser:
    draw = torch.Generator().manual_seed(version)
    return StoredUser(name, version, strength, torch.randn(LATENT, generator=draw).bfloat16())


def at_rest(database: Sqlite, capacity: int = 4, **options: object) -> tuple[SteerablePolicy, StoredUsers]:
    policy = make_policy(capacity=capacity)
    return policy, policy.use_store(database.where, **options)


def row(policy: SteerablePolicy, name: str) -> torch.Tensor:
    return policy.bank.rows[policy.users.slot(name)].clone()


@pytest.fixture
def database(tmp_path: Path) -> Sqlite:
    return Sqlite(tmp_path)


def test_a_user_of_ten_choices_fits_in_a_kilobyte_at_rest(tmp_path):
    """H = 256, ten choices between options that are shared; the options' embeddings are not a user's."""
    store = SqliteStore(tmp_path / "users.db")
    options, draw = [option(seed) for seed in range(100)], random.Random(0)
    changes = [
        Change(
            StoredUser(f"user-{draw.getrandbits(48)}", 1, 1.0, torch.randn(256).bfloat16()),
            [tuple(draw.sample(options, 2)) for _ in range(10)],
            True,
        )
        for _ in range(2000)
    ]
    store.put(changes)
    store.close()
    assert (tmp_path / "users.db").stat().st_size < 1000 * 2000


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_files_that_are_no_store(tmp_path, content):
    path = tmp_path / "users.db"
    if content is None:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE notes (text)")
    else:
        path.write_bytes(content)
    with pytest.raises(StoreError, match="users.db: (file is not a database|expected a user store)"):
        SqliteStore(path)


def test_a_newer_version_and_a_missing_folder(tmp_path):
    SqliteStore(tmp_path / "users.db").close()
    with sqlite3.connect(tmp_path / "users.db") as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(StoreError, match="expected format version 2 or older, got 3"):
        SqliteStore(tmp_path / "users.db")
    with pytest.raises(StoreError, match="unable to open"):
        SqliteStore(tmp_path / "nowhere" / "users.db")


def test_damage_is_named_and_a_closed_store_too(tmp_path):
    store = SqliteStore(tmp_path / "users.db")
    store.put([Change(stored("a"), [(option(1), option(2))], True)])
    store._db.execute("DELETE FROM options")
    with pytest.raises(StoreError, match="refers to option"):
        store.choices("a")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get("a")


def test_a_full_disk_changes_nothing(database):
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    before, version = row(policy, "a"), users["a"].version
    db = users._at_rest._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        for seed in range(200):
            users.add(f"more{seed}", make_choices(seed, 20))
    with pytest.raises(StoreError, match="full"):
        users.add_choices("a", make_choices(3, 200))
    assert users["a"].version == version and torch.equal(row(policy, "a"), before)
    db.execute("PRAGMA max_page_count = 1000000")
    assert users.add_choices("a", make_choices(3)).version == version + 1

# ---------------------------------------------------------------- what is removed is gone


def traces(database: Sqlite, user: str, choices: list[tuple[Option, Option]]) -> list[str]:
    """What the files have of a user's name, and of the options' texts and embeddings."""
    found = database.bytes()
    wanted = {user: user.encode()}
    for one in (option for pair in choices for option in pair):
        wanted[f"text {one.text}"] = str(one.text).encode()
        wanted[f"embedding of {one.text}"] = tensor_bytes(one.embedding)
    return [what for what, needle in wanted.items() if needle in found]


def own(seed: int, count: int = 3) -> list[tuple[Option, Option]]:
    texts = [f"what {seed} said, the {k}th" for k in range(2 * count)]
    options = [option(1000 * seed + k, text) for k, text in enumerate(texts)]
    return list(zip(options[::2], options[1::2], strict=True))


def test_what_is_removed_is_gone_from_the_files(database):
    store = database.open()
    for seed in range(5):
        store.put([Change(stored(f"user number {seed}"), own(seed), True)])
    assert len(traces(database, "user number 3", own(3))) == 13
    store.remove("user number 3")
    assert traces(database, "user number 3", own(3)) == []
    assert len(traces(database, "user number 2", own(2))) == 13


def test_choices_that_are_replaced_are_gone_from_the_files(database):
    store = database.open()
    shared, mine = own(1), own(2)
    store.put([Change(stored("a"), shared, True), Change(stored("b"), shared + mine, True)])
    store.put([Change(stored("b", 2), own(3), True)])
    assert len(traces(database, "b", mine)) == 1  # the name
    assert len(traces(database, "a", shared)) == 13  # a has them still
    store.put([Change(stored("a", 2), own(3), True)])
    assert len(traces(database, "a", shared)) == 1 and len(traces(database, "a", own(3))) == 13


def test_a_reader_that_keeps_the_log_is_named_and_the_removal_stands(database, monkeypatch):
    monkeypatch.setattr(SqliteStore, "ERASE", 0.2)
    policy, users = at_rest(database)
    store = users._at_rest
    users.add("user a", [Choice(pair[0].embedding, pair[1].embedding) for pair in own(1)])
    users.add_many({"user b": [], "user c": []})
    slot = users.slot("user a")
    with sqlite3.connect(database.where, isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM users").fetchone()
        with pytest.raises(StoreError, match="user 'user a' is removed, but a reader .* older copies"):
            users.remove("user a")
        assert "user a" not in users and not policy.bank.rows[slot].any()
        with pytest.raises(StoreError, match="the users are changed, but a reader"):
            users.update("user b", make_choices(1))
        assert users["user b"].version == 2 and len(store.choices("user b")) == 3
        reader.execute("COMMIT")
    reader.close()
    users.scale("user c", 0.5)  # the next change erases
    assert b"user a" not in database.bytes()


def test_a_reader_that_ends_in_time_is_waited_for(database):
    store = database.open()
    store.put([Change(stored("user a"), own(1), True)])
    reader = sqlite3.connect(database.where, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM users").fetchone()
    threading.Timer(0.2, reader.close).start()
    store.remove("user a")
    assert traces(database, "user a", own(1)) == []


def test_compact_leaves_nothing_between_records(database):
    """SQLite leaves copies where it moves records from page to page: here names, in their index."""
    store, draw = database.open(), random.Random(0)
    names = [f"{draw.getrandbits(160):040x}" for _ in range(1500)]
    for start in range(0, 1500, 100):
        store.put([Change(stored(name), (), True) for name in names[start : start + 100]])
    gone = names[::3]
    with store._transaction() as db:
        db.executemany("DELETE FROM users WHERE name = ?", [(name,) for name in gone])
    store.compact()
    found = database.bytes()
    assert not any(name.encode() in found for name in gone) and len(store) == 1000


def test_the_files_are_the_owners_alone(database):
    before = os.umask(0)
    try:
        store = database.open()
        store.put([Change(stored("a"))])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in database.where.parent.iterdir()}
    assert modes == dict.fromkeys(("users.db", "users.db-wal", "users.db-shm"), 0o600)


# ---------------------------------------------------------------- older formats

VERSION_1 = (  # as version 1 made it
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, "
    "strength REAL NOT NULL, latent BLOB NOT NULL, choices BLOB)",
    "CREATE TABLE options (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, uses INTEGER NOT NULL, "
    "embedding BLOB NOT NULL, text TEXT, prompt TEXT NOT NULL)",
    f"PRAGMA application_id = {0x66737361}",
    "PRAGMA user_version = 1",
    "PRAGMA journal_mode = WAL",
)


def test_a_store_of_version_1_is_taken_over(database):
    policy = make_policy()
    latent = torch.randn(LATENT).bfloat16()
    with sqlite3.connect(database.where) as db:
        for statement in VERSION_1:
            db.execute(statement)
        db.execute("INSERT INTO about VALUES ('encoder', ?)", (encoder_fingerprint(policy.encoder),))
        for number in (1, 2):
            one = option(number, f"text {number}")
            values = (number, one.key(), 1, tensor_bytes(one.embedding), one.text, "")
            db.execute("INSERT INTO options VALUES (?, ?, ?, ?, ?, ?)", values)
        values = (7, "a", 3, 0.5, tensor_bytes(latent.view(torch.int16)), struct.pack("<2I", 1, 2))
        db.execute("INSERT INTO users VALUES (?, ?, ?, ?, ?, ?)", values)
    db.close()
    users = policy.use_store(database.where)
    user = users["a"]
    assert (user.version, user.strength) == (3, 0.5) and torch.equal(user.latent, latent.float())
    assert [one.text for one in users.choices("a")[0]] == ["text 1", "text 2"]
    assert users.add("b", make_choices(1)).version == 1 and users.scale("a", 1.0).version == 4
    assert database.sql("PRAGMA user_version") == [(2,)]
    other = make_policy(seed=9)
    with pytest.raises(StoreError, match="encode all users again"):
        other.use_store(database.where)
    assert other.use_store(database.where, refresh=True)["a"].version == 5


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE users SET latent = x'00'",
        "UPDATE users SET latent = 'text'",
        "UPDATE users SET strength = 'strong'",
        "UPDATE users SET choices = x'0100000002'",
        "UPDATE users SET choices = x'01000000'",
        "UPDATE users SET choices = 'text text'",
        "UPDATE options SET embedding = x'00'",
        "UPDATE options SET embedding = 5",
        "UPDATE options SET text = x'ff'",
        "UPDATE options SET text = CAST(x'ff' AS TEXT)",
        "UPDATE users SET version = 9223372036854775807",
        "DROP TABLE options",
    ],
)
def test_a_damaged_store_is_named(database, damage):
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    database.sql(damage)
    with pytest.raises(StoreError, match="users.db: "):
        users["a"]
        users.choices("a")
        users.scale("a", 0.5)
    assert not policy.bank._pins


def test_names_and_texts_that_no_database_holds_are_named(database):
    policy, users = at_rest(database)
    users.add("a", [])
    lone = "\ud800"
    assert lone not in users and database.open().get(lone) is None
    for call in (lambda: users[lone], lambda: users.remove(lone), lambda: users.choices(lone)):
        with pytest.raises(KeyError, match="one that the store has"):
            call()
    for name in (lone, "a\0b", 513 * "n"):
        with pytest.raises(ValueError, match="^name: expected"):
            users.add(name, [])
    with pytest.raises(ValueError, match="^strength: expected a finite number, got an integer of 16610 bits"):
        users.scale("a", 10**5000)
    assert list(users) == ["a"]
