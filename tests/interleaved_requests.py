"""Requests, steered forwards, changes and failures in random order: `python tests/interleaved_requests.py`.

Two engines serve one policy, one by its own thread and one driven by hand, from asyncio tasks and threads, while users
are changed, weights written, and store, tokenizer, embedder, cache and model raise now and then. What every request and
every steered forward gave is compared with what another policy of the same weights gives for it alone, with the row
that its user had when it began: bit for bit. tests/test_interleaved_requests.py runs a few hundred moves.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import EOS, WIDTH, make_ids, make_model, make_policy, make_tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fssa_fast import BASE, PRIOR, BankFull, Choice, SteerablePolicy, UnknownUser
from fssa_fast.generation import Engine, EngineClosed, QueueFull, StaleFused
from fssa_fast.generation.requests import Handle, Result
from fssa_fast.users import SqliteStore, StoreError
from fssa_fast.users.store import UserStore

NAMES = [f"user{i}" for i in range(7)]
PROMPTS = [make_ids(1, length, length)[0].tolist() for length in (5, 9, 33, 40, 66, 70)]
WORKERS, ROUND, ENGINES = 6, 120, {"max_rows": 4, "max_tokens": 384, "max_length": 128, "step_tokens": 16}
Row = bytes | None  # None: there is no such user


class Injected(Exception):
    """A failure that was asked for."""


class InjectedStoreError(StoreError):
    """One of the store's."""


class Faults:
    """Raises now and then; `off` for the block in this thread."""

    RATES = {"forward": 0.002, "assign": 0.01, "tokenizer": 0.004, "store": 0.004, "embedder": 0.05}

    def __init__(self, seed: int) -> None:
        self.count: Counter[str] = Counter()
        self._draw, self._lock, self._here = random.Random(seed), threading.Lock(), threading.local()

    def __call__(self, kind: str) -> None:
        with self._lock:
            if getattr(self._here, "off", False) or self._draw.random() >= self.RATES[kind]:
                return
            self.count[kind] += 1
        raise (InjectedStoreError if kind == "store" else Injected)(f"injected: {kind}")

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self._here.off = getattr(self._here, "off", False), True
        try:
            yield
        finally:
            self._here.off = before

    def before(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **options: Any) -> Any:
            self(kind)
            return call(*args, **options)

        return failing


class FailingStore:
    """A store whose calls raise before they do anything."""

    def __init__(self, store: UserStore, faults: Faults) -> None:
        self._store, self._faults = store, faults

    def __getattr__(self, name: str) -> Any:
        return self._faults.before("store", getattr(self._store, name))

    def __len__(self) -> int:
        return len(self._store)


class FailingEmbedder:
    """Texts to numbers drawn by their hashes."""

    width = WIDTH

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def encode(self, texts: Sequence[tuple[str, str]]) -> Tensor:
        self._faults("embedder")
        return torch.stack([embedding(text) for text in texts])


def embedding(text: tuple[str, str]) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(repr(text).encode(), digest_size=4).digest(), "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def failing_tokenizer(faults: Faults) -> PreTrainedTokenizerFast:
    tokenizer, own = make_tokenizer(), PreTrainedTokenizerFast
    calls = {name: faults.before("tokenizer", getattr(own, name)) for name in ("__call__", "decode")}
    tokenizer.__class__ = type("FailingTokenizer", (own,), calls)
    return tokenizer


def made(**options: Any) -> SteerablePolicy:
    model = make_model(max_position_embeddings=256)
    model.generation_config.eos_token_id = EOS
    return make_policy(model, **options)


@dataclass
class Change:
    """A change of users that is or was under way, and their rows after it."""

    rows: dict[str, Row] = field(default_factory=dict)


