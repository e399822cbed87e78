"""From ratings, votes, rankings or pairs, in CSV, JSON lines or a Hugging Face dataset, to a file of choices."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fssa_fast.data.files import Choice, Option, read_choices, unsplittable, write_choices
from fssa_fast.data.lines import DataError, json_lines, text_lines
from fssa_fast.records import file_hash, versions, write_json

Kind = Literal["ratings", "votes", "rankings", "pairs"]
MISSING = ("", "na", "nan", "none", "null")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called.

    user: who. item: what was rated, voted on or ranked; value: how. For pairs: chosen and rejected.
    prompt, group: optional columns, as in a file of choices.
    """

    user: str = "user"
    item: str = "item"
    value: str = "value"
    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str | None = None
    group: str | None = None


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their line numbers: a .csv or .jsonl file, or a Hugging Face dataset's directory."""
    if Path(path).is_dir():
        yield from enumerate(_dataset(path), start=1)
        return
    if Path(path).suffix == ".jsonl":
        yield from json_lines(path)
        return
    if Path(path).suffix != ".csv":
        raise DataError(f"{path}: expected a file whose name ends in .csv or .jsonl, or the directory of a dataset")
    reader = csv.DictReader(line for _, line in text_lines(path))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a field of more than 131,072 characters, a line that ends in a quotation
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from error
        if None in row or None in row.values():
            raise DataError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} fields")
        yield reader.line_num, row


