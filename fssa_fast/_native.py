"""The native module fssa_fast._C, or why it cannot be had."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def load_native() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and the reason."""
    try:
        return importlib.import_module("fssa_fast._C"), None
    except ImportError as error:
        return None, (
            f"the native module could not be imported ({error}); `pip install .` in a checkout builds it, "
            "with a C++17 compiler"
        )
