"""What a server's history says of the versions: which answers won, and how well each version foresees its users."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fssa_fast.data.history import BASE_VERSION, Line, digest
from fssa_fast.evaluation.policies import HeldOut, implicit_margins
from fssa_fast.evaluation.sequential import confidence_sequence
from fssa_fast.evaluation.tables import Cell, Table
from fssa_fast.generation.prompts import told
from fssa_fast.policy import SteerablePolicy
from fssa_fast.training.data import Preference
from fssa_fast.training.policy import ReferenceCache
from fssa_fast.training.scores import interval
from fssa_fast.users.store import Choices, Option, UserStore


@dataclass(frozen=True)
class Duel:
    """Choices between answers of two versions: how many there were, and how often `a` won, with its confidence
    sequence after the last of them."""

    a: str
    b: str
    n: int
    wins: float
    low: float
    high: float

    @property
    def winner(self) -> str | None:
        """The better version, once it is certain."""
        return self.a if self.low > 0.5 else self.b if self.high < 0.5 else None


def win_rates(lines: Sequence[Line], *, alpha: float = 0.05) -> list[Duel]:
    """Of every two versions (and the base) that were chosen between; lines in the order of their times.

    Choices between two answers of one version say nothing of it here, nor do those of which an answer is not known.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line.better is not None and line.worse is not None and line.better.version != line.worse.version:
            # The base last, so that what is read is how a version does against it.
            first, second = sorted((line.better.version, line.worse.version), key=lambda v: (v == BASE_VERSION, v))
            found.setdefault((first, second), []).append(float(line.better.version == first))
    duels = []
    for (first, second), wins in sorted(found.items()):
        low, high = confidence_sequence(np.array(wins), alpha=alpha)
        duels.append(Duel(first, second, len(wins), float(np.mean(wins)), float(low[-1]), float(high[-1])))
    return duels


@dataclass(frozen=True)
class Foreseen:
    """A recorded choice, when and by whom it was made, and whether its version, knowing the user's choices before it,
    found the answer that was chosen the better one."""

    time: float
    user: str
    right: bool


def foreseen(
    lines: Sequence[Line], version: str, policy: SteerablePolicy, store: UserStore, *, max_context: int = 50
) -> list[Foreseen]:
    """What a version foresaw of the choices of its users, those that are still in the users' database, in order.

    By the implicit reward (see `implicit_margins`) in the row of the last `max_context` choices before.
    """
    own = [line for line in lines if line.kind == "choice" and _answered_by(line) == version]
    wanted = {line.user for line in own}
    known: dict[str | None, Choices] = {}
    for name in store.names():
        if digest(name) in wanted and (choices := store.choices(name)) is not None:
            known[digest(name)] = choices
    places = {
        user: {digest(a.prompt, a.text or "", b.text or ""): i for i, (a, b) in reversed(list(enumerate(choices)))}
        for user, choices in known.items()
    }
    examples, kept = [], []
    for line in own:
        at = places.get(line.user, {}).get(line.choice or "")
        if at is not None:
            until = known[line.user][max(0, at - max_context) : at + 1]
            *before, target = [_preference(chosen, rejected, policy.chat) for chosen, rejected in until]
            examples.append(HeldOut(str(line.user), before, [target]))
            kept.append(line)
    margins = implicit_margins(policy, examples, max_context, reference=ReferenceCache()) if examples else []
    return [
        Foreseen(line.time, str(line.user), bool(margin[0] > 0)) for line, margin in zip(kept, margins, strict=True)
    ]


def _answered_by(line: Line) -> str:
    return line.version if line.better is None else line.better.version


def _preference(chosen: Option, rejected: Option, chat: bool | None) -> Preference:
    both = torch.stack([chosen.embedding, rejected.embedding])
    return Preference(told(chosen.prompt, chat), chosen.text or "", rejected.text or "", chosen.prompt, both)


def drift(found: Mapping[str, Sequence[Foreseen]], periods: int = 4) -> Table:
    """Shares of choices foreseen by version, all and in periods of equally many choices; intervals over users."""
    everything = sorted(choice.time for own in found.values() for choice in own)
    edges = [everything[len(everything) * i // periods] for i in range(periods)] if everything else []
    columns = ["all", *(f"from {time.strftime('%Y-%m-%d %H:%M', time.gmtime(edge))}" for edge in edges)]
    table = Table("Choices foreseen, %, over time (UTC)", columns, first="version")
    for version, own in found.items():
        where = np.searchsorted(edges, [choice.time for choice in own], side="right") - 1
        parts = [list(own), *([c for c, at in zip(own, where, strict=True) if at == i] for i in range(len(edges)))]
        table.rows[version] = [_share(part) for part in parts]
    return table


def _share(choices: Sequence[Foreseen]) -> Cell:
    if not choices:
        return Cell(float("nan"))
    _, where = np.unique([choice.user for choice in choices], return_inverse=True)
    right = np.bincount(where, [choice.right for choice in choices]) / np.bincount(where)
    return Cell(*interval([right])) if len(right) > 1 else Cell(float(right[0]))