def _dataset(path: str | os.PathLike[str]) -> Any:
    """A dataset that its `save_to_disk` wrote."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: expected the package datasets to read this: pip install 'fssa-fast[data]'") from error
    try:
        found = datasets.load_from_disk(os.fspath(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path}: expected a directory written by a dataset's save_to_disk: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"{path}: expected one split, the directory of {' or '.join(map(repr, found))} within it")
    return found


def read_items(path: str | os.PathLike[str], name: str = "item", text: str | None = None) -> dict[str, Option]:
    """What items are, by name: a table with a column `name` and either a column `text`, or features in all others."""
    found: dict[str, Option] = {}
    for line, row in read_rows(path):
        where = f"{path}, line {line}"
        item = _text(where, row, name)
        if item in found:
            raise DataError(f"{where}: {name!r}: expected each item once, got {item!r} again")
        if text is not None:
            found[item] = _text(where, row, text)
        else:
            found[item] = tuple(_number(where, row, column) for column in row if column != name)
    return found


def make_choices(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    kind: Kind,
    *,
    columns: Columns | None = None,
    items: Mapping[str, Option] | None = None,
    margin: float = 0.0,
    max_pairs: int | None = None,
    min_choices: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes choices.jsonl, and choices.json that says how it was made, into `directory`; returns the latter.

    Of ratings and votes, a user prefers the item of the larger value, of rankings that of the smaller. Equal values
    are no choice. Votes are numbers: above 0 for, below 0 against, 0 is no vote.

    Args:
        source: the table. kind: what it holds. columns: its columns' names.
        items: what items are, by name, where the table has names only. None: an item is its text.
        margin: values must differ by more than it.
        max_pairs: at most so many choices of a user, drawn from the seed.
        min_choices: users with fewer choices are left out.

    Users left out are in choices.json, by the reason: who rated one thing or all alike, who has too few choices, and of
    whose choices none can be predicted from another, since they share an option or a group.

    Raises: DataError naming file and line: a missing value, an unknown item, two values of one item by one user, pairs
        that are ties; and where nothing is left.
    """
    names = columns or Columns()
    if kind == "pairs":
        found = list(_pairs(source, names, items))
        seen = {choice.user: None for choice in found}
    else:
        found, seen = _compared(source, kind, names, items, margin)
    by_user: dict[str, list[Choice]] = {}
    for choice in found:
        by_user.setdefault(choice.user, []).append(choice)
    rng = np.random.default_rng(seed)
    kept: list[Choice] = []
    few = sorted(user for user, own in by_user.items() if len(own) < min_choices)
    for own in by_user.values():
        if len(own) < min_choices:
            continue
        if max_pairs is not None and len(own) > max_pairs:
            own = [own[i] for i in sorted(rng.permutation(len(own))[:max_pairs])]
        kept += own
    alone = set(unsplittable(kept)) if kept else set()
    kept = [choice for choice in kept if choice.user not in alone]
    left_out = {
        "no two things rated differently": sorted(set(seen) - set(by_user)),
        f"fewer than {min_choices} choices": few,
        "no choice that can be predicted from another": sorted(alone),
    }
    if not kept:
        reasons = ", ".join(f"{len(users)} with {reason}" for reason, users in left_out.items() if users)
        raise DataError(f"{source}: expected users whose choices can be learnt from, got none; {reasons or 'no rows'}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "choices.jsonl"
    write_choices(path, kept)
    read_choices(path)  # the checks against leaks
    record = {
        "version": 1,
        "source": {"name": Path(source).name, "sha256": file_hash(source), "kind": kind},
        "choices": {"name": path.name, "sha256": file_hash(path), "count": len(kept)},
        "users": len({choice.user for choice in kept}),
        "users left out": left_out,
        "margin": margin,
        "max_pairs": max_pairs,
        "min_choices": min_choices,
        "seed": seed,
        "environment": versions(),
    }
    write_json(folder / "choices.json", record)
    return record


def _pairs(source: Any, names: Columns, items: Mapping[str, Option] | None) -> Iterator[Choice]:
    for line, row in read_rows(source):
        where = f"{source}, line {line}"
        chosen, rejected = (_item(where, _text(where, row, c), items) for c in (names.chosen, names.rejected))
        if chosen == rejected:
            raise DataError(f"{where}: a tie: expected two different options, got one and itself")
        yield Choice(_text(where, row, names.user), chosen, rejected, *_labels(where, row, names), line)


def _compared(
    source: Any, kind: Kind, names: Columns, items: Mapping[str, Option] | None, margin: float
) -> tuple[list[Choice], dict[str, None]]:
    """The choices, and all users there are."""
    values: dict[tuple[str, str, str | None], dict[Option, tuple[float, int]]] = {}
    for line, row in read_rows(source):
        where = f"{source}, line {line}"
        user, item = _text(where, row, names.user), _item(where, _text(where, row, names.item), items)
        value = _number(where, row, names.value)
        own = values.setdefault((user, *_labels(where, row, names)), {})
        if item in own:
            raise DataError(f"{where}: expected each item once a user, got it again (before: line {own[item][1]})")
        own[item] = (-value if kind == "rankings" else float(np.sign(value)) if kind == "votes" else value, line)
    found = []
    for (user, prompt, group), own in values.items():
        cast = {item: v for item, v in own.items() if kind != "votes" or v[0]}
        for (a, (x, line)), (b, (y, _)) in combinations(cast.items(), 2):
            if abs(x - y) > margin:
                chosen, rejected = (a, b) if x > y else (b, a)
                found.append(Choice(user, chosen, rejected, prompt, group, line))
    return found, {user: None for user, _, _ in values}


def _labels(where: str, row: Mapping[str, Any], names: Columns) -> tuple[str, str | None]:
    prompt = "" if names.prompt is None else _text(where, row, names.prompt)
    return prompt, None if names.group is None else _text(where, row, names.group)


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise DataError(f"{where}: column {column!r} is missing; there are {sorted(row)}")
    value = row[column]
    text = "" if value is None else str(value)
    if not text.strip():
        raise DataError(f"{where}: {column!r}: expected a value, got none")
    return text


def _number(where: str, row: Mapping[str, Any], column: str) -> float:
    text = _text(where, row, column)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if text.strip().lower() in MISSING or not math.isfinite(value):
        raise DataError(f"{where}: {column!r}: expected a finite number, got {text!r:.80}")
    return value


def _item(where: str, name: str, items: Mapping[str, Option] | None) -> Option:
    if items is None:
        return name
    if name not in items:
        raise DataError(f"{where}: unknown item {name!r:.80}; there are {len(items)} items")
    return items[name]


__all__: Sequence[str] = ["Columns", "make_choices", "read_items", "read_rows"]
