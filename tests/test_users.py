"""Users and the bank: what a row is, that changes are whole or not at all, and that no slot is shared or lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tiny import WIDTH, make_choices, make_ids, make_model, make_policy, make_tokenizer, shake
from transformers import LogitsProcessor, LogitsProcessorList

from fssa_fast import BASE, PRIOR, BackendError, BankFull, Choice, SteerablePolicy, UnknownUser, use_backend


def row(policy: SteerablePolicy, name: str) -> torch.Tensor:
    return policy.bank.rows[policy.users.slot(name)].clone()


def free(policy: SteerablePolicy) -> int:
    return len(policy.bank._free)


def state(policy: SteerablePolicy) -> Any:
    """All that a failed change must leave as it was."""
    users = {
        name: (u.slot, u.version, u.strength, len(u.pairs)) for name, u in ((n, policy.users[n]) for n in policy.users)
    }
    return users, sorted(policy.bank._free), policy.bank.rows.tolist()


# ---------------------------------------------------------------- rows


def test_a_row_is_the_modulation_of_the_choices_latent() -> None:
    policy = make_policy()
    user = policy.users.add("alice", make_choices(1))
    pairs = torch.stack([torch.stack([c.chosen, c.rejected]) for c in make_choices(1)])  # type: ignore[misc]
    with torch.no_grad():
        latent = policy.encoder.latents(pairs, torch.zeros(3, dtype=torch.long), torch.tensor([0, 3]))
        wanted = F.linear(latent, policy.modulator.weight, policy.modulator.bias)[0]
    assert (user.name, user.version, user.strength) == ("alice", 1, 1.0)
    torch.testing.assert_close(user.latent, latent[0], rtol=1e-5, atol=1e-6)
    found = row(policy, "alice")
    torch.testing.assert_close(found[: policy.layout.modulated], wanted, rtol=1e-5, atol=1e-5)
    assert (found[policy.layout.modulated :] == 1).all() and policy.layout.width == policy.layout.modulated + 1
    torch.testing.assert_close(policy.rows(latent).detach()[0], found, rtol=1e-5, atol=1e-5)


def test_reserved_rows() -> None:
    policy = make_policy()
    policy.users.add("nobody yet", [])
    assert not row(policy, BASE).any()
    assert torch.equal(row(policy, "nobody yet"), row(policy, PRIOR)) and row(policy, PRIOR).any()
    assert (policy.users.slot(BASE), policy.users.slot(PRIOR)) == (0, 1)


def test_many_users_are_as_one_by_one() -> None:
    together, alone = make_policy(), make_policy()
    wanted = {f"user{i}": make_choices(i, count) for i, count in enumerate((0, 1, 3, 10))}
    users = together.users.add_many(wanted)
    assert [user.name for user in users] == list(wanted) == list(together.users) and len(together.users) == 4
    for name, choices in wanted.items():
        alone.users.add(name, choices)
        torch.testing.assert_close(row(together, name), row(alone, name), rtol=1e-5, atol=1e-5)
    assert len({user.slot for user in users}) == 4
    assert together.users.add_many({}) == []


def test_choices_are_a_set_and_their_sides_matter() -> None:
    policy = make_policy()
    choices = make_choices(1, 4)
    policy.users.add_many(
        {"a": choices, "b": choices[::-1], "c": [Choice(c.rejected, c.chosen) for c in choices], "d": choices[:3]}
    )
    torch.testing.assert_close(row(policy, "a"), row(policy, "b"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(row(policy, "a"), row(policy, "c"), atol=1e-3)
    assert not torch.allclose(row(policy, "a"), row(policy, "d"), atol=1e-3)


def test_changes_of_a_user() -> None:
    policy = make_policy()
    policy.users.add_many({"a": make_choices(1, 2), "b": make_choices(1, 2) + make_choices(2, 3), "c": make_choices(3)})
    grown = policy.users.add_choices("a", make_choices(2, 3))
    assert grown.version == 2 and len(grown.pairs) == 5
    torch.testing.assert_close(row(policy, "a"), row(policy, "b"), rtol=1e-5, atol=1e-5)
    assert policy.users.update("a", make_choices(3)).version == 3
    torch.testing.assert_close(row(policy, "a"), row(policy, "c"), rtol=1e-5, atol=1e-5)
    slot = policy.users.slot("a")
    policy.users.remove("a")
    assert "a" not in policy.users and not policy.bank.rows[slot].any()
    with pytest.raises(UnknownUser, match="'a'"):
        policy.users["a"]
    assert policy.users.add("a", []).version == 1  # a new user of an old name


def test_strengthen() -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(3))
    before, width = row(policy, "a").clone(), policy.layout.modulated
    policy.strengthen(0.5)
    after = row(policy, "a")
    torch.testing.assert_close(after[:width], 0.5 * before[:width])
    assert torch.equal(after[width:], before[width:])
    policy.users.add("b", make_choices(3))
    torch.testing.assert_close(row(policy, "b"), after)


def test_scale() -> None:
    policy = make_policy()
    policy.users.add_many({"a": make_choices(1), "b": make_choices(2)})
    full, ids = row(policy, "a"), make_ids(1)
    with torch.no_grad():
        plain = policy.model(ids).logits
    for strength in (0.0, 0.25, 0.5, 2.0, -1.0, 1.0):
        user = policy.users.scale("a", strength)
        assert user.strength == strength
        torch.testing.assert_close(row(policy, "a"), full * strength, rtol=1e-6, atol=0)
        if strength == 0.0:
            with torch.no_grad(), policy.steer(["a"]):
                assert torch.equal(policy.model(ids).logits, plain)
    assert torch.equal(row(policy, "a"), full)
    steps = []
    with torch.no_grad():
        for strength in torch.linspace(0, 1, 21).tolist():
            policy.users.scale("a", strength)
            with policy.steer(["a"]):
                steps.append(policy.model(ids).logits)
    gaps = torch.tensor([(b - a).abs().max() for a, b in zip(steps, steps[1:], strict=False)])
    assert gaps.max() < 0.5 * (steps[-1] - steps[0]).abs().max()  # from the base to the user without a jump
    policy.users.scale("a", 0.5)
    policy.users.update("a", make_choices(2))  # the strength outlives the choices
    torch.testing.assert_close(row(policy, "a"), 0.5 * row(policy, "b"), rtol=1e-6, atol=1e-6)


def test_mixing_rows_is_mixing_latents() -> None:
    policy = make_policy()
    a, b = policy.users.add_many({"a": make_choices(1), "b": make_choices(2)})
    mix = policy.users.interpolate("mix", {"a": 0.3, "b": 0.7})
    assert a.latent is not None and b.latent is not None and mix.latent is None
    wanted = policy.rows((0.3 * a.latent + 0.7 * b.latent).unsqueeze(0)).detach()[0]
    torch.testing.assert_close(row(policy, "mix"), wanted, rtol=1e-5, atol=1e-5)
    policy.users.interpolate("same", {"a": 1.0})
    assert torch.equal(row(policy, "same"), row(policy, "a"))
    policy.users.interpolate("half", {"a": 0.5, BASE: 0.5})
    assert torch.equal(row(policy, "half"), 0.5 * row(policy, "a"))
    policy.users.interpolate("deep", {"mix": 0.5, PRIOR: 0.5})
    torch.testing.assert_close(policy.users.blend({"mix": 0.5, PRIOR: 0.5}), row(policy, "deep"))
    before = row(policy, "mix")
    policy.users.update("a", make_choices(5))
    policy.users.remove("b")
    assert torch.equal(row(policy, "mix"), before)  # as they were when mixed
    policy.users.update("mix", make_choices(5))  # choices of its own: no longer a blend
    assert policy.users["mix"].latent is not None and torch.equal(row(policy, "mix"), row(policy, "a"))


def test_blends_of_a_low_precision_bank_are_summed_in_high() -> None:
    policy = make_policy(make_model(dtype=torch.bfloat16))
    names = [f"user{i}" for i in range(8)]
    policy.users.add_many({name: make_choices(i) for i, name in enumerate(names)})
    wanted = sum(row(policy, name).double() for name in names) / 8
    found = policy.users.blend(dict.fromkeys(names, 1 / 8))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=2**-8, atol=1e-6)  # type: ignore[union-attr]


def test_refresh_after_the_weights_have_changed() -> None:
    policy = make_policy()
    policy.users.add_many({"a": make_choices(1), "b": make_choices(2)})
    policy.users.scale("b", 0.5)
    policy.users.interpolate("mix", {"a": 0.5, "b": 0.5})
    before = {name: row(policy, name) for name in ("a", "b", "mix", PRIOR)}
    shake(policy, seed=7)  # refreshes
    fresh = make_policy()
    shake(fresh, seed=7)
    fresh.users.add_many({"a": make_choices(1), "b": make_choices(2)})
    fresh.users.scale("b", 0.5)
    for name in ("a", "b", PRIOR):
        assert not torch.allclose(row(policy, name), before[name])
        torch.testing.assert_close(row(policy, name), row(fresh, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(row(policy, "mix"), before["mix"])
    assert not row(policy, BASE).any()


# ---------------------------------------------------------------- bad input


GOOD = torch.arange(float(WIDTH))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Choice("a", "a"), ValueError, "itself"),
        (lambda: Choice(GOOD, GOOD.clone()), ValueError, "itself"),
        (lambda: Choice("a", GOOD), TypeError, "str and a tensor of torch.float32"),
        (lambda: Choice(1, 2), TypeError, "int and int"),  # type: ignore[arg-type]
        (lambda: Choice(GOOD.long(), GOOD.long() + 1), TypeError, "torch.int64"),
        (lambda: Choice("a", "b", prompt=None), TypeError, "prompt, got NoneType"),  # type: ignore[arg-type]
    ],
)
def test_impossible_choices(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^choice: .*{message}"):
        make()


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([Choice(GOOD[:-1], GOOD[1:])], ValueError, r"choices\[0\].chosen: .*\[8\], got \[7\]"),
        ([Choice(GOOD, GOOD[None])], ValueError, r"choices\[0\].rejected: .*\[1, 8\]"),
        ([Choice(GOOD, -GOOD), Choice(GOOD, GOOD * float("nan"))], ValueError, r"choices\[1\].rejected: .*finite"),
        ([Choice(GOOD / 0.0, GOOD)], ValueError, r"choices\[0\].chosen: .*finite"),
        ([Choice(GOOD.double() * 1e300, GOOD)], ValueError, r"choices\[0\].chosen: .*finite"),
        ([Choice("a", "b")], ValueError, "choices: .*no text embedder"),
        ("ab", TypeError, "choices: .*'ab'"),
        (Choice(GOOD, -GOOD), TypeError, "choices: .*Choice"),
        ([(GOOD, -GOOD)], TypeError, "choices: "),
        (None, TypeError, "choices: .*None"),
    ],
)
def test_bad_choices_change_nothing(choices: Any, error: type[Exception], message: str) -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    before = state(policy)
    for change in (
        lambda: policy.users.add("new", choices),
        lambda: policy.users.add_many({"fine": make_choices(2), "new": choices}),
        lambda: policy.users.update("a", choices),
        lambda: policy.users.add_choices("a", choices),
    ):
        with pytest.raises(error, match=message):
            change()
        assert state(policy) == before


def test_rows_that_overflow_change_nothing() -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    before = state(policy)
    with torch.no_grad():
        policy.encoder.outer1.bias.fill_(3e38)
        policy.modulator.weight.fill_(1.0)
    for change in (
        lambda: policy.users.add("b", [Choice(GOOD * 1e6, -GOOD)]),
        lambda: policy.users.update("a", [Choice(GOOD * 1e6, -GOOD)]),
        policy.users.refresh,
    ):
        with pytest.raises(ValueError, match="users: .*finite in torch.float32"):
            change()
        assert state(policy) == before


@pytest.mark.parametrize("name", ["", "a", "__other__", BASE, PRIOR, None, 3, b"a"])
def test_bad_names_change_nothing(name: Any) -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    before = state(policy)
    for change in (
        lambda: policy.users.add(name, []),
        lambda: policy.users.add_many({"b": [], name: []}),
        lambda: policy.users.interpolate(name, {"a": 1.0}),
    ):
        with pytest.raises(ValueError, match="^name: "):
            change()
        assert state(policy) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, "1", None, True, 1e300])
def test_bad_weights_and_strengths_change_nothing(value: Any) -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    before = state(policy)
    with pytest.raises(ValueError, match="finite"):
        policy.users.scale("a", value)
    with pytest.raises(ValueError, match="^weights: "):
        policy.users.interpolate("b", {PRIOR: 0.5, "a": value})
    assert state(policy) == before


def test_unknown_and_unfit_users_change_nothing() -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    policy.users.interpolate("mix", {"a": 0.5, BASE: 0.5})
    before = state(policy)
    for change in (
        lambda: policy.users.update("b", []),
        lambda: policy.users.add_choices("b", []),
        lambda: policy.users.remove("b"),
        lambda: policy.users.scale("b", 1.0),
        lambda: policy.users.interpolate("c", {"a": 1.0, "b": 1.0}),
        lambda: policy.users.remove(BASE),
        lambda: policy.users.update(PRIOR, []),
    ):
        with pytest.raises(UnknownUser, match="expected BASE, PRIOR or one that has been added, got "):
            change()
    for change in (
        lambda: policy.users.add_choices("mix", make_choices(1)),
        lambda: policy.users.scale("mix", 0.5),
        lambda: policy.users.interpolate("c", {}),
    ):
        with pytest.raises(ValueError, match="(user|weights): expected"):
            change()
    assert state(policy) == before


def test_a_bank_too_large_for_the_memory_is_explained() -> None:
    with pytest.raises(MemoryError, match=r"capacity: expected a bank that fits into the memory of cpu, got 1\d+ rows"):
        make_policy(capacity=10**13)


def test_a_full_bank_changes_nothing() -> None:
    policy = make_policy(capacity=2)
    policy.users.add("a", make_choices(1))
    before = state(policy)
    with pytest.raises(BankFull, match="room for 2 in a bank of 2, got 1 slots in use"):
        policy.users.add_many({"b": [], "c": []})
    assert state(policy) == before
    policy.users.add("b", [])
    for change in (lambda: policy.users.add("c", []), lambda: policy.users.interpolate("c", {"a": 1.0})):
        with pytest.raises(BankFull):
            change()
    before = state(policy)
    with policy.steer(["a"]):
        for change in (
            lambda: policy.users.update("a", []),
            lambda: policy.users.scale("a", 0.5),
            policy.users.refresh,
        ):
            with pytest.raises(BankFull):
                change()
        assert state(policy) == before
    policy.users.remove("a")
    policy.users.add("c", [])


def test_a_backend_that_cannot_run_leaves_no_slot_taken() -> None:
    if torch.cuda.is_available():
        pytest.skip("the backend that this test cannot have is here")
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    before = state(policy)
    with use_backend("cuda"):
        for change in (lambda: policy.users.add("b", make_choices(1)), lambda: policy.users.update("a", [])):
            with pytest.raises(BackendError):
                change()
    assert state(policy) == before


# ---------------------------------------------------------------- while a generation runs


class Meanwhile(LogitsProcessor):
    """Does something once, in the middle of a generation."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action, self.count = step, action, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count == self.step:
            self.action()
        return scores


