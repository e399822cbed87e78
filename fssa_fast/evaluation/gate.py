"""The verdict of a release: whether a new version loses against the one that serves, on users whom neither knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fssa_fast.training.scores import Floats, interval


@dataclass(frozen=True)
class Difference:
    """NEW minus OLD in one measure: the mean over n units, drawn independently of each other, and its 95 % interval."""

    measure: str
    unit: str
    n: int
    mean: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        """Whether the whole interval is below zero: if NEW is no worse, by chance in one case of forty."""
        return self.high < 0

    def text(self) -> str:
        """As "choices predicted, %: -3.1 [-5.0, -1.2] over 40 users: a loss"."""
        mean, low, high = (100 * value for value in (self.mean, self.low, self.high))
        verdict = "a loss" if self.lost else "a gain" if self.low > 0 else "no difference that can be told from chance"
        return f"{self.measure}, %: {mean:+.1f} [{low:+.1f}, {high:+.1f}] over {self.n} {self.unit}: {verdict}"


def predicted(old: Mapping[int, Floats], new: Mapping[int, Floats]) -> Difference:
    """Of held-out choices predicted, by number of choices given: shares [U], the same users in the same order.

    A user counts once: the mean of the differences over the numbers of choices, so that there is one test of all.
    Raises ValueError for fewer than two users, and for others than OLD's.
    """
    if old.keys() != new.keys() or any(old[k].shape != new[k].shape for k in old):
        raise ValueError("new: expected shares for the users and numbers of choices of old, got others")
    own = np.mean([new[count] - old[count] for count in old], axis=0)
    if len(own) < 2:
        raise ValueError(f"users: expected at least two whom neither run was trained on, got {len(own)}")
    return Difference("held-out choices predicted", "users", len(own), *interval([own]))


def judged(wins: Floats) -> Difference:
    """Of NEW's texts against OLD's under a judge: how often each user's win [U], a tie half; even is no difference."""
    return Difference("texts that win, beyond one half", "users", len(wins), *interval([wins - 0.5]))
