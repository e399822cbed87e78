"""Intervals that stay valid however often, and whenever, somebody looks."""

from __future__ import annotations

import math

import numpy as np

from fssa_fast.training.scores import Floats


def confidence_sequence(values: Floats, *, alpha: float = 0.05, best_at: int = 200) -> tuple[Floats, Floats]:
    """Bounds [N] of the mean after each of N values in [0, 1], in the order in which they came.

    With probability 1 - alpha all intervals at once hold what the values so far were expected to be, each given those
    before it, on average: who stops at a lucky moment is not misled. Nothing is assumed of independence, so that many
    values of one user, and users who differ, are as good as any. The price: at `best_at` values, where it is tightest
    relative to n, it is about 1.7 times as wide as an interval for a number of values that was fixed before.

    Source: S. R. Howard, A. Ramdas, J. McAuliffe, J. Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence
    sequences", Annals of Statistics 49(2), 2021 (arXiv 1810.08240): the two-sided normal mixture, Robbins', equation
    (14), for values of bounded range, which are sub-Gaussian with variance 1/4 (Hoeffding).

    Raises ValueError for values out of [0, 1], or an alpha out of (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # NaN is out of it, too
        raise ValueError(f"values: expected numbers in [0, 1], got {values.min()} to {values.max()}")
    n = np.arange(1, len(values) + 1)
    variance = n / 4
    # The mixture's weight for which the bound is smallest at best_at: the paper's approximation, section 3.5.
    rho = (best_at / 4) / (2 * math.log(1 / alpha) + math.log1p(2 * math.log(1 / alpha)))
    radius = np.sqrt((variance + rho) * np.log((variance + rho) / (rho * alpha**2))) / n
    mean = np.cumsum(values) / n
    return np.maximum(mean - radius, 0.0), np.minimum(mean + radius, 1.0)