@pytest.mark.parametrize(
    "action",
    [
        lambda p: p.users.remove("a"),
        lambda p: (p.users.remove("a"), p.users.add_many({f"new{i}": make_choices(9 + i) for i in range(2)})),
        lambda p: p.users.update("a", make_choices(8)),
        lambda p: (p.users.update("a", make_choices(8)), p.users.update("a", make_choices(9))),
        lambda p: p.users.scale("a", 0.0),
        lambda p: p.users.refresh(),
    ],
)
def test_a_generation_keeps_the_row_it_began_with(action: Any) -> None:
    policy = make_policy(capacity=4)
    policy.users.add("a", make_choices(1))
    ids, options = make_ids(2), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = policy.generate(ids, ["a", BASE], **options)
    assert not torch.equal(wanted, policy.generate(ids, [PRIOR, BASE], **options))
    meanwhile = Meanwhile(3, lambda: action(policy))
    found = policy.generate(ids, ["a", BASE], logits_processor=LogitsProcessorList([meanwhile]), **options)
    assert meanwhile.count == 12 and torch.equal(found, wanted)
    assert free(policy) == policy.bank.capacity - len(policy.users)  # the old row is given back at the end


def test_an_update_is_seen_by_the_next_generation() -> None:
    policy = make_policy()
    policy.users.add_many({"a": make_choices(1), "b": make_choices(8)})
    ids, options = make_ids(1), {"max_new_tokens": 8, "do_sample": False}
    wanted = policy.generate(ids, ["b"], **options)
    meanwhile = Meanwhile(2, lambda: policy.users.update("a", make_choices(8)))
    policy.generate(ids, ["a"], logits_processor=LogitsProcessorList([meanwhile]), **options)
    assert torch.equal(policy.generate(ids, ["a"], **options), wanted)


