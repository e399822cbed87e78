"""The synthetic task: two reward functions over [0, 1], and a user for each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fssa_fast.data.choices import ChoiceData

PAIRS = 20_000


def reward(which: int, y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Reward 0 is y below a half and 2y above, reward 1 is y below and 1 - y above."""
    return np.where(y < 0.5, y, 2 * y if which == 0 else 1 - y)


def synthetic() -> tuple[ChoiceData, ChoiceData, ChoiceData]:
    """Training, validation and test: 80, 10 and 10 % of 20,000 pairs uniform in [0, 1]^2, the same two users in each.

    Numpy's legacy generator with seed 0 draws the pairs, and then each one's part, as the published task does.
    """
    draw = np.random.RandomState(0)
    points = draw.uniform(0, 1, (PAIRS, 2))
    part = draw.choice(3, PAIRS, p=[0.8, 0.1, 0.1])
    return _part(points[part == 0]), _part(points[part == 1]), _part(points[part == 2])


def _part(points: NDArray[np.float64]) -> ChoiceData:
    pairs = np.arange(points.size).reshape(-1, 2)
    choices = []
    for which in (0, 1):
        second = reward(which, points[:, 1]) > reward(which, points[:, 0])
        choices.append(np.where(second[:, None], pairs[:, ::-1], pairs))
    options = torch.from_numpy(points.reshape(-1, 1)).float()
    return ChoiceData(options, np.repeat(np.arange(len(points)), 2), ("reward 0", "reward 1"), tuple(choices))


def disagreement(part: ChoiceData) -> float:
    """The share p of pairs on which the two users disagree."""
    return float((part.choices[0][:, 0] != part.choices[1][:, 0]).mean())


def bayes_optimum(p: float, count: int) -> float:
    """The best accuracy there is after `count` random pairs: `1 - (1 - p)^count p / 2`."""
    return 1 - (1 - p) ** count * p / 2
