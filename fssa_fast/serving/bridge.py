"""From the engine's thread to the event loop, without a thread for each stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial

from fssa_fast.generation import Handle


class Bridge:
    """Wakes those who wait in the event loop; a step of the engine costs one call into it, however many rows it has."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._woken: deque[asyncio.Event] = deque()
        self._called = False

    def wake(self, event: asyncio.Event) -> None:
        """Sets an event of the loop; from any thread."""
        self._woken.append(event)
        if not self._called:  # what is appended before the loop sets this to False, it finds
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._called = False
        while self._woken:
            self._woken.popleft().set()

    async def follow(self, handles: Sequence[Handle]) -> AsyncIterator[tuple[int, list[int], bool]]:
        """What requests get, as it comes: which of them, its new tokens, and whether it has ended."""
        ready = asyncio.Event()
        for handle in handles:
            handle.listen(partial(self.wake, ready))
        running = list(range(len(handles)))
        while running:
            await ready.wait()
            ready.clear()
            for index in list(running):
                tokens, ended = handles[index].take()
                if ended:
                    running.remove(index)
                if tokens or ended:
                    yield index, tokens, ended