def test_threads_that_change_users_never_share_a_slot() -> None:
    policy = make_policy(capacity=12)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(8):
                name = f"user{number}"
                policy.users.add(name, make_choices(number))
                with policy.steer([name]):
                    policy.users.update(name, make_choices(turn))
                    slots = [policy.users[other].slot for other in policy.users if other in policy.users]
                    assert len(slots) == len(set(slots))
                policy.users.remove(name)
        except (UnknownUser, BankFull):
            pass  # another thread's user went between two lines; not what is asked about
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for name in policy.users:
        policy.users.remove(name)
    assert free(policy) == 12 and not policy.bank._pins and not policy.bank._released


class BankMachine(RuleBasedStateMachine):
    """The bank against a model of it: names to rows, and rows that running generations hold."""

    names = st.sampled_from(["a", "b", "c", "d", "e"])

    @initialize()
    def begin(self) -> None:
        self.policy = make_policy(film=False, modulations=("scale",), capacity=4)
        self.rows: dict[str, torch.Tensor] = {}
        self.held: list[tuple[Any, int, torch.Tensor]] = []

    def taken(self) -> set[int]:
        return {self.policy.users.slot(name) for name in self.rows} | {slot for _, slot, _ in self.held}

    def attempt(self, name: str, action: Any, needs_slot: bool) -> None:
        if needs_slot and len(self.taken()) == self.policy.bank.capacity:
            with pytest.raises(BankFull):
                action()
        else:
            self.rows[name] = self.policy.bank.rows[action().slot].clone()

    def pinned(self, name: str) -> bool:
        return any(slot == self.policy.users.slot(name) for _, slot, _ in self.held)

    @rule(name=names, seed=st.integers(0, 3))
    def add(self, name: str, seed: int) -> None:
        if name in self.rows:
            with pytest.raises(ValueError, match="taken"):
                self.policy.users.add(name, [])
        else:
            self.attempt(name, lambda: self.policy.users.add(name, make_choices(seed)), True)

    @rule(name=names, seed=st.integers(0, 3))
    def update(self, name: str, seed: int) -> None:
        if name in self.rows:
            self.attempt(name, lambda: self.policy.users.update(name, make_choices(seed)), self.pinned(name))

    @rule(name=names, strength=st.floats(0, 2, width=16))
    def scale(self, name: str, strength: float) -> None:
        if name in self.rows:
            self.attempt(name, lambda: self.policy.users.scale(name, strength), self.pinned(name))

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name in self.rows:
            self.policy.users.remove(name)
            del self.rows[name]

    @rule(name=names)
    def hold(self, name: str) -> None:
        if name in self.rows:
            held = self.policy.steer([name, name])
            self.held.append((held, int(held.__enter__()[0]), self.rows[name]))

    @rule(index=st.integers(0, 3))
    def let_go(self, index: int) -> None:
        if index < len(self.held):
            self.held.pop(index)[0].__exit__(None, None, None)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "policy"):
            return
        users, bank = self.policy.users, self.policy.bank
        slots = [users.slot(name) for name in users]
        assert set(users) == set(self.rows) and len(set(slots)) == len(slots)
        assert all(torch.equal(bank.rows[users.slot(name)], wanted) for name, wanted in self.rows.items())
        assert all(torch.equal(bank.rows[slot], wanted) for _, slot, wanted in self.held)
        assert sorted(bank._free) == sorted(set(range(2, 6)) - self.taken())
        assert not bank.rows[0].any() and not bank.rows[bank._free].any()

    def teardown(self) -> None:
        if hasattr(self, "policy"):
            for held, _, _ in self.held:
                held.__exit__(None, None, None)
            self.held = []
            self.agrees()


