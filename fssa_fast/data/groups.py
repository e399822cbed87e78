"""A user's choices divided by group, so that a context and its targets share none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def sides(groups: Indices, own: Indices, rng: np.random.Generator, share: float) -> tuple[Indices, Indices]:
    """Of choices `own` [K, 2], those within a random share of their options' groups [n], and those within the others'.
    """
    of_own = groups[own]
    names, where = np.unique(of_own, return_inverse=True)
    order = rng.permutation(len(names))
    in_context = np.zeros(len(names), dtype=bool)
    in_context[order[: min(max(round(share * len(names)), 1), len(names) - 1)]] = True
    inside = in_context[where.reshape(of_own.shape)]
    return own[inside.all(1)], own[~inside.any(1)]


def splittable(groups: Indices, choices: Sequence[Indices]) -> list[int]:
    """The users, by number, of whose choices some are left to predict when another is known."""
    rng = np.random.default_rng(0)
    return [
        i for i, own in enumerate(choices)
        if len(own) > 1 and any(len(b) and len(a) for a, b in (sides(groups, own, rng, 0.5) for _ in range(8)))
    ]  # fmt: skip
