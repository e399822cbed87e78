"""What one call may bring, and the errors for what it may not: names, texts, choices and numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import TypeGuard

from fssa_fast.users.choices import Choice

NAME_CHARACTERS = 512
"""The longest name of a user."""
TEXT_CHARACTERS = 65_536
"""The longest text of an option, and of a prompt."""
CHOICES = 10_000
"""The most choices of one user in one call."""


def is_storable(text: object) -> TypeGuard[str]:
    """Whether this is a text without what databases cannot hold: lone surrogates and NUL."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def check_name(name: object) -> None:
    """Raises ValueError for what cannot be a new user's name."""
    if not isinstance(name, str) or not name or name.startswith("__"):
        raise ValueError(f"name: expected a text that does not begin with two underscores, got {name!r:.80}")
    _check_text("name", name, NAME_CHARACTERS)


def check_choices(choices: Sequence[Choice]) -> None:
    """Raises ValueError for too many choices, or a text that is too long or that no database holds."""
    if len(choices) > CHOICES:
        raise ValueError(f"choices: expected at most {CHOICES:,} a call, got {len(choices):,}")
    for k, choice in enumerate(choices):
        for field in ("prompt", "chosen", "rejected"):
            value = getattr(choice, field)
            if isinstance(value, str):
                _check_text(f"choices[{k}].{field}", value, TEXT_CHARACTERS)


def finite(argument: str, value: float) -> float:
    """The number as a float. Raises ValueError for what is none, or that no float holds."""
    largest = sys.float_info.max
    if isinstance(value, bool) or not isinstance(value, Real) or not -largest <= value <= largest:
        # Python does not write integers of more than some thousand digits.
        if isinstance(value, int) and value.bit_length() > 1024:
            raise ValueError(f"{argument}: expected a finite number, got an integer of {value.bit_length()} bits")
        raise ValueError(f"{argument}: expected a finite number, got {value!r:.80}")
    return float(value)


def _check_text(argument: str, text: str, most: int) -> None:
    if len(text) > most:
        raise ValueError(f"{argument}: expected at most {most:,} characters, got {len(text):,}")
    if not is_storable(text):
        raise ValueError(f"{argument}: expected text without NUL and lone surrogates, got {text!a:.80}")
