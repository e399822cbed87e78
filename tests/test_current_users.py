"""Whose users a forward serves: its own task's, thread's and generator's, in whatever order blocks begin and end."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch
from tiny import make_choices, make_ids, make_policy
from torch import Tensor

from fssa_fast import BASE, PRIOR, SteerablePolicy

USERS = ["alice", "bob", PRIOR, BASE]
IDS = make_ids(1, 4)


@pytest.fixture(scope="module")
def policy() -> SteerablePolicy:
    made = make_policy()
    made.users.add("alice", make_choices(1))
    made.users.add("bob", make_choices(2, 5))
    return made


@torch.no_grad()
def answer(policy: SteerablePolicy) -> Tensor:
    return policy.model(IDS).logits


@pytest.fixture(scope="module")
def alone(policy: SteerablePolicy) -> dict[str, Tensor]:
    found = {}
    for user in USERS:
        with policy.steer([user]):
            found[user] = answer(policy)
    assert len({tuple(logits.flatten().tolist()) for logits in found.values()}) == len(USERS)
    return found


def test_asyncio_tasks_have_users_of_their_own(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    order = random.Random(0)

    async def one(user: str) -> None:
        for _ in range(3):
            with policy.steer([user]):
                for _ in range(order.randrange(4)):
                    await asyncio.sleep(0)
                    assert torch.equal(answer(policy), alone[user])
            await asyncio.sleep(0)
            assert torch.equal(answer(policy), alone[BASE])

    async def all_of_them() -> None:
        await asyncio.gather(*(one(user) for user in USERS * 3))

    asyncio.run(all_of_them())
    assert torch.equal(answer(policy), alone[BASE])


def chunks(policy: SteerablePolicy, user: str) -> Iterator[Tensor]:
    with policy.steer([user]):
        while True:
            yield answer(policy)


@pytest.mark.parametrize("closes", list(itertools.permutations(range(3))))
def test_generators_have_users_of_their_own(
    policy: SteerablePolicy, alone: dict[str, Tensor], closes: tuple[int, ...]
) -> None:
    """The caller's forwards, and those of other generators, are not steered by one that is suspended."""
    users = ["alice", "bob", PRIOR]
    running = [chunks(policy, user) for user in users]
    for _ in range(2):
        for user, generator in zip(users, running, strict=True):
            assert torch.equal(next(generator), alone[user])
            assert torch.equal(answer(policy), alone[BASE])
    with policy.steer(["bob"]):
        assert torch.equal(next(running[0]), alone["alice"])
        assert torch.equal(answer(policy), alone["bob"])
    for index in closes:  # whatever the order in which they end
        running[index].close()
        users[index] = ""
        for user, generator in zip(users, running, strict=True):
            if user:
                assert torch.equal(next(generator), alone[user])
        assert torch.equal(answer(policy), alone[BASE])


