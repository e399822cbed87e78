"""Confidence sequences keep their promise to whoever looks after every value; intervals for a fixed number do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fssa_fast.data.history import Line, Made
from fssa_fast.evaluation.experiment import Foreseen, drift, win_rates
from fssa_fast.evaluation.sequential import confidence_sequence
from fssa_fast.training.scores import Floats

Bounds = Callable[[Floats], tuple[Floats, Floats]]


def ever_missed(bounds: Bounds, chances: Callable[[np.random.Generator], Floats], runs: int = 600) -> float:
    """How often bounds, looked at after every value, ever leave out the mean of the chances until then."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(runs):
        chance = chances(rng)
        low, high = bounds((rng.random(len(chance)) < chance).astype(float))
        expected = np.cumsum(chance) / np.arange(1, len(chance) + 1)
        missed += bool(((low > expected + 1e-12) | (high < expected - 1e-12)).any())
    return missed / runs


def fixed(values: Floats) -> tuple[Floats, Floats]:
    """The usual interval, good for a number of values that was fixed before."""
    n = np.arange(1, len(values) + 1)
    mean = (np.cumsum(values) + 2) / (n + 4)  # Agresti and Coull's
    radius = 1.96 * np.sqrt(mean * (1 - mean) / (n + 4))
    return mean - radius, mean + radius


EVEN = lambda rng: np.full(1500, 0.5)  # noqa: E731
UNEVEN = lambda rng: np.repeat(rng.choice([0.05, 0.95], 75), 20)  # noqa: E731  users who differ, in sessions


@pytest.mark.parametrize("chances", [EVEN, UNEVEN], ids=["even", "users who differ"])
def test_coverage_under_peeking(chances: Callable[[np.random.Generator], Floats]) -> None:
    assert ever_missed(confidence_sequence, chances) <= 0.05


def test_the_check_finds_an_interval_that_peeking_breaks() -> None:
    """The planted fault: an interval for a fixed n misses in far more than one case of twenty."""
    assert ever_missed(fixed, EVEN) > 0.25


def test_it_becomes_certain_and_keeps_within_the_range() -> None:
    rng = np.random.default_rng(1)
    low, high = confidence_sequence((rng.random(600) < 0.7).astype(float))
    assert low[-1] > 0.5 and (low >= 0).all() and (high <= 1).all() and high[0] == 1
    n = 200
    low, high = confidence_sequence(np.tile([0.0, 1.0], n // 2))
    assert 1.5 < (high[-1] - low[-1]) / (2 * 1.96 * 0.5 / n**0.5) < 1.8
    for bad in (np.array([0.5, 1.1]), np.array([-0.1]), np.array([np.nan])):
        with pytest.raises(ValueError, match="values: expected numbers in"):
            confidence_sequence(bad)
    with pytest.raises(ValueError, match="alpha"):
        confidence_sequence(np.zeros(1), alpha=1.0)
    assert confidence_sequence(np.zeros(0))[0].size == 0


def choice(better: str | None, worse: str | None, at: float = 0.0) -> Line:
    made = [None if v is None else Made(v, 1, 1.0, {}) for v in (better, worse)]
    return Line("choice", at, "", "u", better or "a", choice="c", better=made[0], worse=made[1])


def test_win_rates_count_choices_between_versions_alone() -> None:
    rng = np.random.default_rng(0)
    lines = [choice("b", "a") if rng.random() < 0.75 else choice("a", "b") for _ in range(400)]
    lines += [choice("a", "base")] * 3 + [choice("base", "a")] * 2
    lines += [choice("a", "a"), choice(None, None), Line("completion", 0.0, "", None, "a", "id", Made("a", 1, 1.0, {}))]
    against, base = win_rates(lines)
    assert (against.a, against.b, against.n) == ("a", "b", 400) and against.winner == "b" and against.high < 0.5
    assert (base.a, base.b, base.n, base.wins) == ("a", "base", 5, 0.6) and base.winner is None


def test_drift_shows_when_users_have_changed() -> None:
    rng = np.random.default_rng(0)
    seen = [Foreseen(60.0 * i, f"u{i % 20}", bool(rng.random() < (0.9 if i < 300 else 0.5))) for i in range(600)]
    table = drift({"steady": [Foreseen(c.time + 1, c.user, True) for c in seen], "drifting": seen}, periods=2)
    _, early, late = table.rows["drifting"]
    assert early.low is not None and late.high is not None and early.low > 0.8 > 0.6 > late.high
    assert [cell.mean for cell in table.rows["steady"]] == [1.0, 1.0, 1.0]
    assert table.columns == ["all", "from 1970-01-01 00:00", "from 1970-01-01 05:00"]
    assert drift({"nobody": []}).rows["nobody"][0].mean != drift({"nobody": []}).rows["nobody"][0].mean  # NaN: none
