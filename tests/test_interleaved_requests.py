"""A short run of tests/interleaved_requests.py finds nothing, and finds what is planted."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from interleaved_requests import Run

from fssa_fast._native import load_native
from fssa_fast.generation import Engine

pytestmark = pytest.mark.skipif(load_native()[0] is None, reason="bit-identical by the native steps only: not built")


def run(folder: Path, moves: int, **options: Any) -> Run:
    made = Run(folder, 3, **options)
    asyncio.run(made.run(moves))
    return made


def another_users_slot(engine: Engine) -> None:
    """Now and then a request reads the prior's row in place of its user's."""
    hold, count = engine._hold, itertools.count()

    def wrong(*args: Any) -> tuple[int, bytes]:
        slot, root = hold(*args)
        return (engine._policy.bank.prior if next(count) % 4 == 3 else slot), root

    engine._hold = wrong  # type: ignore[method-assign]


def keys_without_the_row(engine: Engine) -> None:
    """Users' prompts are found by their tokens alone."""
    hold = engine._hold
    engine._hold = lambda *args: (hold(*args)[0], b"everybody's")  # type: ignore[method-assign]


def a_pin_that_stays(engine: Engine) -> None:
    """Once a row is held that no request has."""
    hold, kept = engine._hold, []

    def wrong(held: Any, *args: Any) -> tuple[int, bytes]:
        slot, root = hold(held, *args)
        if not kept:
            kept.append(engine._policy.bank.pin([slot]))
            kept[-1].__enter__()
        return slot, root

    engine._hold = wrong  # type: ignore[method-assign]


def test_every_request_gets_what_it_gets_alone_among_changes_and_failures(tmp_path):
    made = run(tmp_path, 300)
    assert not made.wrong and not made.leaks
    assert made.counts["answers checked, whole"] > 40 and made.counts["steered forwards checked"] > 60
    assert made.faults.count and made.counts["conversions refused"]


@pytest.mark.parametrize(
    "plant, found",
    [
        (another_users_slot, "alone"),
        (keys_without_the_row, "alone"),
        (a_pin_that_stays, "rows or blocks are held"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, plant, found):
    assert any(found in wrong for wrong in run(tmp_path, 120, plant=plant).wrong)
