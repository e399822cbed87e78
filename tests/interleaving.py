"""Triton's interpreter with a launch's programs interleaved: which of them goes on is drawn at every access to memory.

By itself the interpreter runs them one after the other, so that what one leaves for another is always there. Here they
run as on a GPU: begun in any order, so many at a time, and held up anywhere.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw")


class _Program(threading.Thread):
    def __init__(self, launch: _Launch, index: tuple[int, int, int]) -> None:
        super().__init__(daemon=True)
        self.launch, self.index, self.turn = launch, index, threading.Semaphore(0)

    def run(self) -> None:
        try:
            self.pause()
            self.launch.body()
        except Exception as error:
            self.launch.fail(error)
        self.launch.ended(self)

    def pause(self) -> None:
        """Until it is this program's turn."""
        self.turn.acquire()
        if self.launch.error:
            raise self.launch.error
        BUILDER.grid_idx = self.index


class _Launch:
    def __init__(self, body: Callable[[], None], indices: list[tuple[int, int, int]], resident: int, seed: int) -> None:
        self.body, self.draw, self.accesses_left = body, random.Random(seed), 200_000
        self.error: Exception | None = None
        self.over = threading.Event()
        self.waiting = [_Program(self, index) for index in indices]
        self.draw.shuffle(self.waiting)
        self.running: list[_Program] = []
        for _ in range(min(resident, len(indices))):
            self.begin()

    def begin(self) -> None:
        self.running.append(self.waiting.pop())
        self.running[-1].start()

    def go_on(self) -> None:
        self.draw.choice(self.running).turn.release()

    def access(self) -> None:
        """Called by the program that runs: another one may go on before it does."""
        self.accesses_left -= 1
        if not self.accesses_left:
            raise RuntimeError("the programs wait for each other")
        here = threading.current_thread()
        assert isinstance(here, _Program)
        self.go_on()
        here.pause()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.waiting.clear()

    def ended(self, program: _Program) -> None:
        self.running.remove(program)
        if self.waiting:
            self.begin()
        if self.running:
            self.go_on()
        else:
            self.over.set()


@contextmanager
def interleaved(seed: int, resident: int) -> Iterator[None]:
    """Launches in this block run so: at most `resident` programs of one at a time. Errors are those of a program."""
    launches: list[_Launch] = []  # the one under way, if any

    def accessed(access: Callable[..., Any]) -> Callable[..., Any]:
        def after_others(*args: Any) -> Any:
            if launches:
                launches[0].access()
            return access(*args)

        return after_others

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        body, indices = executor.fn, []

        def collect(**arguments: Any) -> None:
            """Stands in for each program, and runs them all in place of the last."""
            indices.append(BUILDER.grid_idx)
            if len(indices) < math.prod(BUILDER.grid_dim):
                return
            launches.append(_Launch(lambda: body(**arguments), indices, resident, seed))
            launches[0].go_on()
            launches[0].over.wait()
            error = launches.pop().error
            if error:
                raise error

        def set_grid_dim(*grid: int) -> None:
            begin_grid(*grid)
            executor.fn = collect  # the arguments have been matched with the kernel's own

        begin_grid = BUILDER.set_grid_dim
        with mock.patch.object(BUILDER, "set_grid_dim", set_grid_dim):
            try:
                run(executor, *args, **kwargs)
            finally:
                executor.fn = body

    run = interpreter.GridExecutor.__call__
    with mock.patch.object(interpreter.GridExecutor, "__call__", launch):
        with mock.patch.multiple(BUILDER, **{name: accessed(getattr(BUILDER, name)) for name in ACCESSES}):
            yield
