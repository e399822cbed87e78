"""Users at rest in PostgreSQL: a server that goes away, replicas that change the same users, what is refused."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from databases import Postgres
from tiny import make_choices, make_policy

from fssa_fast.users import StoreConflict, StoreError, open_store
from fssa_fast.users.postgres_store import PostgresStore
from fssa_fast.users.store import Change, Option, StoredUser


@pytest.fixture
def database(postgres: Any) -> Postgres:
    return postgres.database()


def stored(name: str, version: int = 1) -> StoredUser:
    return StoredUser(name, version, 1.0, torch.ones(16).bfloat16(), "e")


def option(seed: int) -> Option:
    return Option(torch.randn(8, generator=torch.Generator().manual_seed(seed)))


def test_a_server_that_dies_loses_nothing_and_the_next_call_connects(postgres, database):
    """Killed while a thread writes: its call raises, and all that it was told is made is there."""
    store, told, failed = database.open(), 0, threading.Event()

    def write() -> None:
        nonlocal told
        try:
            for version in range(1, 10**6):
                store.put([Change(stored("a", version), [(option(version), option(-version))])])
                told = version
        except StoreError as error:
            assert "the next call connects anew" in str(error)
            failed.set()

    thread = threading.Thread(target=write)
    thread.start()
    while told < 50:
        pass
    postgres.kill()
    thread.join()
    with pytest.raises(StoreError, match="the next call connects anew"):
        store.get("a")
    postgres.start()
    found = store.get("a")
    assert failed.is_set() and told <= found.version <= told + 1
    assert len(store.choices("a")) == found.version
    assert store.put([Change(stored("a", found.version + 1))])


def test_idle_connections_that_the_server_has_ended(database):
    store = database.open()
    store.put([Change(stored("a"))])
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = 'tests'"
    database.sql(query)
    with pytest.raises(StoreError, match="the next call connects anew"):
        store.get("a")
    assert store.get("a").version == 1


def test_replicas_see_each_others_changes_at_the_next_request(database):
    one, two = make_policy(), make_policy()
    mine, theirs = one.use_store(database.where), two.use_store(database.where)
    for turn in range(3):
        name = f"u{turn}"
        mine.add(name, make_choices(turn))
        assert torch.equal(two.bank.rows[theirs.slot(name)], one.bank.rows[mine.slot(name)])
        theirs.add_choices(name, make_choices(9))
        assert mine[name].version == 2
        assert torch.equal(two.bank.rows[theirs.slot(name)], one.bank.rows[mine.slot(name)])
        theirs.remove(name)
        assert name not in mine
    assert database.sql("SELECT count(*) FROM {options}") == [(0,)]


def test_replicas_that_change_the_same_users_and_options_at_once(database):
    """Every change is made once or refused; the options' uses are counted right whatever the order."""
    stores = [database.open() for _ in range(3)]
    names, options, failures = ["a", "b", "c"], [option(seed) for seed in range(6)], []
    stores[0].put([Change(stored(name), [], True) for name in names])
    made = [0] * len(stores)

    def work(number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        store = stores[number]
        try:
            for _ in range(60):
                order = torch.randperm(3, generator=draw).tolist()[:2]
                sides = [options[i] for i in torch.randperm(6, generator=draw).tolist()[:4]]
                versions = [store.get(names[i]).version for i in order]
                replaces = bool(torch.rand(1, generator=draw) < 0.5)
                changes = [
                    Change(stored(names[i], version + 1), [(sides[0], sides[1]), (sides[2], sides[3])], replaces)
                    for i, version in zip(order, versions, strict=True)
                ]
                try:
                    store.put(changes)
                    made[number] += 2
                except StoreConflict:
                    pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(made)
    assert sum(stores[0].get(name).version - 1 for name in names) == sum(made)
    wanted = database.sql(
        "SELECT id, count(*) FROM (SELECT unnest(choices) AS id FROM {users}) AS used GROUP BY id ORDER BY id"
    )
    assert database.sql("SELECT id, uses FROM {options} ORDER BY id") == wanted
    for name in names:
        assert stores[0].remove(name)
    assert database.sql("SELECT count(*) FROM {options}") == [(0,)]


def test_many_make_the_tables_at_once(database):
    failures, stores = [], []

    def make() -> None:
        try:
            stores.append(database.open())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(stores) == 6


def test_what_is_refused(database, postgres, monkeypatch):
    store = database.open()
    store.close()
    with pytest.raises(StoreError, match="has been closed"):
        store.get("a")
    database.sql("UPDATE {about} SET value = '2' WHERE key = 'version'")
    with pytest.raises(StoreError, match="expected format version 1, got 2"):
        database.open()
    with pytest.raises(StoreError) as error:
        PostgresStore(f"postgresql://nobody:secret@/nothing?host={postgres.folder}")
    assert "secret" not in f"{error.value}"
    with pytest.raises(StoreError, match="expected a connection string"):
        PostgresStore("postgresql://[")
    monkeypatch.setitem(sys.modules, "fssa_fast.users.postgres_store", None)
    with pytest.raises(ImportError, match=r"from fssa-fast\[postgres\]"):
        open_store("postgresql://somewhere/users")
