"""The engine: requests of different users join and leave one running batch at any step.

It stands on the fused form and its own cache in blocks, not on transformers' continuous batching, which on a CPU builds
a dense mask for every step and runs the model as it is. A step serves every running request: one token of those that
decode, and a piece of their prompts for those that have just come. The fused form's rows do not depend on each other,
so a request's tokens are those that it gets alone, whoever comes, leaves, or is put back meanwhile (with the native CPU
steps bit for bit; elsewhere within the rounding of PyTorch's products, and of flash-attn's attention).

What a user has computed is found again for the same user with the same row of the bank only: the beginning of a prompt
is never shared between users, nor between versions of one.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from typing import Any

import torch

from fssa_fast.arguments import check_count
from fssa_fast.generation.blocks import BlockPool, prefix_keys
from fssa_fast.generation.fused import FusedModel
from fssa_fast.generation.prompts import Message, prompt_ids, told
from fssa_fast.generation.requests import Handle, Reason, Request, Result, first_stop
from fssa_fast.generation.sampling import Sampler, Sampling
from fssa_fast.generation.steered import Steered
from fssa_fast.users.bank import BankFull

logger = logging.getLogger("fssa_fast")

Prompt = str | Sequence[Message] | Sequence[int]
User = str | Mapping[str, float]


class QueueFull(RuntimeError):
    """As many requests wait as the engine lets wait."""


class EngineClosed(RuntimeError):
    """The engine has been closed."""


class Engine:
    """Serves requests of many users in one batch. Made by `SteerablePolicy.engine`.

    Args:
        policy: whose users are served. fused: its fused form.
        max_rows: how many requests run at once.
        max_tokens: tokens in the cache, of all requests together, rounded up to its blocks: of 32, or 256 with
            flash-attn.
        max_length: tokens of one request, prompt and answer; None: as many as the cache or the model has room for.
        max_waiting: how many requests may wait beside those that run.
        step_tokens: at most so many tokens a step: prompts beyond it are computed in pieces while others decode.
        background: True runs the steps in a thread of the engine's own, started by the first request. False runs
            them in the thread that calls `step`, `run`, or waits for a result.

    Submitting, cancelling and waiting are safe from any thread. `close`, or leaving a `with` block, ends the thread.
    Raises: TypeError, ValueError for a number that is none or out of range.
    """

    def __init__(
        self,
        policy: Steered,
        fused: FusedModel,
        *,
        max_rows: int = 32,
        max_tokens: int = 16384,
        max_length: int | None = None,
        max_waiting: int = 1024,
        step_tokens: int = 256,
        background: bool = True,
    ) -> None:
        numbers = {"max_rows": max_rows, "max_tokens": max_tokens, "max_waiting": max_waiting}
        for name, value in {**numbers, "step_tokens": step_tokens}.items():
            check_count(name, value)
        if step_tokens < max_rows:
            raise ValueError(f"step_tokens: expected at least max_rows, {max_rows}, got {step_tokens}")
        self._block = fused.ops.cache_block
        blocks = -(-max_tokens // self._block)
        room = min(fused.max_positions, blocks * self._block)
        self.max_length = room if max_length is None else max_length
        if not 0 < self.max_length <= room:
            raise ValueError(
                f"max_length: expected 1 to {room}, as the model's positions and max_tokens allow, got {max_length}"
            )
        self.max_rows, self.max_waiting, self.step_tokens = max_rows, max_waiting, step_tokens
        self.background = background
        self.preempted = 0  # how often a request was put back for want of memory
        self._policy, self._fused = policy, fused
        self._cache = fused.new_cache(max_rows, self.max_length, blocks)
        self._pool = BlockPool(self._cache.blocks)
        self._ends = _end_tokens(policy)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._rows = list(range(max_rows - 1, -1, -1))
        self._orders = itertools.count()
        self._state = threading.Condition()  # guards waiting, open, closed and the thread
        self._open = 0  # requests that have not ended
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def running(self) -> int:
        """How many requests have a row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    # ------------------------------------------------------------ requests

    def submit(
        self,
        prompt: Prompt,
        user: User,
        *,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        strength: float = 1.0,
        timeout: float | None = None,
        namespace: str = "",
    ) -> Handle:
        """Adds a request; it begins when there is room.

        Args:
            prompt: a text (told as `policy.chat` says), a chat, or token ids.
            user: a name, BASE, PRIOR, or a blend: names with weights. The row is kept as it is now until the request
                ends, whatever happens to the users meanwhile.
            max_new_tokens: None takes as many as fit.
            temperature: 0 takes the likeliest token. top_p, top_k: 1 and 0 keep all tokens. seed: None draws one.
            stop: texts, the first of which to appear in the answer ends it.
            strength: how strongly the user steers; 0 is the base model.
            timeout: seconds from now, after which the request ends with what there is.
            namespace: what others have computed is found again within the same one only.

        Raises: UnknownUser; QueueFull; EngineClosed; BankFull where a blend or a strength finds no free row;
            TypeError, ValueError for an empty prompt, one that does not fit with its answer, a number out of range.
        """
        self._fused.check()
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected a list of texts, none of them empty, got {stop!r}")
        if stop and self._policy.tokenizer is None:
            raise ValueError("stop: expected none, since this policy has no tokenizer")
        if max_new_tokens is not None:
            check_count("max_new_tokens", max_new_tokens)
        if timeout is not None and (not isinstance(timeout, Real) or math.isnan(timeout)):
            raise ValueError(f"timeout: expected a number of seconds, got {timeout!r}")
        sampler = Sampler(Sampling(temperature, top_p, top_k, seed))
        tokens = self._tokens(prompt)
        if max_new_tokens is None:
            max_new_tokens = max(1, self.max_length - len(tokens))
        if len(tokens) + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt: expected at most {self.max_length} tokens with the answer, "
                f"got {len(tokens)} and max_new_tokens={max_new_tokens}"
            )
        handle = Handle(self, self._policy.tokenizer, tuple(stop))
        with ExitStack() as held:
            slot, root = self._hold(held, user, strength, namespace)
            request = Request(
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
                if self.background and self._thread is None:
                    self._thread = threading.Thread(target=self._loop, daemon=True, name="fssa-engine")
                    self._thread.start()
                request.held = held.pop_all()
                self._waiting.append(request)
                self._open += 1
                self._state.notify_all()
        return handle

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Result]:
        """Serves all of these, each the arguments of `submit`, and returns their results in order.

        More of them than may wait are submitted as others end. Raises what `submit` raises, or what a request failed
        of; the others are cancelled then.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                while True:
                    try:
                        handles.append(self.submit(**request))
                        break
                    except (QueueFull, BankFull):
                        if not self._proceed():
                            raise
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def _proceed(self) -> bool:
        """Takes or awaits a step, so that requests end and make room; False where none is under way."""
        with self._state:
            if not self._open:
                return False
            if self.background:
                self._state.wait(0.1)
                return True
        self.step()
        return True

    def close(self) -> None:
        """Cancels what waits and runs, ends the thread, and lets the cache go."""
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
            self._fused.forget(self._cache)

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
            except Exception as error:  # the requests of this step fail; the others go on
                for request, _ in batch:
                    if request in self._running:
                        self._fail(request, error)
            return True

    def drive(self, until: threading.Event, timeout: float | None) -> None:
        """Takes steps until the event is set, the time is over, or there is nothing to do."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not until.is_set() and time.monotonic() < end and self.step():
            pass

    def _loop(self) -> None:
        try:
            while True:
                with self._state:
                    while not self._closed and not self._open:
                        self._state.wait()
                    if self._closed:
                        return
                self.step()
        except BaseException as error:  # nobody waits for what will never come
            with self._state:
                self._closed = True
                requests = [*self._running, *self._waiting]
                self._waiting.clear()
            for request in requests:
                self._fail(request, error)
            logger.exception("the engine's thread has ended")

    def _drop(self) -> None:
        """Ends what was cancelled or has run out of time."""
        now = time.monotonic()

        def gone(request: Request) -> bool:
            return request.handle._cancelled or request.deadline <= now

        with self._state:
            ended = [request for request in [*self._waiting, *self._running] if gone(request)]
            if ended:
                self._waiting = deque(request for request in self._waiting if request not in ended)
        for request in ended:
            self._finish(request, "cancelled" if request.handle._cancelled else "deadline")

    def _admit(self) -> None:
        """Lets waiting requests join, the first to come first, as long as there are rows and blocks for them."""
        while self._rows and self._waiting:
            request = self._waiting[0]
            request.keys = prefix_keys(request.root, request.tokens, self._block, request.keys)
            # One token at least is computed, for its logits.
            found = self._pool.find(request.keys[: (len(request.tokens) - 1) // self._block])
            if -(-(len(request.tokens) + 1) // self._block) - len(found) > self._pool.available:
                self._pool.give_back(found)
                return
            with self._state:
                self._waiting.popleft()
            request.row, request.blocks, request.computed = self._rows.pop(), found, len(found) * self._block
            if request.cached is None:
                request.cached = min(request.computed, request.prompt_length)
            self._running.append(request)

    def _plan(self) -> list[tuple[Request, int]]:
        """Whom this step serves, and with how many tokens; with the blocks that they need."""
        batch: list[tuple[Request, int]] = []
        left = self.step_tokens
        # Those that decode first: they have one token each, and there is room for all of them.
        for request in sorted(self._running, key=lambda r: (len(r.tokens) - r.computed > 1, r.order)):
            count = min(left, len(request.tokens) - request.computed)
            if count == 0 or request not in self._running:
                continue
            if self._extend(request, -(-(request.computed + count) // self._block)):
                batch.append((request, count))
                left -= count
        return [(request, count) for request, count in batch if request in self._running]

    def _extend(self, request: Request, blocks: int) -> bool:
        """Gives a request as many blocks, putting back the youngest of all until there are; False: itself."""
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

    def _forward(self, batch: list[tuple[Request, int]]) -> None:
        """Computes the batch's tokens, and the next one of every request that has no more to compute."""
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
            None if len(last) == len(ids) else tensor(last, torch.long),
        )  # fmt: skip
        for request, count in batch:
            self._computed(request, count)
        if asked:
            highest, likeliest = (values.tolist() for values in logits.max(-1))
            for index, request in enumerate(asked):
                try:
                    if not math.isfinite(highest[index]):
                        raise FloatingPointError("model: expected finite logits, got NaN or infinity")
                    greedy = request.sampler.sampling.temperature == 0
                    self._advance(request, likeliest[index] if greedy else request.sampler.draw(logits[index].cpu()))
                except Exception as error:
                    self._fail(request, error)

    def _computed(self, request: Request, count: int) -> None:
        """Makes the blocks known that these tokens have filled."""
        first = request.computed // self._block
        request.computed += count
        if request.computed // self._block > first:
            request.keys = prefix_keys(request.root, request.tokens, self._block, request.keys)
        for index in range(first, request.computed // self._block):
            self._pool.learn(request.blocks[index], request.keys[index])

    def _advance(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        request.handle._give(token)
        if token in self._ends:
            self._finish(request, "end")
        elif request.stop and first_stop(self._tail(request), request.stop) is not None:
            self._finish(request, "stop")
        elif len(request.tokens) == request.limit:
            self._finish(request, "length")

    def _tail(self, request: Request) -> str:
        # A token is at least a byte and a character at most four: a stop string lies within so many last tokens.
        longest = 4 * max(map(len, request.stop)) + 8
        return self._policy.tokenizer.decode(request.answer[-longest:], skip_special_tokens=True)

    # ------------------------------------------------------------ ends

    def _leave(self, request: Request) -> None:
        """Takes a running request's row and blocks."""
        self._running.remove(request)
        self._pool.give_back(request.blocks)
        self._cache.assign(request.row, [])
        self._rows.append(request.row)
        request.blocks, request.computed, request.row = [], 0, -1

    def _finish(self, request: Request, reason: Reason) -> None:
        answer = request.answer
        text = None
        if self._policy.tokenizer is not None:
            text = self._policy.tokenizer.decode(answer, skip_special_tokens=True)
            at = first_stop(text, request.stop)
            text = text if at is None else text[:at]
        request.handle._result = Result(answer, text, reason, request.prompt_length, request.cached or 0)
        self._end(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        request.handle._error = error
        self._end(request)

    def _end(self, request: Request) -> None:
        if request in self._running:
            self._leave(request)
        request.held.close()
        request.handle._finished.set()
        request.handle._give(None)
        with self._state:
            self._open -= 1
            self._state.notify_all()

    # ------------------------------------------------------------ what a request stands on

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, Sequence):
            raise TypeError(f"prompt: expected a text, a chat or a list of token ids, got {prompt!r:.80}")
        if isinstance(prompt, str) or not all(isinstance(token, Integral) for token in prompt):
            if self._policy.tokenizer is None:
                raise ValueError("prompt: expected token ids, since this policy has no tokenizer; got a text or a chat")
            return prompt_ids(self._policy.tokenizer, told(prompt, self._policy.chat))  # type: ignore[arg-type]
        tokens = [int(token) for token in prompt if isinstance(token, Integral)]
        if not tokens:
            raise ValueError("prompt: expected at least one token, got an empty prompt")
        bad = [token for token in tokens if not 0 <= token < self._fused.vocabulary]
        if bad:
            raise ValueError(f"prompt: expected token ids in [0, {self._fused.vocabulary}), got {bad[0]}")
        return tokens

    def _hold(self, held: ExitStack, user: User, strength: float, namespace: str) -> tuple[int, bytes]:
        """The slot of the user's row, kept until `held` closes, and what the row's prefixes are known by."""
        users, bank = self._policy.users, self._policy.bank
        weights = {user: 1.0} if isinstance(user, str) else dict(user)
        if not weights:
            raise ValueError("user: expected at least one name, got none")
        for name, value in {"strength": strength, **weights}.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"user, strength: expected finite numbers, got {value!r} for {name!r}")
        if isinstance(user, str) and strength == 1.0:
            slot = int(held.enter_context(users.slots([user]))[0])
        else:
            row = users.blend({name: strength * weight for name, weight in weights.items()})
            with bank.take() as (slot,):
                bank.rows[slot] = row
            held.callback(bank.release, slot)
        row = bank.rows[slot].detach().cpu().contiguous()
        known_by = repr((namespace, sorted(weights.items()), strength)).encode() + b"\0"
        known_by += row.view(torch.uint8).numpy().tobytes()
        return slot, hashlib.blake2b(known_by, digest_size=16).digest()


def _end_tokens(policy: Steered) -> set[int]:
    config = getattr(policy.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = policy.model.config.get_text_config().eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
