"""Requests to the engine: what one gets, the handle it is followed by, and what the engine keeps of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fssa_fast.generation.sampling import Sampler

Reason = Literal["end", "stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Result:
    """What a request got. `text` is None for a policy without tokenizer; it ends before the stop string that was met.

    reason: "end" (the model ended its answer), "stop" (a stop string), "length" (max_new_tokens), "cancelled",
    "deadline"; for the last two, what there was until then.
    prompt_tokens: how many the prompt has. cached_tokens: how many of these were found in the cache.
    """

    tokens: list[int]
    text: str | None
    reason: Reason
    prompt_tokens: int
    cached_tokens: int


class Driver(Protocol):
    """What a handle needs of the engine: without a thread of its own, who waits takes the steps."""

    background: bool

    def step(self) -> bool:
        """One step of all running requests; False if there was nothing to do."""

    def drive(self, until: threading.Event, timeout: float | None) -> None:
        """Takes steps until the event is set, the time is over, or there is nothing to do."""


class Handle:
    """A request under way. Its methods may be called from any thread."""

    def __init__(self, engine: Driver, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._engine, self._tokenizer, self.stop = engine, tokenizer, stop
        self._wake: Callable[[], None] | None = None
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
            while not self._engine.background and self._pieces.empty() and not self.done:
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
        tokens: list[int] = []
        given = 0
        held = max((len(stop) for stop in self.stop), default=1) - 1  # perhaps the beginning of a stop string
        for token in self:
            tokens.append(token)
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            end = len(text) - held
            if end > given and not text.endswith("\ufffd"):
                at = first_stop(text, self.stop)
                piece = text[given : end if at is None else min(end, at)]
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
    tokens: list[int]  # prompt and answer
    prompt_length: int
    limit: int  # of tokens in all
    slot: int
    root: bytes  # what the keys of its prefixes begin with
    sampler: Sampler
    stop: tuple[str, ...]
    deadline: float
    held: ExitStack  # what keeps the user's row as it is
    order: int
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cached: int | None = None  # tokens that were in the cache when it first began
    computed: int = 0  # tokens whose keys and values are in the cache

    @property
    def answer(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins."""
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return min(found, default=None)
