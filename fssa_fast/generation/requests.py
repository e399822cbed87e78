"""Requests to the engine: what one gets, the handle it is followed by, and what the engine keeps of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fssa_fast.generation.grammars import Matcher
from fssa_fast.generation.sampler import TokenLogprobs
from fssa_fast.generation.sampling import Sampling
from fssa_fast.generation.text import StopFinder, TextStream

Reason = Literal["end", "stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Result:
    """What a request got. `text` is None for a policy without tokenizer; it ends before the stop string that was met.

    reason: "end" (the model ended its answer, or its grammar allows no more), "stop" (a stop string), "length"
        (max_new_tokens), "cancelled", "deadline"; for the last two, what there was until then.
    prompt_tokens: how many the prompt has. cached_tokens: how many of these were found in the cache.
    logprobs: one for each token, where the request asked for them.
    """

    tokens: list[int]
    text: str | None
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None


class Driver(Protocol):
    """What a handle needs of the engine: without a thread of its own, who waits takes the steps."""

    background: bool

    def cancel(self, handle: Handle) -> None:
        """Ends a request at the next step."""

    def check_process(self) -> None:
        """Raises EngineClosed in a process that has been forked from the engine's."""

    def step(self) -> bool:
        """One step of all running requests; False if there was nothing to do."""

    def drive(self, until: threading.Event, timeout: float | None) -> None:
        """Takes steps until the event is set, the time is over, or there is nothing to do."""


class Handle:
    """A request under way. Its methods may be called from any thread.

    `logprobs`: one for each token so far, where the request asked for them: a token's is there before the token comes.
    """

    def __init__(self, engine: Driver, tokenizer: Any, stop: tuple[str, ...], logprobs: bool) -> None:
        self._engine, self._tokenizer, self.stop = engine, tokenizer, stop
        self.logprobs: list[TokenLogprobs] | None = [] if logprobs else None
        self._wake: Callable[[], None] | None = None
        self._pieces: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._finished = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        self._engine.check_process()
        return self._finished.is_set()

    def cancel(self) -> None:
        """Ends the request at the next step; no effect on one that has ended."""
        self._engine.cancel(self)

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end, at most `timeout` seconds. Raises what the request failed of; TimeoutError."""
        if not self.done and not self._engine.background:
            self._engine.drive(self._finished, timeout)
        if not self._finished.wait(timeout):
            raise TimeoutError(f"request: not finished within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def listen(self, wake: Callable[[], None]) -> None:
        """Calls `wake` now and whenever something has come that `take` gives: at once, in the engine's thread."""
        self._wake = wake
        wake()

    def take(self) -> tuple[list[int], bool]:
        """The tokens that have come since the last call, and whether they are the last; does not wait.

        In place of iterating, for whoever cannot spare a thread to wait in.
        """
        tokens: list[int] = []
        with suppress(queue.Empty):
            while (token := self._pieces.get_nowait()) is not None:
                tokens.append(token)
            return tokens, True
        return tokens, False

    def _give(self, token: int | None) -> None:
        """The engine's: a token that has come, or None for the end."""
        self._pieces.put(token)
        if self._wake is not None:
            self._wake()

    def __iter__(self) -> Iterator[int]:
        """The tokens as they come; once. Raises what the request failed of."""
        while True:
            while self._pieces.empty() and not self.done and not self._engine.background:
                self._engine.step()
            token = self._pieces.get()
            if token is None:
                break
            yield token
        self.result()

    def text(self) -> Iterator[str]:
        """The text as it comes, in pieces of whole characters; once. Raises what the request failed of."""
        if self._tokenizer is None:
            raise ValueError("text: expected a policy with a tokenizer; this one was made without")
        stream, stop, given = TextStream(self._tokenizer), StopFinder(self.stop), 0
        for token in self:
            piece = "" if stop.found else stop.add(stream.add(token))
            given += len(piece)
            if piece:
                yield piece
        rest = (self.result().text or "")[given:]
        if rest:
            yield rest


@dataclass(eq=False)
class Request:
    """A request as the engine sees it: what was asked for, and, while it runs, its row and blocks of the cache."""

    handle: Handle
    user: tuple[str, ...]  # who takes turns with others: a name, or a blend's names
    tokens: list[int]  # prompt and answer
    prompt_length: int
    limit: int  # of tokens in all
    slot: int
    root: bytes  # what the keys of its prefixes begin with
    sampling: Sampling
    seed: int
    matcher: Matcher | None
    stop: tuple[str, ...]
    text: tuple[TextStream, StopFinder] | None  # where there are stop strings
    deadline: float
    held: ExitStack  # what keeps the user's row as it is
    order: int
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0  # tokens of a prompt whose keys and values are in the cache
    cached: int | None = None  # tokens that were in the cache when it first began
    promised: set[bytes] = field(default_factory=set)  # keys of blocks that others wait for
    ended: bool = False

    @property
    def answer(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]