TestBank = BankMachine.TestCase
TestBank.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_a_policy_without_a_tokenizer_says_so() -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="^prompts: .*no tokenizer"):
        policy.generate(["w7"], [PRIOR])
    assert make_policy(tokenizer=make_tokenizer()).generate(["w7"], [PRIOR], max_new_tokens=1)


# ---------------------------------------------------------------- whole, and for nobody to wait for


def test_a_request_of_the_prior_keeps_the_row_it_began_with() -> None:
    """The prior's row changes under way: the request ends as it began, and a later one finds none of its blocks."""

    def make() -> SteerablePolicy:
        model = make_model(max_position_embeddings=256)
        model.generation_config.eos_token_id = []
        return make_policy(model, capacity=4)

    policy, unchanged, changed = make(), make(), make()
    changed.strengthen(-3.0)
    request = {"prompt": make_ids(1, 70)[0].tolist(), "user": PRIOR, "max_new_tokens": 12}
    engine = policy.engine(max_rows=2, max_tokens=512, background=False)
    first = engine.submit(**request)
    for _ in range(4):
        engine.step()
    assert not first._pieces.empty() and not first.done
    policy.strengthen(-3.0)
    assert policy.users.slot(PRIOR) != 1
    policy.strengthen(1.0)  # its slot is nobody's now: in place
    second = engine.submit(**request)
    found = [handle.result(60).tokens for handle in (first, second)]
    alone = [one.engine(max_rows=1, max_tokens=512, background=False) for one in (unchanged, changed)]
    wanted = [one.run([request])[0].tokens for one in alone]
    assert found == wanted and found[0] != found[1]
    assert free(policy) == policy.bank.capacity and not policy.bank._pins and not policy.bank._released


