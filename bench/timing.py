"""How everything is timed here: the sides of a comparison in one process, in turn, and percentiles of many rounds.

Machines drift, by a third within minutes where other work shares them: times of one run are comparable, and ratios of
medians are what a result means.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds a call: the median of the rounds, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    rounds: int


def _once(side: Callable[[], Any], calls: int, synchronize: bool) -> float:
    if synchronize:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        side()
    if synchronize:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def compare(
    sides: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, rounds: int = 51, round_seconds: float = 2e-3
) -> dict[str, Timing]:
    """Times the sides in turn: every round calls each of them, for at least `round_seconds` if a call is shorter.

    Stops after `rounds` rounds or `seconds` seconds a side, whichever is first, but not before 5 rounds.
    """
    synchronize = torch.cuda.is_available()
    calls = {}
    for name, side in sides.items():
        side()
        _once(side, 1, synchronize)
        calls[name] = max(1, int(round_seconds / max(_once(side, 2, synchronize), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= 5 and time.perf_counter() - begin > seconds * len(sides):
            break
        order = list(sides) if index % 2 == 0 else list(sides)[::-1]
        for name in order:
            found[name].append(_once(sides[name], calls[name], synchronize))
    return {name: summary(times) for name, times in found.items()}


def summary(times: list[float]) -> Timing:
    """Median, 20th and 80th percentile of some times."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], len(times))


def pretty(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, size = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _commit() -> str:
    try:
        commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" and changes" if changes else "")


def machine() -> dict[str, Any]:
    """What a result has to name: machine, versions, threads, commit, time."""
    import transformers

    from fssa_fast import __version__
    from fssa_fast.backends import load_backend

    cpu, reason = load_backend("cpu")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "fssa_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction set": cpu.isa() if cpu is not None else f"no native core: {reason}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
