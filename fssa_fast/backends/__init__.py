"""Which implementation of an op runs.

A backend is a module of this package with

    NAME                     "cpu", "triton", "cuda"
    DEVICES                  the device types whose tensors it takes when chosen automatically, in a set
    unavailable()            why it cannot run on this machine, or None
    IMPLEMENTATIONS          op name -> function with the op's arguments
    refuses(op, tensor)      why it cannot take this tensor (its dtype, its device), or None
    prefers(op, args)        False where what comes after it was measured to be faster

`reference` is the definition of each op, in fssa_fast/ops. The environment variable FSSA_BACKEND, or `use_backend` for
a block of code, chooses one by name: it then runs or raises BackendError. Left to itself ("auto") the registry takes
the first backend of the tensor's device that takes the call, or else the definition, and logs once why.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

logger = logging.getLogger("fssa_fast")

ORDER = ("cuda", "triton", "cpu")
NAMES = ("auto", "reference", *ORDER)

_references: dict[str, Callable[..., Any]] = {}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run."""


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise BackendError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


_chosen: ContextVar[str | None] = ContextVar("fssa_backend", default=None)


def chosen_backend() -> str:
    """The backend asked for: by `use_backend`, else by FSSA_BACKEND, else "auto"."""
    return _chosen.get() or _checked(os.environ.get("FSSA_BACKEND", "auto"), "FSSA_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called in this block, and in this thread, with the backend of that name."""
    token = _chosen.set(_checked(name, "name"))
    try:
        yield
    finally:
        _chosen.reset(token)


@cache
def load_backend(name: str) -> tuple[ModuleType | None, str | None]:
    """The backend's module and None, or None and why it is unavailable on this machine."""
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        return None, str(error)
    reason = module.unavailable()
    return (None, reason) if reason else (module, None)


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _first_tensor(args: Sequence[Any]) -> Tensor:
    first = args[0]
    return first if isinstance(first, Tensor) else first[0]


def _named(op: str, tensor: Tensor, name: str) -> Callable[..., Any]:
    module, reason = load_backend(name)
    if module is not None:
        reason = module.refuses(op, tensor)
        if reason is None:
            return module.IMPLEMENTATIONS[op]
    raise BackendError(f"backend {name!r} was asked for but cannot run {op}: {reason}")


def _automatic(op: str, args: Sequence[Any]) -> Callable[..., Any]:
    tensor = _first_tensor(args)
    reasons = []
    for name in ORDER:
        module, reason = load_backend(name)
        if module is None:
            if tensor.device.type in DEVICES_OF[name]:
                reasons.append(f"{name}: {reason}")
            continue
        if tensor.device.type not in module.DEVICES or op not in module.IMPLEMENTATIONS:
            continue
        reason = module.refuses(op, tensor)
        if reason is None:
            if module.prefers(op, args):
                return module.IMPLEMENTATIONS[op]
            continue
        reasons.append(f"{name}: {reason}")
    if reasons:
        _say_once(f"{op} runs by its plain PyTorch definition ({'; '.join(reasons)})")
    return _references[op]


DEVICES_OF = {"cuda": {"cuda"}, "triton": {"cuda"}, "cpu": {"cpu"}}


def register_op(
    library: torch.library.Library,
    op: str,
    reference: Callable[..., Any],
    check: Callable[..., None],
    fake: Callable[..., Any],
) -> None:
    """Registers the op `fssa::<op>`; the backend is chosen at every call.

    Args:
        library: that has the op's schema.
        reference: the definition.
        check: raises for arguments that no implementation may see. It runs here, once, for whoever calls the op, and
            reads no values: slots, choices and offsets are checked where they are used.
        fake: gives what the op gives, without contents, for meta tensors and torch.compile.
    """
    _references[op] = reference

    def run(*args: Any) -> Any:
        device = _first_tensor(args).device.type
        if torch.is_autocast_enabled(device):  # the dtypes were chosen where the op was called
            with torch.autocast(device, enabled=False):
                return run(*args)
        check(*args)
        name = chosen_backend()
        if name == "auto":
            return _automatic(op, args)(*args)
        if name == "reference":
            return _references[op](*args)
        return _named(op, _first_tensor(args), name)(*args)

    def run_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fssa::{op}", run_fake, lib=library)
    if not op.endswith("_"):
        torch.library.register_vmap(f"fssa::{op}", partial(_vmap, getattr(torch.ops.fssa, op)), lib=library)


def _vmap(op: Callable[..., Any], info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    """An op under torch.func.vmap: called once for every element of the dimension that is mapped over."""

    def element(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [element(v, d, index) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, index)

    results = [
        op(*(element(value, dim, index) for value, dim in zip(args, dims, strict=True)))
        for index in range(info.batch_size)
    ]
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *results)
    return stacked, tree_map(lambda _: 0, stacked)