def test_a_generation_of_the_prior_keeps_the_row_it_began_with() -> None:
    policy = make_policy(capacity=4)
    ids, options = make_ids(1), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = policy.generate(ids, [PRIOR], **options)
    meanwhile = Meanwhile(3, lambda: policy.strengthen(-3.0))
    found = policy.generate(ids, [PRIOR], logits_processor=LogitsProcessorList([meanwhile]), **options)
    assert torch.equal(found, wanted) and not torch.equal(policy.generate(ids, [PRIOR], **options), wanted)
    assert free(policy) == policy.bank.capacity


@pytest.mark.parametrize("stored", [False, True])
def test_strengthen_and_refresh_are_whole_or_not_at_all(stored: bool, tmp_path: Any) -> None:
    policy = make_policy(capacity=2)
    if stored:
        policy.use_store(tmp_path / "users.db")
    policy.users.add_many({"a": make_choices(1), "b": make_choices(2)})
    weights = [policy.modulator.weight.clone(), policy.modulator.bias.clone()]
    rows = policy.bank.rows.clone()

    def unchanged() -> bool:
        now = [policy.modulator.weight, policy.modulator.bias]
        return torch.equal(policy.bank.rows, rows) and all(map(torch.equal, now, weights))

    with policy.steer(["a", "b", PRIOR]):  # a full bank of running users
        with pytest.raises(BankFull):
            policy.strengthen(0.5)
        assert unchanged()
        with pytest.raises(BankFull):
            policy.users.refresh()
        assert unchanged()
    for strength in (1e39, float("nan"), 10**400):
        with pytest.raises(ValueError, match="finite"):
            policy.strengthen(strength)
        assert unchanged()
    policy.strengthen(0.5)
    assert not unchanged()