def test_asynchronous_generators_have_users_of_their_own(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    async def stream(user: str) -> AsyncIterator[Tensor]:
        with policy.steer([user]):
            for _ in range(3):
                await asyncio.sleep(0)
                yield answer(policy)

    async def consume(user: str) -> None:
        async for found in stream(user):
            assert torch.equal(found, alone[user])
            assert torch.equal(answer(policy), alone[BASE])

    async def both() -> None:
        await asyncio.gather(consume("alice"), consume("bob"))

    asyncio.run(both())


def test_a_context_manager_lends_its_block_to_its_caller(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    @contextmanager
    def lent(user: str) -> Iterator[None]:
        with policy.steer([user]):
            yield

    @asynccontextmanager
    async def lent_async(user: str) -> AsyncIterator[None]:
        with policy.steer([user]):
            yield

    with lent("alice"):
        assert torch.equal(answer(policy), alone["alice"])
        with lent("bob"):
            assert torch.equal(answer(policy), alone["bob"])
        assert torch.equal(answer(policy), alone["alice"])

    def enter(stack: ExitStack, user: str) -> None:
        stack.enter_context(lent(user))

    with ExitStack() as stack:
        enter(stack, "bob")
        assert torch.equal(answer(policy), alone["bob"])

    async def within() -> None:
        async with lent_async("alice"):
            await asyncio.sleep(0)
            assert torch.equal(answer(policy), alone["alice"])

    asyncio.run(within())

    def generator() -> Iterator[None]:  # a stack's blocks are the generator's whose frame holds it
        with ExitStack() as stack:
            enter(stack, "bob")
            yield
            assert torch.equal(answer(policy), alone["bob"])
            yield

    suspended = generator()
    next(suspended)
    assert torch.equal(answer(policy), alone[BASE])
    next(suspended)
    suspended.close()


def test_threads_have_users_of_their_own(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    with policy.steer(["alice"]), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(answer, policy).result(), alone[BASE])
        in_context = contextvars.copy_context()
        assert torch.equal(pool.submit(in_context.run, answer, policy).result(), alone["alice"])


def test_a_thread_started_in_a_generators_block_raises(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    """Whether the generator waits for the thread, or is suspended meanwhile, cannot be known."""

    def in_another_thread() -> Tensor:
        return ThreadPoolExecutor(1).submit(contextvars.copy_context().run, answer, policy).result()

    def generator() -> Iterator[None]:
        with policy.steer(["alice"]):
            with pytest.raises(RuntimeError, match="users: expected a forward in the thread of the generator"):
                in_another_thread()
            yield

    suspended = generator()
    next(suspended)
    with pytest.raises(RuntimeError, match="users: expected a forward in the thread of the generator"):
        in_another_thread()
    with policy.steer(["bob"]):
        assert torch.equal(in_another_thread(), alone["bob"])
    suspended.close()
    assert torch.equal(in_another_thread(), alone[BASE])


def test_a_generator_that_goes_on_in_another_context_raises(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    """As a web framework's pool of threads would run it: not steered at first, and the base model's after that."""
    generator = chunks(policy, "alice")
    assert torch.equal(contextvars.copy_context().run(next, generator), alone["alice"])
    with pytest.raises(RuntimeError, match="users: expected a generator to go on in the task and thread"):
        contextvars.copy_context().run(next, generator)
    assert torch.equal(answer(policy), alone[BASE])


def test_frames_of_other_threads_are_left_alone(policy: SteerablePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end while they are looked at: walking them has crashed the interpreter."""
    suspended = chunks(policy, "alice")
    next(suspended)
    monkeypatch.setattr(sys, "_current_frames", lambda: pytest.fail("asked for the frames of all threads"))
    answer(policy)
    suspended.close()


def test_a_task_that_outlives_its_block_raises(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    """The block's rows may be somebody else's by then."""

    async def late(go: asyncio.Event) -> Tensor:
        await go.wait()
        return answer(policy)

    async def run() -> None:
        go = asyncio.Event()
        with policy.steer(["alice"]):
            within = asyncio.create_task(late(go))
            go.set()
            assert torch.equal(await within, alone["alice"])
            go = asyncio.Event()
            outlives = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        go.set()
        with pytest.raises(RuntimeError, match="users: expected a block that is open"):
            await outlives

    asyncio.run(run())


def test_a_block_left_in_another_context_raises(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    block: Any = contextvars.copy_context().run(lambda: _entered(policy.steer(["alice"])))
    assert torch.equal(answer(policy), alone[BASE])
    with pytest.raises(RuntimeError, match="expected the block to be left in the task and thread that entered it"):
        block.__exit__(None, None, None)
    assert not policy.bank.pinned(policy.users.slot("alice"))
    raised: list[BaseException] = []
    block = _entered(policy.steer(["bob"]))

    def leave() -> None:
        try:
            block.__exit__(None, None, None)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert raised
    with policy.steer(["alice"]):
        assert torch.equal(answer(policy), alone["alice"])


def _entered(block: Any) -> Any:
    block.__enter__()
    return block


def test_compiled_forwards_serve_the_block_or_raise(policy: SteerablePolicy, alone: dict[str, Tensor]) -> None:
    compiled = torch.compile(policy.model, fullgraph=True, backend="eager")
    whole = torch.compile(policy, fullgraph=True, backend="eager")
    with torch.no_grad():
        for user in USERS:
            with policy.steer([user]) as slots:
                assert torch.equal(compiled(IDS).logits, alone[user])
            assert torch.equal(whole(IDS, slots=slots).logits, alone[user])
        assert torch.equal(compiled(IDS).logits, alone[BASE])
        suspended = chunks(policy, "alice")
        next(suspended)
        with pytest.raises(RuntimeError, match="compiled forward"):
            compiled(IDS)
        with policy.steer(["bob"]):  # a plain function's block ends before the generator goes on
            assert torch.equal(compiled(IDS).logits, alone["bob"])
        suspended.close()
        assert torch.equal(compiled(IDS).logits, alone[BASE])
