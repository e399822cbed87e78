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
import heapq
import itertools
import logging
import math
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from typing import Any, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from fssa_fast.arguments import check_count
from fssa_fast.generation.attached import AttachedModel
from fssa_fast.generation.fused import FusedModel
from fssa_fast.generation.grammars import Grammar, GrammarTokens
from fssa_fast.generation.prompts import Message, prompt_ids, told
from fssa_fast.generation.requests import Handle, Reason, Request, Result
from fssa_fast.generation.running import Batch, Running
from fssa_fast.generation.sampler import Sampler
from fssa_fast.generation.sampling import Sampling, SamplingOptions
from fssa_fast.generation.steered import Steered
from fssa_fast.generation.text import StopFinder, TextStream, decoded, first_stop
from fssa_fast.generation.waiting import QueueFull, Waiting
from fssa_fast.users.bank import BankFull

logger = logging.getLogger("fssa_fast")

Prompt = str | Sequence[Message] | Sequence[int]
User = str | Mapping[str, float]

MAX_STOPS, MAX_STOP_LENGTH = 16, 256


class EngineClosed(RuntimeError):
    """The engine has been closed, or belongs to the process that this one was forked from."""


class Engine:
    """Serves requests of many users in one batch. Made by `SteerablePolicy.engine`.

    Args:
        policy: whose users are served. fused: its fused form; or the attached one, which serves a row at a time.
        max_rows: how many requests run at once.
        max_tokens: tokens in the cache, of all requests together, rounded up to its blocks: of 32, or 256 with
            flash-attn.
        max_length: tokens of one request, prompt and answer; None: as many as the cache or the model has room for.
        max_waiting: how many requests may wait beside those that run. max_waiting_per_user: and how many of one user.
        step_tokens: at most so many tokens a step: prompts beyond it are computed in pieces while others decode.
        warm_up: whether graphs of the steps of every size are captured now, with progress shown in a terminal, instead
            of when the first step of a size comes. Only a GPU has them.
        ends: tokens that end an answer; None takes those of the model's generation configuration.
        background: True runs the steps in a thread of the engine's own, started by the first request. False runs
            them in the thread that calls `step`, `run`, or waits for a result.

    Submitting, cancelling and waiting are safe from any thread. Users whose requests wait take turns, in joining and
    in having their prompts computed. A request that fails gets the error, and the others go on; an error that leaves
    the device unusable ends all, and closes the engine. `close`, leaving a `with` block, or the interpreter's exit
    end the thread. In a process that is forked from the engine's every method raises EngineClosed.
    Raises: TypeError, ValueError for a number that is none or out of range.
    """

    def __init__(
        self,
        policy: Steered,
        fused: FusedModel | AttachedModel,
        *,
        max_rows: int = 32,
        max_tokens: int = 16384,
        max_length: int | None = None,
        max_waiting: int = 1024,
        max_waiting_per_user: int = 128,
        step_tokens: int = 256,
        warm_up: bool = True,
        ends: Collection[int] | None = None,
        background: bool = True,
    ) -> None:
        check_count("max_rows", max_rows)
        check_count("max_tokens", max_tokens)
        check_count("max_waiting", max_waiting)
        check_count("max_waiting_per_user", max_waiting_per_user)
        check_count("step_tokens", step_tokens)
        if step_tokens < max_rows:
            raise ValueError(f"step_tokens: expected at least max_rows, {max_rows}, got {step_tokens}")
        blocks = -(-max_tokens // fused.cache_block)
        room = min(fused.max_positions, blocks * fused.cache_block)
        self.max_length = room if max_length is None else max_length
        if not 0 < self.max_length <= room:
            raise ValueError(
                f"max_length: expected 1 to {room}, as the model's positions and max_tokens allow, got {max_length}"
            )
        self.max_rows, self.step_tokens, self.background = max_rows, step_tokens, background
        self._policy, self._fused = policy, fused
        self._cache: Any = fused.new_cache(max_rows, self.max_length, blocks)  # the form's own kind
        self._sampler = Sampler(max_rows, fused.vocabulary, self.max_length, fused.device)
        self._running = Running(self._cache, max_rows, step_tokens, fused.device, self._put_back, self._fail)
        self._ends = _end_tokens(policy) if ends is None else set(ends)
        self._grammars = GrammarTokens(policy.tokenizer, fused.vocabulary, sorted(self._ends))
        self._orders = itertools.count()
        self._state = threading.Condition()  # guards waiting, open, deadlines, closed, broken and the thread
        self._waiting = Waiting(max_waiting, max_waiting_per_user)
        self._open: dict[Handle, Request] = {}  # requests that have not ended
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._cancelled: deque[Handle] = deque()
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._broken: BaseException | None = None
        self.after_step: Callable[[float], object] | None = None
        """Called with the seconds of every step that computed something, in the thread that took it."""
        self._process = os.getpid()
        if warm_up:
            self._warm_up()
        _engines.add(self)

    def _warm_up(self) -> None:
        with self._fused.turn:
            captured = self._fused.warm_up(self._cache, self.max_rows, self.step_tokens)
            for _ in tqdm(captured, desc="capturing steps", unit="graph", disable=None, leave=False, delay=1):
                pass

    @property
    def preempted(self) -> int:
        """How often a request was put back for want of memory."""
        return self._running.preempted

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: closed, or broken for good."""
        return self._closed

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
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
        strength: float = 1.0,
        timeout: float | None = None,
        namespace: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> Handle:
        """Adds a request; it begins when there is room.

        Args:
            prompt: a text (told as `policy.chat` says), a chat, or token ids.
            user: a name, BASE, PRIOR, or a blend: names with weights. The row is kept as it is now until the request
                ends, whatever happens to the users meanwhile.
            max_new_tokens: None takes as many as fit.
            stop: at most 16 texts of at most 256 characters, the first of which to appear in the answer ends it.
            grammar: the form that the answer has: a JSON schema, a regular expression.
            strength: how strongly the user steers; 0 is the base model.
            timeout: seconds from now, after which the request ends with what there is.
            namespace: what others have computed is found again within the same one only.
            sampling: temperature, top_p, seed, logprobs, ...: the fields of `Sampling`, which says what they mean.

        Raises: UnknownUser; QueueFull, which says whether the engine's or the user's requests are too many;
            EngineClosed; BankFull where a blend or a strength finds no free row; TypeError, ValueError for an empty
            prompt, one that does not fit with its answer, a number out of range.
        """
        return self.submit_many(
            prompt, user, 1, max_new_tokens=max_new_tokens, stop=stop, grammar=grammar, strength=strength,
            timeout=timeout, namespace=namespace, **sampling,
        )[0]  # fmt: skip

    def submit_many(
        self,
        prompt: Prompt,
        user: User,
        n: int,
        *,
        max_new_tokens: int | None = 128,
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
        strength: float = 1.0,
        timeout: float | None = None,
        namespace: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> list[Handle]:
        """Adds n requests for answers to one prompt, all or none: arguments and errors are those of `submit`.

        Answer i has the seed `seed` + i. Whole blocks of the prompt (of 32 tokens) are computed once, by the first,
        and shared; what is left of the prompt, each computes for itself.
        """
        self.check_process()
        self._fused.check()
        check_count("n", n)
        if max_new_tokens is not None:
            check_count("max_new_tokens", max_new_tokens)
        stop = self._stops(stop)
        if timeout is not None and (not isinstance(timeout, Real) or math.isnan(timeout)):
            raise ValueError(f"timeout: expected a number of seconds, got {timeout!r}")
        chosen = Sampling(**sampling)
        chosen.check_tokens(self._fused.vocabulary)
        tokens = self._tokens(prompt)
        if max_new_tokens is None:
            max_new_tokens = max(1, self.max_length - len(tokens))
        if len(tokens) + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt: expected at most {self.max_length} tokens with the answer, "
                f"got {len(tokens)} and max_new_tokens={max_new_tokens}"
            )
        tokenizer = self._policy.tokenizer
        requests = []
        with ExitStack() as held:
            for index in range(n):
                own = held.enter_context(ExitStack())
                slot, root = self._hold(own, user, strength, namespace)
                requests.append(
                    Request(
                        handle=Handle(self, tokenizer, tuple(stop), chosen.logprobs is not None),
                        user=(user,) if isinstance(user, str) else tuple(sorted(user)),
                        tokens=list(tokens),
                        prompt_length=len(tokens),
                        limit=len(tokens) + max_new_tokens,
                        slot=slot,
                        root=root,
                        sampling=chosen,
                        seed=secrets.randbits(63) if chosen.seed is None else (chosen.seed + index) % (1 << 63),
                        matcher=None if grammar is None else self._grammars.matcher(grammar, chosen.allowed_tokens),
                        stop=tuple(stop),
                        text=(TextStream(tokenizer), StopFinder(stop)) if stop else None,
                        deadline=math.inf if timeout is None else time.monotonic() + timeout,
                        held=own,
                        order=next(self._orders),
                    )
                )
            self._enqueue(requests)
            held.pop_all()  # from here on each request lets its own row go
        return [request.handle for request in requests]

    def _enqueue(self, requests: Sequence[Request]) -> None:
        with self._state:
            self._check_open()
            self._waiting.check(requests[0].user, len(requests))
            if self.background and self._thread is None:
                thread = threading.Thread(target=self._loop, daemon=True, name="fssa-engine")
                thread.start()
                self._thread = thread
            for request in requests:
                self._waiting.add(request)
                self._open[request.handle] = request
                if request.deadline < math.inf:
                    heapq.heappush(self._deadlines, (request.deadline, request.order, request))
            self._state.notify_all()

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Result]:
        """Serves all of these, each the arguments of `submit`, and returns their results in order.

        More of them than may wait are submitted as others end. Raises what `submit` raises, or what a request failed
        of; the others are cancelled then.
        """
        self.check_process()
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

    def cancel(self, handle: Handle) -> None:
        """Ends a request at the next step; no effect on one that has ended."""
        self.check_process()
        self._cancelled.append(handle)

    def close(self) -> None:
        """Cancels what waits and runs, ends the thread, and lets the cache go."""
        self.check_process()
        with self._state:
            self._closed = True
            self._state.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping:
            self._end_all(lambda request: self._finish(request, "cancelled"))
            with self._fused.turn:
                self._fused.forget(self._cache)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_process(self) -> None:
        """Raises EngineClosed in a process that has been forked from the engine's: its thread is not there."""
        if os.getpid() != self._process:
            raise EngineClosed(
                f"engine: expected to be used in process {self._process}, which made it, got {os.getpid()}, forked "
                "from it; make an engine after the fork"
            )

    def _check_open(self) -> None:
        if self._broken is not None:
            raise EngineClosed(f"engine: expected an open one, got one closed by {self._broken!r}") from self._broken
        if self._closed:
            raise EngineClosed("engine: expected one that is open, got one that has been closed")

    # ------------------------------------------------------------ steps

    def step(self) -> bool:
        """One step of all running requests, after waiting ones have joined. False if there was nothing to do.

        Raises: torch.AcceleratorError, after which the engine is closed.
        """
        self.check_process()
        with self._stepping:
            began = time.perf_counter()
            self._drop()
            batch = None
            try:
                self._admit()
                if not len(self._running):
                    return False
                batch = self._running.plan()
                self._serve(batch)
            except torch.AcceleratorError as error:  # nothing on this device can be trusted any more
                self._break(error)
                raise
            except Exception as error:  # the requests of this step fail; the others go on
                for request in self._served(batch):
                    self._fail(request, error)
            if self.after_step is not None:
                self.after_step(time.perf_counter() - began)
            return True

    def _served(self, batch: Batch | None) -> list[Request]:
        if batch is None:
            return list(self._running)
        rows = [*batch.decoding.tolist(), *(request.row for request, _ in batch.pieces if request.row >= 0)]
        return [request for row in rows if (request := self._running.requests[row]) is not None]

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
            self._break(error)

    def _drop(self) -> None:
        """Ends what was cancelled or has run out of time."""
        while self._cancelled:
            request = self._open.get(self._cancelled.popleft())
            if request is not None:
                self._finish(request, "cancelled")
        if not self._deadlines:
            return
        late, now = [], time.monotonic()
        with self._state:
            while self._deadlines and self._deadlines[0][0] <= now:
                late.append(heapq.heappop(self._deadlines)[2])
            if len(self._deadlines) > 2 * len(self._open) + 64:  # most of them have ended long before
                self._deadlines = [entry for entry in self._deadlines if not entry[2].ended]
                heapq.heapify(self._deadlines)
        for request in late:
            if not request.ended:
                self._finish(request, "deadline")

    def _admit(self) -> None:
        """Lets waiting requests join, users in turn, as long as there are rows and blocks for them."""
        later: set[Request] = set()
        while self._waiting and not self._running.full:
            with self._state:
                request = self._waiting.first(later)
            if request is None:
                return
            try:
                met = self._running.admit(request)
                if met == "no room":
                    return
                if met == "later":
                    later.add(request)
                    continue
                with self._state:
                    self._waiting.take(request)
                self._sampler.assign(
                    request.row, request.sampling, request.seed, request.tokens, request.prompt_length,
                    request.matcher is not None,
                )  # fmt: skip
            except torch.AcceleratorError:
                raise
            except Exception as error:
                self._fail(request, error)

    def _put_back(self, request: Request) -> None:
        with self._state:
            self._waiting.put_back(request)

    def _serve(self, batch: Batch) -> None:
        """Computes the batch's tokens, and the next one of every request that has no more to compute."""
        if not len(batch.decoding) and not batch.pieces:
            return
        with self._fused.turn:  # other engines of this policy have the same buffers, and the logits are in them
            logits = self._fused.forward(*batch.tokens, self._cache, batch.indices)
            self._running.computed(batch)
            tokens = self._draw(batch, logits) if len(batch.asked) else []
        requests = self._running.requests
        for row, token in zip(batch.asked.tolist(), tokens, strict=True):
            request = requests[row]
            if request is None:
                continue
            try:
                self._advance(request, token)
            except Exception as error:
                self._fail(request, error)

    def _draw(self, batch: Batch, logits: Tensor) -> list[int]:
        """The next token of every row that is asked for one, and its logprobs."""
        requests, rows = self._running.requests, batch.asked
        for row in self._sampler.followed(rows):
            request = requests[row]
            assert request is not None and request.matcher is not None
            try:
                self._sampler.mask(row, request.matcher.mask())
            except Exception as error:
                self._fail(request, error)
        tokens = self._sampler.sample(logits, rows, batch.positions)
        self._running.next_ids[rows] = tokens
        asked = rows.tolist()
        for index, logprobs in self._sampler.logprobs(logits, rows, tokens):
            request = requests[asked[index]]
            if request is not None and request.handle.logprobs is not None:
                request.handle.logprobs.append(logprobs)
        return tokens

    def _advance(self, request: Request, token: int) -> None:
        if token < 0:
            raise FloatingPointError("model: expected finite logits, got NaN or infinity")
        request.tokens.append(token)
        request.handle._give(token)
        if token in self._ends:
            self._finish(request, "end")
        elif request.text is not None and self._stopped(*request.text, token):
            self._finish(request, "stop")
        elif request.matcher is not None and not request.matcher.take(token):
            self._finish(request, "end")
        elif len(request.tokens) == request.limit:
            self._finish(request, "length")

    @staticmethod
    def _stopped(stream: TextStream, finder: StopFinder, token: int) -> bool:
        finder.add(stream.add(token))
        return finder.found

    # ------------------------------------------------------------ ends

    def _finish(self, request: Request, reason: Reason) -> None:
        answer, text = request.answer, None
        try:
            if self._policy.tokenizer is not None:
                text = decoded(self._policy.tokenizer, answer)
                at = first_stop(text, request.stop)
                text = text if at is None else text[:at]
        except Exception as error:
            self._fail(request, error)
            return
        request.handle._result = Result(
            answer, text, reason, request.prompt_length, request.cached or 0, request.handle.logprobs
        )
        self._end(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        request.handle._error = error
        self._end(request)

    def _end(self, request: Request) -> None:
        """Lets go what a request holds, and tells who waits for it; whatever fails of it, the rest is done."""
        if request.ended:
            return
        request.ended = True
        try:
            if request.row >= 0:
                self._running.leave(request)
            with self._state:
                self._waiting.discard(request)
                self._open.pop(request.handle, None)
                self._state.notify_all()
            request.held.close()
        except Exception:
            logger.exception("a request has ended, but not all that it held could be let go")
        finally:
            request.handle._finished.set()
            try:
                request.handle._give(None)
            except Exception:
                logger.exception("a request has ended, but who listens to it could not be told")

    def _end_all(self, end: Callable[[Request], None]) -> None:
        with self._state:
            requests = list(self._open.values())
        for request in requests:
            end(request)

    def _break(self, error: BaseException) -> None:
        """Closes the engine for good: everybody gets the error."""
        with self._state:
            self._closed, self._broken = True, error
            self._state.notify_all()
        self._end_all(lambda request: self._fail(request, error))
        logger.critical("the engine is closed, since it cannot go on: %r", error, exc_info=error)

    # ------------------------------------------------------------ what a request stands on

    def _stops(self, stop: Sequence[str]) -> tuple[str, ...]:
        if (
            not isinstance(stop, Sequence)
            or isinstance(stop, str)
            or len(stop) > MAX_STOPS
            or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stop)
        ):
            raise ValueError(
                f"stop: expected a list of at most {MAX_STOPS} texts, none of them empty, none of more than "
                f"{MAX_STOP_LENGTH} characters, got {stop!r:.80}"
            )
        if stop and self._policy.tokenizer is None:
            raise ValueError("stop: expected none, since this policy has no tokenizer")
        return tuple(stop)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise TypeError(f"prompt: expected a text, a chat or a list of token ids, got {prompt!r:.80}")
        if isinstance(prompt, str) or not all(
            isinstance(token, Integral) and not isinstance(token, bool) for token in prompt
        ):
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


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_all() -> None:
    for engine in list(_engines):
        if engine._process == os.getpid():
            engine.close()


# A thread that is in native code when the interpreter goes ends in an abort. This is called before that, and before
# threads are waited for; atexit's functions would come after.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