class SlowEmbedder:
    """Embeds when it is let."""

    width = WIDTH

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, texts: list[tuple[str, str]]) -> torch.Tensor:
        self.begun.set()
        assert self.go.wait(60)
        return torch.randn(len(texts), WIDTH)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda users, own: users.add("c", own),
        lambda users, own: users.add_many({"c": own, "d": own}),
        lambda users, own: users.update("a", own),
        lambda users, own: users.add_choices("a", own),
    ],
)
def test_nobody_waits_for_anothers_embedding(change: Any, stored: bool, tmp_path: Any) -> None:
    policy = make_policy()
    if stored:
        policy.use_store(tmp_path / "users.db")
    policy.users.add_many({"a": make_choices(1), "b": make_choices(2)})
    policy.embedder = embedder = SlowEmbedder()  # type: ignore[assignment]
    thread = threading.Thread(target=change, args=(policy.users, [Choice("yes", "no")]))
    thread.start()
    assert embedder.begun.wait(60)

    def others() -> None:
        with policy.steer(["a", "b", PRIOR]):
            policy.users.scale("b", 0.5)
            policy.users.blend({"a": 0.5, "b": 0.5})

    other = threading.Thread(target=others)
    other.start()
    other.join(20)
    waits = other.is_alive()
    embedder.go.set()
    for one in (thread, other):
        one.join()
    assert not waits


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([Choice("a", "b")] * 10_001, "^choices: expected at most 10,000 a call, got 10,001"),
        ([Choice("a", "b"), Choice("x" * 65_537, "b")], r"^choices\[1\].chosen: expected at most 65,536 characters"),
        ([Choice("a", "b", "x" * 65_537)], r"^choices\[0\].prompt: expected at most 65,536 characters, got 65,537"),
        ([Choice("a", "b\0")], r"^choices\[0\].rejected: expected text without NUL"),
    ],
)
def test_limits_of_a_call_are_named(choices: Any, message: str) -> None:
    policy = make_policy()
    policy.users.add("a", make_choices(1))
    before = state(policy)
    for change in (policy.users.update, policy.users.add_choices):
        with pytest.raises(ValueError, match=message):
            change("a", choices)
    with pytest.raises(ValueError, match=message):
        policy.users.add("b", choices)
    assert state(policy) == before


