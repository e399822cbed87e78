"""Files of choices: JSON lines, each a user's choice between two texts or two vectors of features.

    {"user": "ann", "prompt": "Eggs?", "chosen": "Boil them.", "rejected": "There are many ways ...", "group": "eggs"}

`prompt` and `group` may be left out. Options of one line with a group belong to that group; without, each option is a
group of its own. A context and its targets share no group, so an option may not be in two.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fssa_fast.data.groups import splittable
from fssa_fast.data.lines import DataError, json_lines

if TYPE_CHECKING:
    from torch import Tensor

    from fssa_fast.data.choices import ChoiceData

KEYS = ("user", "prompt", "chosen", "rejected", "group")
Option = str | tuple[float, ...]
Embed = Callable[[Sequence[tuple[str, str]]], "Tensor"]


@dataclass(frozen=True)
class Choice:
    """A line of a file of choices; `line` is where."""

    user: str
    chosen: Option
    rejected: Option
    prompt: str = ""
    group: str | None = None
    line: int = 0


def read_choices(path: str | os.PathLike[str]) -> list[Choice]:
    """The choices of a file, checked one by one.

    Raises DataError for an unknown or missing key, a tie (an option and itself), an empty or a non-finite option,
    options of different kinds or widths, and an option in two groups.
    """
    found: list[Choice] = []
    groups: dict[tuple[str, Option], tuple[str | None, int]] = {}
    width: int | None = None
    for number, content in json_lines(path):
        where = f"{path}, line {number}"
        for key in content:
            if key not in KEYS:
                raise DataError(f"{where}: unknown key {key!r}; expected some of {list(KEYS)}")
        for key in ("user", "chosen", "rejected"):
            if content.get(key) in (None, "", []):
                raise DataError(f"{where}: {key!r} is missing")
        for key in ("user", "prompt", "group"):
            if key in content and not isinstance(content[key], str):
                raise DataError(f"{where}: {key!r}: expected a text, got {content[key]!r}")
        chosen, rejected = (_option(where, key, content[key]) for key in ("chosen", "rejected"))
        choice = Choice(content["user"], chosen, rejected, content.get("prompt", ""), content.get("group"), number)
        if choice.chosen == choice.rejected:
            raise DataError(f"{where}: a tie: expected two different options, got one and itself")
        for option in (choice.chosen, choice.rejected):
            size = len(option) if isinstance(option, tuple) else 0
            width = size if width is None else width
            if size != width:
                kinds = [f"{n} features" if n else "a text" for n in (width, size)]
                raise DataError(f"{where}: expected {kinds[0]}, as before, got {kinds[1]}")
            known = groups.setdefault((choice.prompt, option), (choice.group, number))
            if known[0] != choice.group:
                raise DataError(
                    f"{where}: expected group {known[0]!r} for an option that is in it in line {known[1]}, got "
                    f"{choice.group!r}: a context could hold what its targets ask"
                )
        found.append(choice)
    if not found:
        raise DataError(f"{path}: expected choices, got none")
    return found


def _option(where: str, key: str, value: Any) -> Option:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(x) in (int, float) for x in value):
        try:
            numbers = tuple(float(x) for x in value)
        except OverflowError:  # an integer of hundreds of digits
            numbers = (math.inf,)
        if all(math.isfinite(x) for x in numbers):
            return numbers
    raise DataError(f"{where}: {key!r}: expected a text or a list of finite numbers, got {str(value)[:80]}")


def choice_data(
    choices: Sequence[Choice], embed: Embed | None = None, *, path: str | os.PathLike[str] = "choices"
) -> ChoiceData:
    """The choices as arrays; `embed` turns (prompt, text) pairs into embeddings [n, E].

    Raises DataError for texts without `embed`, and for users of whose choices none can be predicted from another.
    """
    import torch

    from fssa_fast.data.choices import ChoiceData

    alone = unsplittable(choices)
    if alone:
        first = next(choice for choice in choices if choice.user == alone[0])
        raise DataError(
            f"{path}, line {first.line}: expected choices of two groups or more of every user, got {len(alone)} users "
            f"of whose choices none can be predicted from another: {', '.join(map(repr, alone[:5]))}"
            f"{', ...' if len(alone) > 5 else ''}; fssa data make-choices leaves them out"
        )
    numbers, groups, by_user = _numbered(choices)
    texts = [(prompt, option) for prompt, option in numbers if isinstance(option, str)]
    if texts and embed is None:
        raise DataError(f"{path}: expected features, since no embedder was named; got texts")
    if texts and embed is not None:
        options = embed(texts).float().cpu()
    else:
        options = torch.tensor([option for _, option in numbers], dtype=torch.float32)
    return ChoiceData(options, groups, tuple(by_user), tuple(by_user.values()))


def unsplittable(choices: Sequence[Choice]) -> list[str]:
    """The users of whose choices none can be predicted from another, since all share a group."""
    if not choices:
        return []
    _, groups, by_user = _numbered(choices)
    kept = set(splittable(groups, tuple(by_user.values())))
    return [user for i, user in enumerate(by_user) if i not in kept]


def _numbered(
    choices: Sequence[Choice],
) -> tuple[dict[tuple[str, Option], int], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Numbers of the options, (prompt, option); the group of each; and of each user the choices, by number."""
    numbers: dict[tuple[str, Option], int] = {}
    groups: dict[tuple[str, Any], int] = {}
    of_option: list[int] = []
    by_user: dict[str, list[tuple[int, int]]] = {}
    for choice in choices:
        pair = []
        for option in (choice.chosen, choice.rejected):
            key = (choice.prompt, option)
            if key not in numbers:
                numbers[key] = len(numbers)
                name = ("group", choice.group) if choice.group is not None else ("option", key)
                of_option.append(groups.setdefault(name, len(groups)))
            pair.append(numbers[key])
        by_user.setdefault(choice.user, []).append((pair[0], pair[1]))
    arrays = {user: np.array(own, dtype=np.int64) for user, own in by_user.items()}
    return numbers, np.array(of_option, dtype=np.int64), arrays


def write_choices(path: str | os.PathLike[str], choices: Sequence[Choice]) -> None:
    """Writes a file of choices."""
    with Path(path).open("w", encoding="utf-8") as file:
        for choice in choices:
            content: dict[str, Any] = {"user": choice.user, "chosen": choice.chosen, "rejected": choice.rejected}
            content |= {"prompt": choice.prompt} if choice.prompt else {}
            content |= {} if choice.group is None else {"group": choice.group}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
