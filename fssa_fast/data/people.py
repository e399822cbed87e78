"""Real people's choices, from files the user has: Polis votes, stated-choice panels, relabelled helpful-harmless pairs.

Each loader takes the directory of its data set and a seed, and gives training, validation and test parts. What is held
out is named in each docstring; statistics that a loader needs (rates, scales) come from the training part.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fssa_fast.data.choices import ChoiceData, Indices, split_users
from fssa_fast.data.lines import json_lines

Parts = tuple[ChoiceData, ChoiceData, ChoiceData]
Directory = str | os.PathLike[str]

LENGTH_WEIGHT = 0.3  # of an answer's log length, beside an embedding of length 1
CONVERSATION = "american-assembly.bowling-green"
PANELS = {
    "train": ("train_pairs.csv", ("price", "time", "change", "comfort")),
    "electricity": ("electricity_choices.csv", ("pf", "cl", "loc", "wk", "tod", "seas")),
}


def polis(
    directory: Directory, *, seed: int = 0, conversation: str = CONVERSATION, margin: float = 0.1, votes: int = 20
) -> Parts:
    """Votes on statements: a user prefers a statement agreed with to one disagreed with. Held out: users.

    Only contested pairs, whose statements' shares of agreement among training users differ by less than `margin` and
    rest on at least `votes` votes each: on others, popularity alone predicts. Every statement is kept, moderated or
    not. A statement is its own group. Options: text embeddings, as the file has them.
    """
    folder = Path(directory)
    with np.load(folder / "votes.npz", allow_pickle=False) as archive:
        if conversation not in archive.files:
            raise ValueError(f"conversation: expected one of {sorted(archive.files)}, got {conversation!r}")
        matrix = archive[conversation]
    lines = [line for _, line in json_lines(folder / "statements.jsonl")]
    rows = {line["col"]: i for i, line in enumerate(lines) if line["conv"] == conversation}
    if sorted(rows) != list(range(matrix.shape[1])):
        raise ValueError(
            f"{folder / 'statements.jsonl'}: expected a line for each of {matrix.shape[1]} statements of "
            f"{conversation!r}, got {len(rows)}"
        )
    embeddings = np.load(folder / "minilm_f16.npy", allow_pickle=False)
    options = torch.from_numpy(embeddings[[rows[c] for c in range(matrix.shape[1])]].astype(np.float32))
    parts = split_users(len(matrix), seed)
    known = matrix[parts[0]]
    agree, cast = (known == 1).sum(0), np.isin(known, (1, -1)).sum(0)
    rate = agree / np.maximum(cast, 1)
    contested = (np.abs(rate[:, None] - rate) < margin) & (cast >= votes)[:, None] & (cast >= votes)
    choices = []
    for own in matrix:
        liked, disliked = np.flatnonzero(own == 1), np.flatnonzero(own == -1)
        a, b = np.nonzero(contested[np.ix_(liked, disliked)])
        choices.append(np.stack([liked[a], disliked[b]], 1))
    users = tuple(f"{conversation}/{i}" for i in range(len(matrix)))
    return _parts(ChoiceData(options, np.arange(len(options)), users, tuple(choices)), parts)


def stated_choice(directory: Directory, panel: str, *, seed: int = 0) -> Parts:
    """A stated-choice panel, "train" or "electricity". Held out: people.

    Options are the attributes, scaled to mean 0 and deviation 1. The alternatives of one question are one group; where
    there are more than two, the chosen one is preferred to each of the others.
    """
    if panel not in PANELS:
        raise ValueError(f"panel: expected one of {sorted(PANELS)}, got {panel!r}")
    name, attributes = PANELS[panel]
    path = Path(directory) / name
    features: list[list[float]] = []
    groups: list[int] = []
    questions: dict[tuple[str, str], int] = {}
    alternatives: dict[tuple[str, str], list[tuple[int, bool]]] = {}

    def add(question: tuple[str, str], values: list[float], chosen: bool) -> None:
        alternatives.setdefault(question, []).append((len(features), chosen))
        features.append(values)
        groups.append(questions.setdefault(question, len(questions)))

    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                question = (row["user"], row["situation"])
                if panel == "train":
                    if row["choice"] not in ("0", "1"):
                        raise ValueError(f"'choice': expected 0 or 1, got {row['choice']!r}")
                    for side, sign in (("a", "0"), ("b", "1")):
                        add(question, [float(row[f"{n}_{side}"]) for n in attributes], row["choice"] == sign)
                else:
                    add(question, [float(row[n]) for n in attributes], row["chosen"] == "1")
            except KeyError as error:
                raise ValueError(f"{path}, line {line}: column {error} is missing") from error
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
    choices: dict[str, list[tuple[int, int]]] = {}
    for (user, situation), own in alternatives.items():
        best = [i for i, chosen in own if chosen]
        if len(best) != 1:
            raise ValueError(f"{path}: user {user}, situation {situation}: expected one choice, got {len(best)}")
        choices.setdefault(user, []).extend((best[0], i) for i, chosen in own if not chosen)
    values = torch.tensor(features)
    spread = values.std(0)
    values = (values - values.mean(0)) / torch.where(spread > 0, spread, 1.0)
    data = ChoiceData(
        values, np.array(groups), tuple(choices), tuple(np.array(own, dtype=np.int64) for own in choices.values())
    )
    return _parts(data, split_users(len(choices), seed))


def helpful_harmless(directory: Directory, *, seed: int = 0) -> Parts:
    """Answers to prompts, judged by two criteria, each of them a user. Held out: prompts.

    Conflicting pairs only, of which the two criteria prefer different answers: what tells the criteria apart is then
    the choice alone, not which pairs have a label. Answers to one prompt are one group. Options [2 N, E + 1]: text
    embeddings of prompt and answer as the file has them, and the log of the answer's length, which an embedding of a
    text's first 256 tokens cannot know.
    """
    folder = Path(directory)
    lines = [line for _, line in json_lines(folder / "pairs.jsonl")]
    embeddings = np.load(folder / "minilm_f16.npy", allow_pickle=False).astype(np.float32)
    if len(embeddings) != 2 * len(lines):
        raise ValueError(f"{folder}: expected two embeddings a pair, got {len(embeddings)} for {len(lines)} pairs")
    lengths = np.log1p([len(line[answer]) for line in lines for answer in ("response_a", "response_b")])
    length = LENGTH_WEIGHT * (lengths - lengths.mean())
    options = torch.from_numpy(np.column_stack([embeddings, length]).astype(np.float32))
    _, group = np.unique([line["prompt"] for line in lines], return_inverse=True)
    parts = split_users(int(group.max()) + 1, seed)
    labels = [line["choice"] for line in lines]
    conflicting = np.array([len(c) == 2 and len(set(c.values())) == 2 for c in labels])
    found = []
    for part in parts:
        kept = np.isin(group, part) & conflicting
        choices = []
        for criterion in ("helpful", "harmless"):
            own = [(2 * i + c[criterion], 2 * i + 1 - c[criterion]) for i, c in enumerate(labels)
                   if kept[i] and criterion in c]  # fmt: skip
            choices.append(np.array(own, dtype=np.int64).reshape(-1, 2))
        found.append(ChoiceData(options, np.repeat(group, 2), ("helpful", "harmless"), tuple(choices)))
    return found[0], found[1], found[2]


def _parts(data: ChoiceData, parts: Sequence[Sequence[int]]) -> Parts:
    train, validation, test = (data.of_users(part).predictable() for part in parts)
    return train, validation, test


__all__ = ["Indices", "Parts", "helpful_harmless", "polis", "stated_choice"]