class Rows:
    """Everybody's row as the last change left it, and which changes were under way while something began."""

    def __init__(self) -> None:
        self.now: dict[str, Row] = {}
        self._lock, self._under_way, self._begun = threading.Lock(), set[int](), list[Change]()

    @contextmanager
    def changing(self) -> Iterator[Change]:
        change = Change()
        with self._lock:
            number = len(self._begun)
            self._begun.append(change)
            self._under_way.add(number)
        try:
            yield change
        finally:
            with self._lock:
                self.now.update(change.rows)
                self._under_way.remove(number)

    def begin(self) -> Beginning:
        """From here until its `end` a request may take the row that a user has, or gets."""
        with self._lock:
            return Beginning(self, dict(self.now), [self._begun[n] for n in self._under_way], len(self._begun))

    def since(self, number: int) -> list[Change]:
        with self._lock:
            return self._begun[number:]


@dataclass
class Beginning:
    rows: Rows
    before: dict[str, Row]
    meanwhile: list[Change]
    number: int

    def end(self) -> None:
        self.meanwhile += self.rows.since(self.number)

    def may_have(self, name: str) -> list[Row]:
        """One row, unless the user was being changed."""
        return list({self.before[name], *(change.rows[name] for change in self.meanwhile if name in change.rows)})


@dataclass
class Asked:
    """A request under way."""

    engine: Engine
    handle: Handle
    beginning: Beginning
    user: str | Mapping[str, float]
    strength: float
    prompt: list[int]
    options: dict[str, Any]
    cancelled: bool = False
    timed: bool = False


