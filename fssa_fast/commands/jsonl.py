"""Files of JSON lines, read with the line named where something is wrong, and choices as lines hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fssa_fast.users.choices import Choice
    from fssa_fast.users.store import Option


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, a line each, with where they stand; empty lines are left out.

    Raises DataError for a line that is no JSON object.
    """
    from fssa_fast.data.lines import json_lines

    for number, found in json_lines(path):
        yield f"{path}, line {number}", found


def check_keys(where: str, found: Mapping[str, Any], required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raises ValueError for a key that is missing or not known."""
    for name in sorted(required - found.keys()):
        raise ValueError(f"{where}: expected a {name!r}, got {sorted(found)}")
    for name in sorted(found.keys() - required - optional):
        raise ValueError(f"{where}: expected keys of {sorted(required | optional)}, got {name!r}")


def choice_of(where: str, found: Any, user: str | None = None) -> Choice:
    """A choice from {"chosen", "rejected"} and perhaps "prompt": texts, or embeddings as lists of numbers.

    A line of a file for training may also say its "user", who is to be `user` then, and a "group".
    """
    import torch

    from fssa_fast.users.choices import Choice

    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a choice as an object, got {found!r:.80}")
    check_keys(where, found, {"chosen", "rejected"}, {"prompt", "group"} | ({"user"} if user is not None else set()))
    if found.get("user", user) != user:
        raise ValueError(f"{where}: expected choices of user {user!r}, got one of {found['user']!r:.80}")
    try:
        sides = [side if isinstance(side, str) else torch.tensor(side).float() for side in _sides(found)]
        return Choice(sides[0], sides[1], found.get("prompt", ""))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last two: of numbers, and of nesting
        raise ValueError(f"{where}: {error}") from error


def _sides(found: Mapping[str, Any]) -> tuple[Any, Any]:
    return found["chosen"], found["rejected"]


def object_of(chosen: Option, rejected: Option) -> dict[str, Any]:
    """What `choice_of` reads: texts where both sides were texts, else embeddings."""
    if chosen.text is not None and rejected.text is not None:
        return {"prompt": chosen.prompt, "chosen": chosen.text, "rejected": rejected.text}
    return {"chosen": chosen.embedding.tolist(), "rejected": rejected.embedding.tolist()}
