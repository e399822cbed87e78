"""The engine: requests of different users join and leave one running batch at any step.

It stands on the fused form and its own cache in blocks, not on transformers' continuous batching, which on a CPU builds
a dense mask for every step and runs the model as it is. A step serves every running request: one token of those that
decode, and a piece of their prompts for those that have just come. The fused form's rows do not depend on each other,
so a request's tokens are those that it gets alone, whoever comes, leaves, or is put back meanwhile (with the native CPU
steps bit for bit; elsewhere within the rounding of PyTorch's products).

What a user has computed is found again for the same user with the same row of the bank only: the beginning of a prompt
is never shared between users, nor between versions of one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from fssa_fast.generation.blocks import BlockPool, prefix_keys
from fssa_fast.generation.cache import BLOCK
from fssa_fast.generation.prompts import Message, prompt_ids
from fssa_fast.generation.sampling import Sampler, Sampling
from fssa_fast.steering.bank import BankFull

if TYPE_CHECKING:
    from fssa_fast.steering.policy import SteerablePolicy

Reason = Literal["end", "stop", "length", "cancelled", "deadline"]
Prompt = str | Sequence[Message] | Sequence[int]
User = str | Mapping[str, float]


class QueueFull(RuntimeError):
    """As many requests wait as the engine lets wait."""


class EngineClosed(RuntimeError):
    """The engine has been closed."""


@dataclass(frozen=True)
class Result:
    """What a request got. `text` is None for a policy without tokenizer; it ends before the stop string that was met.

    reason: "end" (the model ended its answer), "stop" (a stop string), "length" (max_new_tokens), "cancelled",
    "deadline"; for the last two, what there was until then.
    """

    tokens: list[int]
    text: str | None
    reason: Reason


class Handle:
    """A request under way. Its methods may be called from any thread."""

    def __init__(self, engine: Engine, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._engine, self._tokenizer, self._stop = engine, tokenizer, stop
        self._pieces: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._finished = threading.Event()
        self._cancelled = False
        self._result: Result | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._finished.is_set()

    def cancel(self) -> None:
        """Ends the request at the next step; no effect on one that has ended."""
        self._cancelled = True
        self._engine._awake()

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end. Raises what the request failed of; TimeoutError."""
        if not self._finished.is_set() and not self._engine.background:
            self._engine._drive(self._finished, timeout)
        if not self._finished.wait(timeout):
            raise TimeoutError(f"request: not finished within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def __iter__(self) -> Iterator[int]:
        """The tokens as they come; once. Raises what the request failed of."""
        while True:
            while not self._engine.background and self._pieces.empty() and not self.done:
                self._engine.step()
            token = self._pieces.get()
            if token is None:
                break
            yield token
        self.result()

    def text(self) -> Iterator[str]:
        """The text as it comes, in pieces of whole characters; once."""
        if self._tokenizer is None:
            raise ValueError("text: expected a policy with a tokenizer; this one was made without")
        tokens: list[int] = []
        given = 0
        held = max((len(stop) for stop in self._stop), default=1) - 1  # perhaps the beginning of a stop string
        for token in self:
            tokens.append(token)
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            end = len(text) - held
            if end > given and not text.endswith("\ufffd"):
                at = _first_stop(text, self._stop)
                piece = text[given : end if at is None else min(end, at)]
                given += len(piece)
                if piece:
                    yield piece
        rest = (self.result().text or "")[given:]
        if rest:
            yield rest


@dataclass
class _Request:
    """A request as the engine sees it."""

    handle: Handle
    tokens: list[int]  # prompt and answer
    prompt_length: int
    limit: int  # of tokens in all
    slot: int
    root: bytes  # what the keys of its prefixes begin with
    sampler: Sampler
    stop: tuple[str, ...]
    deadline: float
    held: ExitStack  # the pin of the user's row, or the temporary one
    order: int
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the cache
    row: int = -1

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class Engine:
    """Serves requests of many users in one batch. Made by `SteerablePolicy.engine`.

    Args:
        policy: fused, or it is fused now.
        max_rows: how many requests run at once.
        max_tokens: tokens in the cache, of all requests together (rounded up to blocks of 32).
        max_length: tokens of one request, prompt and answer; None: as many as the cache or the model has room for.
        max_waiting: how many requests may wait beside those that run.
        step_tokens: at most so many tokens a step: prompts beyond it are computed in pieces while others decode.
        background: True runs the steps in a thread of the engine's own, started by the first request. False runs
            them in the thread that calls `step`, `run`, or waits for a result.

    Submitting, cancelling and waiting are safe from any thread. `close`, or leaving a `with` block, ends the thread.
    """

    def __init__(
        self,
        policy: SteerablePolicy,
        *,
        max_rows: int = 32,
        max_tokens: int = 16384,
        max_length: int | None = None,
        max_waiting: int = 1024,
        step_tokens: int = 256,
        background: bool = True,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("step_tokens", step_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if step_tokens < max_rows:
            raise ValueError(f"step_tokens: expected at least max_rows, {max_rows}, got {step_tokens}")
        fused = policy.fused or policy.fuse()
        blocks = -(-max_tokens // BLOCK)
        self.max_length = min(fused.max_positions, blocks * BLOCK) if max_length is None else max_length
        self.max_rows, self.max_waiting, self.step_tokens = max_rows, max_waiting, step_tokens
        self.background = background
        self._policy, self._fused = policy, fused
        self._cache = fused.new_cache(max_rows, self.max_length, blocks + 1)
        self._pool = BlockPool(blocks + 1)
        self._ends = _end_tokens(policy)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._rows = list(range(max_rows - 1, -1, -1))
        self._orders = itertools.count()
        self._state = threading.Condition()  # guards waiting, closed, the thread
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.preempted = 0

    # ------------------------------------------------------------ requests

    def submit(
        self,
        prompt: Prompt,
        user: User,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        strength: float = 1.0,
        timeout: float | None = None,
    ) -> Handle:
        """Adds a request; it begins when there is room.

        Args:
            prompt: a text as it is, a chat, or token ids.
            user: a name, BASE, PRIOR, or a blend: names with weights. The row is kept as it is now until the request
                ends, whatever happens to the users meanwhile.
            stop: texts, the first of which to appear in the answer ends it.
            strength: how strongly the user steers; 0 is the base model.
            timeout: seconds from now, after which the request ends with what there is.

        Raises: UnknownUser; QueueFull; EngineClosed; BankFull where a blend or a strength finds no free row;
            ValueError for an empty prompt, one that does not fit with its answer, or a number out of range.
        """
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected a list of texts, none of them empty, got {stop!r}")
        if stop and self._policy.tokenizer is None:
            raise ValueError("stop: expected none, since this policy has no tokenizer")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if timeout is not None and math.isnan(timeout):
            raise ValueError("timeout: expected a number of seconds, got NaN")
        sampler = Sampler(Sampling(temperature, top_p, top_k, seed))
        tokens = self._tokens(prompt)
        room = min(self.max_length, (self._cache.blocks - 2) * BLOCK)
        if len(tokens) + max_new_tokens > room:
            raise ValueError(
                f"prompt: expected at most {room} tokens with the answer, "
                f"got {len(tokens)} and max_new_tokens={max_new_tokens}"
            )
        handle = Handle(self, self._policy.tokenizer, tuple(stop))
        held = ExitStack()
        with held:
            slot, root = self._hold(held, user, strength)
            request = _Request(
                handle=handle,
                tokens=tokens,
                prompt_length=len(tokens),
                limit=len(tokens) + max_new_tokens,
                slot=slot,
                root=root,
                sampler=sampler,
                stop=tuple(stop),
                deadline=math.inf if timeout is None else time.monotonic() + timeout,
                held=ExitStack(),
                order=next(self._orders),
            )
            with self._state:
                if self._closed:
                    raise EngineClosed("engine: expected one that is open, got one that has been closed")
                if len(self._waiting) >= self.max_waiting:
                    raise QueueFull(f"engine: expected at most {self.max_waiting} waiting requests; try again later")
                request.held = held.pop_all()
                self._waiting.append(request)
                if self.background and self._thread is None:
                    self._thread = threading.Thread(target=self._loop, daemon=True, name="fssa-engine")
                    self._thread.start()
                self._state.notify_all()
        return handle

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Result]:
        """Serves all of these, each the arguments of `submit`, and returns their results in order."""
        handles: list[Handle] = []
        for request in requests:
            while True:
                try:
                    handles.append(self.submit(**request))
                    break
                except (QueueFull, BankFull):  # what ends makes room
                    oldest = next((handle for handle in handles if not handle.done), None)
                    if oldest is None:
                        raise
                    if not self.background:
                        self._drive(oldest._finished, None)
                    oldest._finished.wait()
                except BaseException:
                    for handle in handles:
                        handle.cancel()
                    raise
        return [handle.result() for handle in handles]

    def close(self) -> None:
        """Cancels what waits and runs, and ends the thread."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping:
            for request in [*self._running, *self._waiting]:
                self._finish(request, "cancelled")
            self._waiting.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------ steps

    def step(self) -> bool:
        """One step of all running requests, after waiting ones have joined. False if there was nothing to do."""
        with self._stepping:
            self._drop()
            self._admit()
            if not self._running:
                return False
            batch = self._plan()
            try:
                self._forward(batch)
            except Exception as error:  # the requests of this step fail; those that wait go on
                for request, _ in batch:
                    if request in self._running:
                        self._fail(request, error)
            return True

    def _loop(self) -> None:
        while True:
            with self._state:
                while not self._closed and not self._waiting and not self._running:
                    self._state.wait()
                if self._closed:
                    return
            self.step()

    def _drive(self, until: threading.Event, timeout: float | None) -> None:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not until.is_set() and time.monotonic() < end and self.step():
            pass

    def _awake(self) -> None:
        with self._state:
            self._state.notify_all()

    def _drop(self) -> None:
        now = time.monotonic()
        with self._state:
            waiting, self._waiting = list(self._waiting), deque()
            gone = [r for r in [*waiting, *self._running] if r.handle._cancelled or r.deadline <= now]
            self._waiting.extend(request for request in waiting if request not in gone)
        for request in gone:
            self._finish(request, "cancelled" if request.handle._cancelled else "deadline")

    def _admit(self) -> None:
        while self._rows:
            with self._state:
                if not self._waiting:
                    return
                request = self._waiting[0]
            # One token at least is computed, for its logits.
            keys = prefix_keys(request.root, request.tokens)
            found = self._pool.find(keys[: (len(request.tokens) - 1) // BLOCK])
            if -(-(len(request.tokens) + 1) // BLOCK) - len(found) > self._pool.available:
                self._pool.give_back(found)
                return
            with self._state:
                self._waiting.popleft()
            request.row, request.blocks, request.keys = self._rows.pop(), found, keys
            request.computed = len(found) * BLOCK
            self._running.append(request)

    def _plan(self) -> list[tuple[_Request, int]]:
        """Whom this step serves, and with how many tokens; with the blocks that they need."""
        batch: list[tuple[_Request, int]] = []
        left = self.step_tokens
        # Those that decode first: they have one token each, and there is room for all of them.
        for request in sorted(self._running, key=lambda r: (len(r.tokens) - r.computed > 1, r.order)):
            count = min(left, len(request.tokens) - request.computed)
            if count == 0 or request not in self._running:
                continue
            if self._extend(request, -(-(request.computed + count) // BLOCK)):
                batch.append((request, count))
                left -= count
        return [(request, count) for request, count in batch if request in self._running]

    def _extend(self, request: _Request, blocks: int) -> bool:
        """Gives a request as many blocks, putting back the youngest of the others until there are; False: itself."""
        while blocks - len(request.blocks) > self._pool.available:
            youngest = max(self._running, key=lambda r: r.order)
            self._leave(youngest)
            self.preempted += 1
            with self._state:
                self._waiting.appendleft(youngest)
            if youngest is request:
                return False
        missing = blocks - len(request.blocks)
        if missing > 0:
            request.blocks += [self._pool.take() for _ in range(missing)]
            self._cache.assign(request.row, request.blocks)
        return True

    def _forward(self, batch: list[tuple[_Request, int]]) -> None:
        if not batch:
            return
        ids: list[int] = []
        positions: list[int] = []
        slots, rows, last, asked = [], [], [], []
        for request, count in batch:
            start, end = request.computed, request.computed + count
            ids += request.tokens[start:end]
            positions += range(start, end)
            slots += [request.slot] * count
            rows += [request.row] * count
            if end == len(request.tokens):
                last.append(len(ids) - 1)
                asked.append(request)
        device = self._fused.device

        def tensor(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        logits = self._fused.forward(
            tensor(ids, torch.long), tensor(slots), tensor(rows), tensor(positions), self._cache,
            tensor(last, torch.long),
        )  # fmt: skip
        for request, count in batch:
            known = request.computed // BLOCK
            request.computed += count
            for index in range(known, min(request.computed // BLOCK, len(request.keys))):
                self._pool.learn(request.blocks[index], request.keys[index])
        if asked:
            highest, likeliest = (values.tolist() for values in logits.max(-1))
            for index, request in enumerate(asked):
                if not math.isfinite(highest[index]):
                    self._fail(request, FloatingPointError("model: expected finite logits, got NaN or infinity"))
                elif request.sampler.sampling.temperature == 0:
                    self._advance(request, likeliest[index])
                else:
                    self._advance(request, request.sampler.draw(logits[index].cpu()))

    def _advance(self, request: _Request, token: int) -> None:
        request.tokens.append(token)
        request.handle._pieces.put(token)
        if token in self._ends:
            self._finish(request, "end")
        elif request.stop and _first_stop(self._tail(request), request.stop) is not None:
            self._finish(request, "stop")
        elif len(request.tokens) == request.limit:
            self._finish(request, "length")

    def _tail(self, request: _Request) -> str:
        # A token is at least a byte and a character at most four: a stop string lies within so many last tokens.
        longest = 4 * max(map(len, request.stop)) + 8
        return self._policy.tokenizer.decode(request.answer[-longest:], skip_special_tokens=True)

    # ------------------------------------------------------------ ends

    def _leave(self, request: _Request) -> None:
        """Takes a running request's row and blocks."""
        self._running.remove(request)
        self._pool.give_back(request.blocks)
        self._cache.assign(request.row, [])
        self._rows.append(request.row)
        request.blocks, request.computed, request.row = [], 0, -1

    def _finish(self, request: _Request, reason: Reason) -> None:
        answer = request.answer
        text = None
        if self._policy.tokenizer is not None:
            text = self._policy.tokenizer.decode(answer, skip_special_tokens=True)
            at = _first_stop(text, request.stop)
            text = text if at is None else text[:at]
        request.handle._result = Result(answer, text, reason)
        self._end(request)

    def _fail(self, request: _Request, error: BaseException) -> None:
        request.handle._error = error
        self._end(request)

    def _end(self, request: _Request) -> None:
        if request in self._running:
            self._leave(request)
        request.held.close()
        request.handle._finished.set()
        request.handle._pieces.put(None)

    # ------------------------------------------------------------ what a request stands on

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) or not all(isinstance(token, int) for token in prompt):
            if self._policy.tokenizer is None:
                raise ValueError("prompt: expected token ids, since this policy has no tokenizer; got a text or a chat")
            return prompt_ids(self._policy.tokenizer, prompt)  # type: ignore[arg-type]
        tokens = [token for token in prompt if isinstance(token, int)]
        if not tokens:
            raise ValueError("prompt: expected at least one token, got an empty prompt")
        bad = [token for token in tokens if not 0 <= token < self._fused.vocabulary]
        if bad:
            raise ValueError(f"prompt: expected token ids in [0, {self._fused.vocabulary}), got {bad[0]}")
        return tokens

    def _hold(self, held: ExitStack, user: User, strength: float) -> tuple[int, bytes]:
        """The slot of the user's row, kept until `held` closes, and what the row's prefixes are known by."""
        users, bank = self._policy.users, self._policy.bank
        weights = {user: 1.0} if isinstance(user, str) else dict(user)
        if not weights:
            raise ValueError("user: expected at least one name, got none")
        if not all(math.isfinite(number) for number in (strength, *weights.values())):
            raise ValueError("user, strength: expected finite numbers, got NaN or infinity")
        if isinstance(user, str) and strength == 1.0:
            slot = int(held.enter_context(users.slots([user]))[0])
        else:
            with users.slots(list(weights)) as slots:
                row = torch.zeros_like(bank.rows[0])
                for weight, one in zip(weights.values(), slots.tolist(), strict=True):
                    row += strength * weight * bank.rows[one]
            with bank.take() as (slot,):
                bank.rows[slot] = row
            held.callback(bank.release, slot)
        row = bank.rows[slot].detach().cpu().contiguous()
        name = repr((sorted(weights.items()), strength)).encode()
        return slot, hashlib.blake2b(name + b"\0" + row.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return min(found, default=None)


def _end_tokens(policy: SteerablePolicy) -> set[int]:
    config = getattr(policy.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = policy.model.config.get_text_config().eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