class Run:
    """The moves, and what is found wrong.

    plant: changes every engine that is made, to see that a fault is found.
    """

    def __init__(self, folder: Path, seed: int, plant: Callable[[Engine], None] | None = None) -> None:
        self.draw, self.faults, self.rows = random.Random(seed), Faults(seed + 1), Rows()
        self.moves: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.leaks = 0
        self.plant, self.path = plant, folder / "users.sqlite"
        self.alone = made(tokenizer=make_tokenizer(), capacity=1)
        self.alone.users.add("one", [])
        self.answers: dict[Any, Result] = {}
        self.policy = made(tokenizer=failing_tokenizer(self.faults), embedder=FailingEmbedder(self.faults), capacity=28)
        self.store = SqliteStore(self.path)
        with self.faults.off():
            self.policy.use_store(FailingStore(self.store, self.faults))
            self.kept: dict[str, list[Choice]] = {name: self.choices() for name in NAMES[:4]}
            for name, choices in self.kept.items():
                self.policy.users.add(name, choices)
        self.strengths = dict.fromkeys(self.kept, 1.0)
        self.asked: list[Asked] = []
        self.forwards: list[tuple[Beginning | None, str, Tensor]] = []
        self.changing, self.renewing = threading.RLock(), threading.Lock()
        self.renewals = [0, 0]  # begun, ended
        self.closed: set[Engine] = set()
        self.all_engines = self.engines = self.new_engines()
        self.record(self.rows.now)

    # ------------------------------------------------------------ parts

    def new_engines(self) -> list[Engine]:
        engines = [self.policy.engine(background=background, **ENGINES) for background in (True, False)]
        fused = engines[0]._fused
        fused.forward = self.faults.before("forward", fused.forward)  # type: ignore[method-assign]
        for engine in engines:
            engine._cache.assign = self.faults.before("assign", engine._cache.assign)  # type: ignore[method-assign]
            if self.plant is not None:
                self.plant(engine)
        return engines

    def choices(self) -> list[Choice]:
        words = [f"w{self.draw.randrange(10**6)}" for _ in range(2 * self.draw.randrange(1, 4))]
        return [Choice(*pair, prompt="p") for pair in zip(words[::2], words[1::2], strict=True)]

    def record(self, into: dict[str, Row], names: Sequence[str] = (*NAMES, PRIOR, BASE)) -> None:
        """The rows of users as they are now."""
        for name in names:
            with self.faults.off():
                into[name] = self.row_of(name)

    def row_of(self, name: str) -> Row:
        until = time.monotonic() + 30
        while True:
            try:
                with self.policy.users.slots([name]) as slots:
                    return row_bytes(self.policy.bank.rows[int(slots[0])])
            except UnknownUser:
                return None
            except BankFull:  # requests end, and leave room; where they do not, the run ends
                if time.monotonic() > until:
                    raise
                self.engines[1].step()
                time.sleep(0.001)

    def fault(self, what: str) -> None:
        self.wrong.append(what)

    # ------------------------------------------------------------ moves

    def submit(self) -> None:
        draw, engine = self.draw, self.draw.choice(self.engines)
        names = [*NAMES, PRIOR, PRIOR, BASE]
        user: Any = draw.choice(names)
        if draw.random() < 0.2:
            user = {user: draw.choice([0.25, 0.5, 1.5]), PRIOR: 0.5}
        strength, prompt = draw.choice([1.0, 1.0, 1.0, 0.5, 2.0]), draw.choice(PROMPTS)
        options: dict[str, Any] = {"max_new_tokens": draw.randrange(1, 11)}
        if draw.random() < 0.4:
            options |= {"temperature": 1.0, "top_p": 0.9, "seed": draw.randrange(3)}
        if draw.random() < 0.2:
            options["stop"] = [f"w{draw.randrange(6, 20)}", "w33 w"]
        timeout = draw.choice([0.0, 0.002, 0.01]) if draw.random() < 0.1 else None
        words = " ".join(self.alone.tokenizer.convert_ids_to_tokens(prompt))
        given: Any = words if draw.random() < 0.3 else prompt
        count = 2 if draw.random() < 0.1 else 1
        beginning, renewals = self.rows.begin(), list(self.renewals)
        try:
            handles = engine.submit_many(given, user, count, strength=strength, timeout=timeout, **options)
        except (Injected, InjectedStoreError, BankFull, QueueFull) as error:
            self.counts[f"refused: {type(error).__name__}"] += 1
        except UnknownUser:
            self.counts["refused: UnknownUser"] += 1
            beginning.end()
            self.forwards.append((beginning, next(iter(user)) if isinstance(user, dict) else user, torch.empty(0)))
        except (StaleFused, EngineClosed) as error:
            self.counts[f"refused: {type(error).__name__}"] += 1
            if renewals[0] == renewals[1] and self.renewals[0] == renewals[0]:
                self.fault(f"refused without a reason: {error!r}")
        else:
            beginning.end()
            for index, handle in enumerate(handles):
                own = options if index == 0 or "seed" not in options else {**options, "seed": options["seed"] + index}
                self.asked.append(
                    Asked(engine, handle, beginning, user, strength, prompt, own, False, timeout is not None)
                )

    def cancel(self) -> None:
        if self.asked:
            asked = self.draw.choice(self.asked)
            asked.cancelled = True
            asked.handle.cancel()

    def step(self) -> None:
        for _ in range(self.draw.randrange(1, 12)):
            self.engines[1].step()

    def read_some(self) -> None:
        """Waits for an answer, driving the engine that has no thread."""
        if self.asked:
            handle = self.draw.choice(self.asked).handle
            try:
                handle.result(60)
            except TimeoutError:
                self.fault("a request did not end")
            except Exception:
                return  # judged with all others

    def change(self) -> None:
        """One change of the users; what it leaves is what it acknowledged."""
        kinds = ("add", "update", "add_choices", "remove", "scale", "refresh", "strengthen")
        with self.changing, self.rows.changing() as change:
            kind = self.draw.choices(kinds, (4, 3, 3, 3, 2, 1, 1))[0]
            name, choices, users = self.draw.choice(NAMES), self.choices(), self.policy.users
            there = name in self.kept
            calls: dict[str, Callable[[], Any]] = {
                "add": lambda: users.add(name, choices),
                "update": lambda: users.update(name, choices),
                "add_choices": lambda: users.add_choices(name, choices),
                "remove": lambda: users.remove(name),
                "scale": lambda: users.scale(name, strength),
                "refresh": users.refresh,
                "strengthen": lambda: self.policy.strengthen(factor),
            }
            strength, factor = self.draw.choice([0.5, 1.0, 1.5]), self.draw.choice([-1.0, 0.5, 2.0])
            if abs(float(self.policy.modulator.weight.detach().abs().max()) * factor - 0.5) > 0.45:
                factor = -1.0
            before = [weight.clone() for weight in self.policy.modulator.parameters()]
            done = False
            try:
                calls[kind]()
                done = True
            except (Injected, InjectedStoreError, BankFull) as error:
                self.counts[f"{kind} failed: {type(error).__name__}"] += 1
            except (UnknownUser, ValueError) as error:
                if isinstance(error, UnknownUser) is (there or kind == "add"):
                    self.fault(f"{kind} of {name}: {error!r}")
            if done:
                self.counts[f"{kind} done"] += 1
                if kind not in ("refresh", "strengthen") and there is (kind == "add"):
                    self.fault(f"{kind} of {name}: expected an error")
                if kind == "remove":
                    self.kept.pop(name), self.strengths.pop(name)
                elif kind in ("add", "update"):
                    self.kept[name] = choices
                    self.strengths.setdefault(name, 1.0)
                elif kind == "add_choices":
                    self.kept[name] = [*self.kept[name], *choices]
                elif kind == "scale":
                    self.strengths[name] = strength
            if kind == "strengthen":
                for old, new in zip(before, self.policy.modulator.parameters(), strict=True):
                    if not torch.equal(new, factor * old if done else old):
                        self.fault("strengthen: neither whole nor nothing")
            self.record(change.rows, (*NAMES, PRIOR) if kind in ("refresh", "strengthen") else (name,))

    def convert_while_read(self) -> None:
        """Refused, and nothing has changed."""
        with self.policy.steer([BASE]):
            before = self.policy.model.dtype, self.policy.bank.rows.dtype
            try:
                self.policy.to(torch.float16)
                self.fault("a policy was converted while its rows were read")
            except RuntimeError:
                self.counts["conversions refused"] += 1
            if before != (self.policy.model.dtype, self.policy.bank.rows.dtype):
                self.fault("a conversion that was refused has changed something")

    def write_a_weight(self) -> None:
        """The engines say that they are stale; new ones take their place, and what the old ones have is cancelled."""
        with self.renewing:
            self.renewals[0] += 1
            with torch.no_grad():
                self.draw.choice(list(self.policy.model.parameters())).mul_(1.0)
            self.renew()
            self.renewals[1] += 1

    def renew(self) -> None:
        old = self.engines
        for engine in old:
            try:
                engine.submit([5], BASE)
                self.fault("a stale engine took a request")
            except StaleFused:
                self.counts["stale engines"] += 1
        self.closed.update(old)
        self.engines = self.new_engines()
        for engine in old:
            self.close(engine)

    def close(self, engine: Engine) -> None:
        engine.close()
        kept = engine._cache.blocks - 1 - engine._running.pool.available
        if kept or engine._open or engine.running or engine.waiting or (engine._thread and engine._thread.is_alive()):
            self.leaks += 1
            self.fault(f"after close: {kept} blocks in use, {len(engine._open)} requests open, or a thread")

    # ------------------------------------------------------------ attached forwards

    @torch.no_grad()
    def forward(self, beginning: Beginning | None, name: str) -> None:
        logits = self.policy.model(torch.tensor([PROMPTS[0]]), use_cache=False).logits
        self.forwards.append((beginning, name, logits))

    @contextmanager
    def may_fail(self, name: str, beginning: Beginning) -> Iterator[None]:
        try:
            yield
        except (Injected, InjectedStoreError, BankFull) as error:
            self.counts[f"steer refused: {type(error).__name__}"] += 1
        except UnknownUser:
            beginning.end()
            self.forwards.append((beginning, name, torch.empty(0)))

    async def steer_in_a_task(self) -> None:
        name, beginning = self.draw.choice([*NAMES, PRIOR]), self.rows.begin()
        with self.may_fail(name, beginning):
            with self.policy.steer([name]):
                beginning.end()
                for _ in range(self.draw.randrange(1, 4)):
                    await asyncio.sleep(0)
                    self.forward(beginning, name)
        self.forward(None, BASE)

    def chunks(self, name: str, beginning: Beginning) -> Iterator[None]:
        with self.policy.steer([name]):
            beginning.end()
            while True:
                yield self.forward(beginning, name)

    async def steer_in_generators(self) -> None:
        running = []
        for name in self.draw.sample([*NAMES, PRIOR], 2):
            beginning = self.rows.begin()
            running.append((name, beginning, self.chunks(name, beginning)))
        for _ in range(3):
            for name, beginning, chunks in running:
                with self.may_fail(name, beginning):
                    next(chunks, None)
                await asyncio.sleep(0)
                self.forward(None, BASE)
        for _, _, chunks in self.draw.sample(running, 2):
            chunks.close()

    def steer_in_a_thread(self) -> None:
        name, beginning = self.draw.choice(NAMES), self.rows.begin()
        with self.may_fail(name, beginning), self.policy.steer([name]):
            beginning.end()
            self.forward(beginning, name)

    # ------------------------------------------------------------ judging

    def possible(self, asked: Asked) -> Iterator[bytes]:
        """The rows that a request may have begun with: one, unless its users were being changed."""
        weights = {asked.user: 1.0} if isinstance(asked.user, str) else dict(asked.user)
        plain = isinstance(asked.user, str) and asked.strength == 1.0
        for rows in itertools.product(*(asked.beginning.may_have(name) for name in weights)):
            if None not in rows:
                found = [self.tensor(row) for row in rows]
                mixed = torch.zeros_like(found[0], dtype=torch.float32)
                for row, weight in zip(found, weights.values(), strict=True):
                    mixed += asked.strength * weight * row
                yield row_bytes(found[0] if plain else mixed.to(found[0].dtype))

    def tensor(self, row: bytes) -> Tensor:
        return torch.frombuffer(bytearray(row), dtype=self.alone.bank.rows.dtype)

    def answer(self, asked: Asked, row: bytes) -> Result:
        """What the request gets alone."""
        key = tuple(asked.prompt), row, repr(sorted(asked.options.items()))
        if key not in self.answers:
            self.alone.bank.rows[self.alone.users.slot("one")] = self.tensor(row)
            with self.alone.engine(background=False, max_rows=1, max_tokens=128) as engine:
                self.answers[key] = engine.submit(asked.prompt, "one", **asked.options).result()
        return self.answers[key]

    def judge(self, asked: Asked) -> None:
        try:
            result = asked.handle.result(60)
        except (Injected, InjectedStoreError):
            self.counts["ended by an injected failure"] += 1
            return
        except StaleFused:
            self.counts["ended as stale"] += 1
            if asked.engine not in self.closed:
                self.fault("an engine was stale, and nobody had changed a weight")
            return
        except Exception as error:
            self.fault(f"a request ended with {error!r}")
            return
        allowed = {"cancelled": asked.cancelled or asked.engine in self.closed, "deadline": asked.timed}
        if not allowed.get(result.reason, True):
            self.fault(f"a request ended as {result.reason!r}, and nobody had asked for that")
        wanted = [self.answer(asked, row) for row in self.possible(asked)]
        if result.reason in allowed:
            right = any(alone.tokens[: len(result.tokens)] == result.tokens for alone in wanted)
        else:
            right = any(
                (alone.tokens, alone.text, alone.reason) == (result.tokens, result.text, result.reason)
                for alone in wanted
            )
        self.counts[f"answers checked, {'cut short' if result.reason in allowed else 'whole'}"] += 1
        self.counts["of these, with one possible row"] += len(wanted) == 1
        if not right:
            self.fault(f"{asked.user} got {result.tokens}, alone {[alone.tokens for alone in wanted]}")

    @torch.no_grad()
    def judge_forwards(self) -> None:
        wanted: dict[bytes, Tensor] = {}
        ids, slots = torch.tensor([PROMPTS[0]]), torch.tensor([0])
        for beginning, name, logits in self.forwards:
            rows = [self.rows.now[BASE]] if beginning is None else beginning.may_have(name)
            if not len(logits):
                self.counts["unknown users checked"] += 1
                if None not in rows:
                    self.fault(f"{name} was not found")
                continue
            for row in rows:
                if row is not None and row not in wanted:
                    found = self.tensor(row)[None]
                    wanted[row] = self.alone(ids, rows=found, slots=slots, use_cache=False).logits
            self.counts["steered forwards checked"] += 1
            if not any(row is not None and torch.equal(logits, wanted[row]) for row in rows):
                self.fault(f"a forward for {name} was somebody else's")
        self.forwards.clear()

    def settle(self) -> None:
        """All that was asked has ended and is right; nothing is held."""
        for asked in self.asked:
            self.judge(asked)
        self.asked.clear()
        self.judge_forwards()
        rows = [row for row in (self.rows.now[name] for name in NAMES) if row is not None]
        if len(set(rows)) < len(rows):
            self.fault("two users have one row")
        held = len(self.policy.bank._pins)
        held += sum(engine._cache.blocks - 1 - engine._running.pool.available for engine in self.engines)
        if held:
            self.leaks += held
            self.fault(f"all has ended, but {held} rows or blocks are held")

    def convert(self) -> None:
        """To the other dtype and new engines, when nobody reads rows."""
        dtype = torch.bfloat16 if self.policy.model.dtype == torch.float32 else torch.float32
        self.policy.to(dtype)
        self.alone.to(dtype)
        self.answers.clear()
        with self.faults.off():
            self.renew()
            self.policy.users.refresh()
        self.counts["conversions"] += 1
        self.record(self.rows.now)

    # ------------------------------------------------------------ the run

    MOVES = {
        "submit": 60, "cancel": 5, "step": 12, "read_some": 8, "change": 10, "convert_while_read": 1,
        "write_a_weight": 0.6, "steer_in_a_task": 4, "steer_in_generators": 3, "steer_in_a_thread": 2,
    }  # fmt: skip

    async def worker(self, moves: list[str], pool: ThreadPoolExecutor, told: Callable[[], Any]) -> None:
        loop = asyncio.get_running_loop()
        while moves:
            name = moves.pop()
            call = getattr(self, name)
            if asyncio.iscoroutinefunction(call):
                await call()
            elif name in ("read_some", "steer_in_a_thread", "write_a_weight") or self.draw.random() < 0.5:
                await loop.run_in_executor(pool, call)
            else:
                call()
            self.moves[name] += 1
            told()
            await asyncio.sleep(0)

    async def run(self, moves: int, told: Callable[[], Any] = lambda: None) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            while (left := moves - sum(self.moves.values())) > 0:
                names, weights = list(self.MOVES), list(self.MOVES.values())
                these = self.draw.choices(names, weights, k=min(ROUND, left))
                await asyncio.gather(*(self.worker(these, pool, told) for _ in range(WORKERS)))
                if left <= ROUND:  # the last are still under way
                    self.closed.update(self.engines)
                    for engine in self.engines:
                        self.close(engine)
                self.settle()
                if left > ROUND and self.draw.random() < 0.3:
                    self.convert()
        self.end()

    def end(self) -> None:
        """Nothing is left, and the store has what was acknowledged."""
        if any(thread.name == "fssa-engine" and thread.is_alive() for thread in threading.enumerate()):
            self.leaks += 1
            self.fault("an engine's thread is left")
        self.store.close()
        store = SqliteStore(self.path)
        if list(store.names()) != sorted(self.kept):
            self.fault(f"the store has {list(store.names())}, expected {sorted(self.kept)}")
        for name, choices in self.kept.items():
            user, kept = store.get(name), store.choices(name) or ()
            texts = [(first.prompt, first.text, second.text) for first, second in kept]
            if texts != [(choice.prompt, choice.chosen, choice.rejected) for choice in choices]:
                self.fault(f"the store has other choices of {name}")
            if user is None or user.strength != self.strengths[name]:
                self.fault(f"the store has another strength of {name}")
            self.counts["stored users checked"] += 1
        store.close()

    def report(self) -> dict[str, Any]:
        return {
            "moves": dict(self.moves.most_common()),
            "injected": dict(self.faults.count.most_common()),
            "counts": dict(sorted(self.counts.items())),
            "leaks": self.leaks,
            "wrong": self.wrong,
        }


def row_bytes(row: Tensor) -> bytes:
    return row.detach().contiguous().view(torch.uint8).numpy().tobytes()


def main() -> int:
    """Returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.moves, unit="move") as bar:
        run = Run(Path(folder), args.seed)
        asyncio.run(run.run(args.moves, bar.update))
    text = json.dumps({"seed": args.seed, **run.report()}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return int(bool(run.wrong))


if __name__ == "__main__":
    sys.exit(main())