def test_an_unknown_user_is_told_of_nobody_else(tmp_path: Any) -> None:
    policy = make_policy()
    policy.users.add("secret", [])
    with pytest.raises(UnknownUser) as plain:
        policy.users["b"]
    policy.users.remove("secret")
    policy.use_store(tmp_path / "users.db").add("secret", [])
    with pytest.raises(UnknownUser) as stored:
        policy.users["b"]
    assert not any("secret" in f"{error.value} {error.value!r}" for error in (plain, stored))


def test_a_slot_that_another_thread_takes_is_evicted_for_again() -> None:
    """Between one thread's eviction and its taking another thread takes the slot: there is more to evict."""
    bank = make_policy(capacity=3).bank
    with bank.take(3) as slots:
        left, stolen = list(slots), []

    class Meantime:
        """The bank's lock, before which another thread is faster once."""

        def __enter__(self) -> None:
            if bank._free and not stolen:
                stolen.append(bank._free.pop())
            lock.acquire()

        def __exit__(self, *exception: object) -> None:
            lock.release()

    lock, bank._lock = bank._lock, Meantime()  # type: ignore[assignment]
    bank.evict = lambda: bool(left) and bank.release(left.pop()) is None
    with bank.take() as (slot,):
        assert stolen and slot not in stolen and len(left) == 1
    with pytest.raises(BankFull), bank.take(3):
        pass
