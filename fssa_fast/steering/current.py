"""Which users a forward serves: those of its own task, thread and generator, and of nobody else's.

A `with` block that names users may be suspended in the middle: by an `await`, or by a `yield`. What names them is kept
in a context variable, so that every asyncio task and every thread has its own. A generator shares its caller's context,
so for a block in a generator there is one question more: whether the generator is running now. If it is suspended, the
forward is its caller's, who has not named these users.

What torch.compile traces can ask neither: it reads the thread's `OpenBlocks`. Of a block in a plain function, which
ends before anything else runs in its thread, that is right; in a block that can be suspended a compiled forward raises,
since it could serve somebody else's users.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("fssa_fast")


@dataclass(frozen=True)
class ActiveUsers:
    """The users of a forward: the rows [S, M] of a bank, and the slot of each batch row [B] or token [B, T]."""

    rows: Tensor
    slots: Tensor


class OpenBlocks(threading.local):
    """The blocks that this thread has entered and not left, in order."""

    def __init__(self) -> None:
        self.blocks: list[Serving] = []


class CurrentUsers:
    """Which users the forwards of one attached model serve; none is the base model."""

    def __init__(self) -> None:
        self.thread = OpenBlocks()

    def serve(self, users: ActiveUsers | None) -> Serving:
        """A `with` block whose forwards serve these users (None: the base model)."""
        return Serving(self, users)

    @property
    def users(self) -> ActiveUsers | None:
        """The users of a forward that runs here and now.

        Raises RuntimeError in a task or thread that was started in a block which has ended since; in a thread that took
        the context of a generator's block with it, and in a generator that goes on in another context than it entered
        its block in; and in compiled code where a block that can be suspended is open.
        """
        if torch.compiler.is_compiling():
            if not self.thread.blocks:
                return None
            innermost = self.thread.blocks[-1]
            if innermost.may_suspend:
                raise RuntimeError(
                    "users: expected a compiled forward to be called in a plain function's block, got one in a "
                    "coroutine's or a generator's; name the users by policy.forward or policy.generate"
                )
            return innermost.users
        found: Serving | None = None
        known = _OPEN.get()
        for serving in reversed(known):
            if found is not None and not found.around:
                break
            if serving.current is not self:
                continue
            if found is None:
                found = serving if serving.holds_here() else None
            elif serving in found.around and _running(serving.generator):
                found = serving
        for serving in tuple(_IN_GENERATORS):
            if serving.current is self and serving not in known and _running(serving.generator):
                raise RuntimeError(
                    "users: expected a generator to go on in the task and thread in which it entered its block, got "
                    "another one; run the whole of it in one"
                )
        return None if found is None else found.users

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentUsers:
        return memo.setdefault(id(self), CurrentUsers())


class Serving:
    """An open block: whose forwards it is about, and whom they serve."""

    def __init__(self, current: CurrentUsers, users: ActiveUsers | None) -> None:
        self.current, self.users = current, users
        self.ended = self.left_elsewhere = False
        self.generator: FrameType | None = None
        self.around: tuple[Serving, ...] = ()  # generators' blocks suspended at its beginning: what they do is theirs
        self.may_suspend = False
        self.entered_in: int | None = None  # the thread

    def __enter__(self) -> None:
        self._thread = self.current.thread.blocks
        self._thread.append(self)
        if not torch.compiler.is_compiling():
            self.generator, self.may_suspend = _suspends(sys._getframe(1))
            self.entered_in = threading.get_ident()
            before = _OPEN.get()
            self.around = tuple(one for one in before if one.generator is not None and not _running(one.generator))
            _OPEN.set((*before, self))
            if self.generator is not None:
                _IN_GENERATORS.add(self)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # By identity, not to the state before: blocks of tasks and generators end in any order.
        self._thread.remove(self)
        if torch.compiler.is_compiling():
            return
        _IN_GENERATORS.discard(self)
        self.ended, self.generator, self.around = True, None, ()
        before = _OPEN.get()
        _OPEN.set(tuple(serving for serving in before if serving is not self))
        self.left_elsewhere = self not in before  # as of a generator that was dropped, and is collected anywhere
        if self.left_elsewhere and error is None:
            raise RuntimeError(
                "users: expected the block to be left in the task and thread that entered it, got another one"
            )

    def holds_here(self) -> bool:
        """Whether a forward that runs now is the block's."""
        if self.left_elsewhere:
            return False
        if self.ended:  # a task or thread that was started within has outlived it; its rows may be somebody else's
            raise RuntimeError("users: expected a block that is open, got one that ended before this task or thread")
        if self.generator is None or _running(self.generator):
            return True
        if threading.get_ident() != self.entered_in:
            # The generator may be waiting for this thread, or be suspended: no thread can see the frames of another.
            raise RuntimeError(
                "users: expected a forward in the thread of the generator whose block it was started in, got one in "
                "another thread; name its users there, by policy.steer or policy.forward"
            )
        _say_once()
        return False


_OPEN: ContextVar[tuple[Serving, ...]] = ContextVar("fssa_open_blocks", default=())
_IN_GENERATORS: set[Serving] = set()  # the open blocks that lie in generators, in whichever context

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_ENTER_CONTEXT: tuple[CodeType, ...] = (
    contextlib.ExitStack.enter_context.__code__,
    contextlib.AsyncExitStack.enter_context.__code__,
)


def _suspends(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """The generator's frame that a block lies in, and whether the block can be suspended, by who enters it."""
    lent = False  # an ExitStack's blocks last as long as the stack, whoever holds it
    while frame is not None:
        by_contextlib = frame.f_globals.get("__name__") == "contextlib"
        back = frame.f_back
        if by_contextlib:
            lent = lent or frame.f_code in _ENTER_CONTEXT
        elif frame.f_code.co_flags & _SUSPENDABLE:
            # A context manager written as a generator is suspended while its block runs: the block is the caller's.
            if back is None or back.f_globals.get("__name__") != "contextlib":
                return frame, True
        elif frame.f_code.co_flags & inspect.CO_COROUTINE:
            return None, True
        elif not lent:
            return None, False
        frame = back
    return None, False


def _running(frame: FrameType | None) -> bool:
    """Whether a generator runs now, in this thread.

    The frames of another thread may end while they are looked at, under CPython's own feet: they are left alone.
    """
    here: FrameType | None = sys._getframe(1)
    while here is not None:
        if here is frame:
            return True
        here = here.f_back
    return False


_said = False


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        logger.warning(
            "a forward outside of a generator that is suspended within policy.steer is not steered by it; to lend the "
            "block to a caller, write it as a context manager (contextlib)"
        )
