"""Users at rest: whole changes only, exact additions, eviction that nobody notices, and databases gone bad."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from databases import Postgres, Sqlite
from tiny import EOS, LATENT, WIDTH, make_choices, make_ids, make_model, make_policy

from fssa_fast import BASE, PRIOR, BankFull, Choice, SteerablePolicy, UnknownUser
from fssa_fast.nn import ContextEncoder
from fssa_fast.users import StoreConflict, StoredUsers, StoreError
from fssa_fast.users.growing import GrowingContext
from fssa_fast.users.store import Change, Option, StoredUser


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Sqlite | Postgres:
    if request.param == "sqlite":
        return Sqlite(tmp_path)
    return request.getfixturevalue("postgres").database()


def option(seed: int, text: str | None = None) -> Option:
    return Option(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), text)


def stored(name: str, version: int = 1, strength: float = 1.0) -> StoredUser:
    draw = torch.Generator().manual_seed(version)
    return StoredUser(name, version, strength, torch.randn(LATENT, generator=draw).bfloat16())


def at_rest(database: Sqlite | Postgres, capacity: int = 4, **options: object) -> tuple[SteerablePolicy, StoredUsers]:
    policy = make_policy(capacity=capacity)
    return policy, policy.use_store(database.where, **options)


def row(policy: SteerablePolicy, name: str) -> torch.Tensor:
    return policy.bank.rows[policy.users.slot(name)].clone()


# ---------------------------------------------------------------- the database


def test_what_is_put_is_there(database):
    store = database.open()
    pair, other = (option(1, "yes"), option(2)), (option(3), option(1, "yes"))
    (stamp,) = store.put([Change(stored("a", 1, 0.5), [pair], True)])
    assert store.stamp("a") == stamp and len(store) == 1
    store.put([Change(stored("a", 2), [other])])
    store.close()
    store = database.open()
    found = store.get("a")
    assert (found.name, found.version, found.strength, found.choices) == ("a", 2, 1.0, 2)
    assert torch.equal(found.latent, stored("a", 2).latent) and found.stamp != stamp
    (first, second), (third, fourth) = store.choices("a")
    assert (first.text, second.text, fourth.text) == ("yes", None, "yes")
    assert torch.equal(first.embedding, option(1).embedding) and torch.equal(third.embedding, option(3).embedding)
    assert store.get("b") is store.stamp("b") is store.choices("b") is None
    assert store.remove("a") and not store.remove("a") and len(store) == 0
    assert store.put([Change(stored("a"))])[0] != stamp  # the name again, but never the stamp


def test_options_are_kept_once_and_go_with_their_last_user(database):
    store = database.open()

    def options() -> int:
        return database.sql("SELECT count(*) FROM {options}")[0][0]

    store.put([Change(stored(name), [(option(1), option(2)), (option(3), option(1))], True) for name in "ab"])
    assert options() == 3
    store.put([Change(stored("a", 2), [(option(1), option(4))], True)])
    assert options() == 4
    store.remove("b")
    assert options() == 2
    store.put([Change(stored("a", 3))])
    assert options() == 2 and len(store.choices("a")) == 1
    store.remove("a")
    assert options() == 0


def test_changes_are_whole_or_not_at_all(database):
    store = database.open()
    store.put([Change(stored("a"), [(option(1), option(2))], True)])

    def content() -> list[list[tuple]]:
        return [database.sql("SELECT * FROM {" + table + "} ORDER BY 1") for table in ("users", "options", "encoders")]

    before = content()
    for change in (Change(stored("a")), Change(stored("a", 3)), Change(stored("c", 2))):
        with pytest.raises(StoreConflict, match="expected version"):
            store.put([Change(stored("b"), [(option(5), option(6))], True), change])
    assert content() == before


def test_names_page_by_page(database):
    store = database.open()
    names = sorted(f"user{i}" for i in range(2345))
    store.put([Change(stored(name)) for name in names])
    assert list(store.names()) == names and len(store) == 2345


def test_a_killed_process_loses_nothing_that_was_committed(database):
    database.open().close()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            store = database.open()
            for version in range(1, 100000):
                store.put([Change(stored("a", version), [(option(version), option(-version))])])
                os.write(write, b".")
        finally:
            os._exit(0)
    os.close(write)
    done = 0
    while done < 20:
        done += len(os.read(read, 100))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 65536):
        done += len(more)
    os.close(read)
    store = database.open()
    found = store.get("a")
    assert done <= found.version <= done + 1 and len(store.choices("a")) == found.version


# ---------------------------------------------------------------- one choice more


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("inner", ["linear", "mlp"])
@pytest.mark.parametrize("pooling", ["self-attention", "mean", "sum"])
def test_growing_is_encoding_all(pooling, inner, sampled):
    torch.manual_seed(0)
    encoder = ContextEncoder(WIDTH, LATENT, inner=inner, pooling=pooling, heads=2, sampled=sampled).eval()
    pairs = 3 * torch.randn(60, 2, WIDTH)
    growing = GrowingContext(encoder)
    for count in range(61):
        if count in (0, 1, 2, 17, 33, 60):
            with torch.no_grad():
                whole = encoder.double().latents(
                    pairs[:count].double(), torch.zeros(count, dtype=torch.long), torch.tensor([0, count])
                )[0]
                encoder.float()
            torch.testing.assert_close(growing.latent().double(), whole, rtol=1e-4, atol=1e-5)
        if count < 60:
            growing.append(pairs[count : count + 1])
    at_once = GrowingContext(encoder)
    at_once.append(pairs)
    torch.testing.assert_close(at_once.latent(), growing.latent(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- users over a store


def test_users_outlive_the_process(database):
    policy, users = at_rest(database)
    users.add_many({"a": make_choices(1), "b": []})
    users.add_choices("a", make_choices(2))
    users.scale("b", 0.5)
    rows = {name: row(policy, name) for name in users}
    again, found = at_rest(database)
    assert list(found) == ["a", "b"] and len(found) == 2 and "a" in found and "c" not in found
    assert found["a"].version == 2 and found["b"].strength == 0.5
    for name, want in rows.items():
        assert torch.equal(row(again, name), want)
    assert len(found.choices("a")) == 6
    found.remove("a")
    with pytest.raises(UnknownUser):
        users["a"]  # the other process sees it too
    plain = make_policy()
    plain.users.add("b", [])
    torch.testing.assert_close(0.5 * row(plain, "b"), row(again, "b"), rtol=2e-2, atol=2e-2)


def test_additions_are_exact(database):
    policy, users = at_rest(database)
    choices = make_choices(1, 12)
    users.add("whole", choices)
    users.add("grown", choices[:3])
    for start in range(3, 12, 3):
        users.add_choices("grown", choices[start : start + 3])
    torch.testing.assert_close(row(policy, "grown"), row(policy, "whole"), rtol=2e-2, atol=2e-2)
    assert users["grown"].version == 4
    users.update("grown", choices[:1])
    users.add_choices("grown", choices[1:])
    torch.testing.assert_close(row(policy, "grown"), row(policy, "whole"), rtol=2e-2, atol=2e-2)


def test_the_bank_is_a_cache(database):
    policy, users = at_rest(database, capacity=3)
    users.import_many({f"u{i}": make_choices(i) for i in range(10)})
    rows = {name: row(policy, name) for name in users}
    assert len({tuple(values.tolist()) for values in rows.values()}) == 10
    for name in [*rows, *reversed(rows)]:
        assert torch.equal(row(policy, name), rows[name])
    with users.slots(["u0", "u1", "u0"]) as slots:
        for name in rows:
            assert torch.equal(row(policy, name), rows[name])
        assert torch.equal(policy.bank.rows[slots.long()], torch.stack([rows["u0"], rows["u1"], rows["u0"]]))
        with pytest.raises(BankFull), users.slots(["u2", "u3"]):
            pass
    with pytest.raises(BankFull):
        users.add_many({f"v{i}": [] for i in range(4)})
    assert len(users) == 10 and not policy.bank._pins
    with users.slots(["u7", "u8", "u9"]) as slots:
        assert len(set(slots.tolist())) == 3


def test_bad_changes_leave_store_and_bank_alone(database):
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    before, free = row(policy, "a"), len(policy.bank._free)
    for change in (
        lambda: users.add("a", []),
        lambda: users.add("__base__", []),
        lambda: users.scale("a", float("nan")),
        lambda: users.interpolate("a", {"a": 1.0}),
        lambda: users.interpolate("c", {}),
        lambda: users.interpolate("c", {"a": 1.0, PRIOR: -1.0}),
        lambda: users.interpolate("c", {"a": float("inf")}),
        lambda: users.interpolate("c", {"a": 3e38, PRIOR: 3e38}),
        lambda: users.add_choices("a", [Choice(torch.full((WIDTH,), 3e38), torch.zeros(WIDTH))]),
        lambda: users.scale("a", 3e38),
        lambda: users.scale("a", 1e300),
        lambda: policy.use_store(database.where),
    ):
        with pytest.raises(ValueError):
            change()
    for change in (lambda: users.remove("b"), lambda: users.update("b", []), lambda: users.choices("b")):
        with pytest.raises(UnknownUser):
            change()
    assert users["a"].version == 1 and torch.equal(row(policy, "a"), before) and len(policy.bank._free) == free


def test_blends_are_kept(database):
    """As rows that a fetch gives again, and for others in the bank, within the rounding of a latent in bfloat16."""
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    users.scale("a", 0.5)
    users.add("b", make_choices(2))
    blends = {"mix": {"a": 0.6, "b": 0.7}, "less": {"a": 1.0, PRIOR: -1.0, BASE: 9.0}, "base": {BASE: 1.0}}
    for name, weights in blends.items():
        blend = users.blend(weights)
        users.interpolate(name, weights)
        torch.testing.assert_close(row(policy, name), blend, rtol=1e-2, atol=1e-2 * float(blend.abs().max()))
    assert not row(policy, "base").any()
    rows = {name: row(policy, name) for name in ("mix", "less")}
    again, found = at_rest(database)
    assert sorted(found) == ["a", "b", "base", "less", "mix"]
    assert all(torch.equal(row(again, name), kept) for name, kept in rows.items())
    found.interpolate("mixed", {"mix": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="choices were kept"):
        found.add_choices("mix", make_choices(3))
    with pytest.raises(UnknownUser):
        found.interpolate("c", {"nobody": 1.0})


def test_latents_alone(database):
    policy, users = at_rest(database, keep_choices=False)
    users.add("a", make_choices(1))
    with pytest.raises(ValueError, match="choices were kept"):
        users.add_choices("a", make_choices(2))
    with pytest.raises(ValueError, match="choices were kept"):
        users.choices("a")
    assert users.update("a", make_choices(2)).version == 2 and users.scale("a", 2.0).version == 3


def test_another_encoder_is_refused_until_refreshed(database):
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    old = row(policy, "a")
    other = make_policy(seed=9)
    with pytest.raises(StoreError, match="encode all users again"):
        other.use_store(database.where)
    found = other.use_store(database.where, refresh=True)
    assert found["a"].version == 2 and not torch.equal(row(other, "a"), old)
    fresh = make_policy(seed=9)
    fresh.users.add("a", make_choices(1))
    torch.testing.assert_close(row(other, "a"), row(fresh, "a"), rtol=2e-2, atol=2e-2)


def test_two_processes_do_not_overwrite_each_other(database):
    _, one = at_rest(database)
    _, two = at_rest(database)
    one.add("a", [])
    two.add_choices("a", make_choices(1))
    assert one["a"].version == 2
    one.add_choices("a", make_choices(2))
    assert two["a"].version == 3 and len(two.choices("a")) == 6


def test_many_threads(database):
    policy, users = at_rest(database, capacity=4)
    users.import_many({f"u{i}": make_choices(i) for i in range(8)})
    rows, failures = {name: row(policy, name) for name in users}, []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(40):
                name = draw.choice(list(rows))
                with users.slots([name]) as slots:
                    assert torch.equal(policy.bank.rows[int(slots[0])], rows[name])
                if draw.random() < 0.2:
                    users.add(f"own{seed}-{draw.random()}", make_choices(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not policy.bank._pins


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_over_a_small_bank(tmp_path, seed):
    """Users come and go through six slots while others decode; every request gets what it would get alone."""
    draw = random.Random(seed)

    def make(path: Path, capacity: int) -> SteerablePolicy:
        model = make_model(max_position_embeddings=256)
        model.generation_config.eos_token_id = EOS
        policy = make_policy(model, capacity=capacity)
        policy.use_store(path).import_many({f"u{i}": make_choices(i) for i in range(12)})
        return policy

    policy, frozen = make(tmp_path / "users.db", 6), make(tmp_path / "frozen.db", 64)
    engine = policy.engine(max_rows=3, max_tokens=256, step_tokens=16, background=False)
    alone = frozen.engine(max_rows=1, max_tokens=256, background=False)
    now, grown, requests = {f"u{i}": f"u{i}" for i in range(12)}, 0, []
    for _ in range(40):
        act, name = draw.random(), draw.choice(list(now))
        if act < 0.4:
            tokens = make_ids(1, draw.randint(1, 40), draw.randrange(5))[0].tolist()
            blend = draw.random() < 0.3
            other = draw.choice(list(now))
            request = {"prompt": tokens, "max_new_tokens": draw.randint(1, 12)}
            users = {name: 0.5, other: 0.5} if blend and other != name else name
            then = {now[one]: 0.5 for one in users} if isinstance(users, dict) else now[users]
            try:
                requests.append((engine.submit(user=users, **request), {**request, "user": then}))
            except BankFull:
                engine.step()
        elif act < 0.6:
            grown += 1
            try:
                policy.users.add_choices(name, make_choices(100 + grown))
            except BankFull:
                continue
            own, kept = frozen.users.choices(now[name]), f"kept{grown}"
            frozen.users.add(kept, [Choice(a.embedding, b.embedding) for a, b in own])
            frozen.users.add_choices(kept, make_choices(100 + grown))
            latent = policy.users._stored(name).latent  # the same history, and perhaps another rounding
            frozen.users._at_rest._db.execute(
                "UPDATE users SET latent = ? WHERE name = ?", (latent.view(torch.int16).numpy().tobytes(), kept)
            )
            frozen.users._forget(kept)
            now[name] = kept
        else:
            engine.step()
    while engine.step():
        pass
    assert len(requests) > 5
    for handle, request in requests:
        assert handle.result(0).tokens == alone.run([request])[0].tokens
    assert not policy.bank._pins


# ---------------------------------------------------------------- a refresh that is broken off


def broken_refresh(database: Sqlite | Postgres, kill_at: int, count: int = 300) -> None:
    """`count` users whose refresh towards the encoder of seed 9 was killed at its `kill_at`-th transaction."""
    policy, users = at_rest(database)
    users.import_many({f"u{i:03}": make_choices(i, 2) for i in range(count)})
    users.interpolate("mix", {"u000": 0.5, "u001": 0.5})
    users._at_rest.close()
    child = os.fork()
    if not child:
        try:
            store, done = database.open(), 0

            def counted(write: Callable) -> Callable:
                def call(*arguments: object) -> object:
                    nonlocal done
                    found = write(*arguments)
                    done += 1
                    if done == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return found

                return call

            store.put, store.set_about = counted(store.put), counted(store.set_about)
            make_policy(seed=9).use_store(store, refresh=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_refresh_killed_half_way_mixes_no_encoders(database, kill_at):
    """It says so from its first transaction on; the policy it was for goes on, another one is refused."""
    broken_refresh(database, kill_at)
    store = database.open()
    own, other = make_policy(capacity=4), make_policy(seed=9, capacity=4)
    made_by = {store.get(f"u{i:03}").encoder for i in range(300)}
    assert len(made_by) == kill_at and store.about()["refreshing"] != store.about()["encoder"]
    with pytest.raises(StoreError, match="not being encoded again"):
        own.use_store(store)
    users = other.use_store(store)
    assert "refreshing" not in store.about() and len({store.get(f"u{i:03}").encoder for i in range(300)}) == 1
    fresh = make_policy(seed=9)
    for name in ("u000", "u299"):
        fresh.users.add(name, make_choices(int(name[1:]), 2))
        torch.testing.assert_close(row(other, name), row(fresh, name), rtol=2e-2, atol=2e-2)
    with pytest.raises(StoreError, match="another's for 'mix', whose choices are not kept"):
        users["mix"]
    assert users.update("mix", make_choices(1)).version == 2
    own.use_store(store, refresh=True)  # and back again
    assert own.users["u299"].version > 1


def test_a_policy_at_work_is_not_given_another_encoders_latents(database):
    """While another process encodes the store again, for a policy of another encoder."""
    policy, users = at_rest(database)
    users.import_many({"a": make_choices(1), "b": make_choices(2)})
    before = {name: row(policy, name) for name in ("a", "b")}
    other = make_policy(seed=9)
    theirs = other.use_store(database.where, refresh=True)
    assert users["a"].version == 2  # as the other has written it: a latent that is not ours
    for name in ("a", "b"):
        assert torch.equal(row(policy, name), before[name])
    users.scale("a", 0.5)
    users.add_choices("b", make_choices(3))
    assert theirs["a"].strength == 0.5 and len(theirs.choices("b")) == 6
    fresh = make_policy(seed=9)
    fresh.users.add("b", make_choices(2) + make_choices(3))
    torch.testing.assert_close(row(other, "b"), row(fresh, "b"), rtol=2e-2, atol=2e-2)


def test_an_encoder_that_changed_without_a_refresh_is_noticed(database):
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    before = row(policy, "a")
    with torch.no_grad():
        policy.encoder.outer1.weight.mul_(2.0)
    for call in (lambda: users["a"], lambda: users.add("b", []), lambda: users.add_choices("a", make_choices(2))):
        with pytest.raises(StoreError, match=r"refresh\(\) encodes all users again"):
            call()
    users.refresh()
    assert users["a"].version == 2 and not torch.equal(row(policy, "a"), before)


def test_strengthen_over_a_store_encodes_nobody_again(database):
    policy, users = at_rest(database)
    users.add("a", make_choices(1))
    before = row(policy, "a")
    policy.strengthen(0.5)
    width = policy.layout.modulated
    assert users["a"].version == 1
    torch.testing.assert_close(row(policy, "a")[:width], 0.5 * before[:width])


# ---------------------------------------------------------------- nobody waits for another


def test_readers_do_not_wait_for_another_process_that_writes(database):
    """Nor for a change of this process that waits for it."""
    policy, users = at_rest(database)
    users.import_many({"a": make_choices(1), "b": make_choices(2)})
    with database.locked():
        change = threading.Thread(target=users.add_choices, args=("a", make_choices(3)))
        change.start()
        begin = time.monotonic()
        while not policy.bank.capacity - len(policy.bank._free):  # until the change has its slot, and waits
            assert time.monotonic() - begin < 10
        with users.slots(["b", "a"]):
            assert users["b"].version == 1 and len(users.choices("a")) == 3 and len(list(users)) == 2
        users.blend({"b": 0.5, "a": 0.5})
        assert change.is_alive() and users["a"].version == 1 and time.monotonic() - begin < 10
    change.join()
    assert users["a"].version == 2
