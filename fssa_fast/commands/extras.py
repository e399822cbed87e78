"""Extras of the package that a command needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Raises RuntimeError, saying what to install, where an import of the block's finds no such module."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fssa_fast":
            raise
        raise RuntimeError(f"{error.name}: not installed; pip install fssa-fast[{extra}]") from error
