"""Pictures of results: tables by number of choices, and a run's loss."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any


def plot_tables(tables: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws tables as `Table.json` gives them, a panel each, means with their 95 % intervals, to a PNG."""
    figure, panels = _panels(len(tables))
    for table, axes in zip(tables, panels, strict=True):
        columns = table["columns"]
        numbers = all(column.isdigit() for column in columns)
        at = [int(column) for column in columns] if numbers else list(range(len(columns)))
        for name, cells in table["mean, low, high"].items():
            means = [cells[c][0] for c in columns]
            lows = [m if cells[c][1] is None else cells[c][1] for c, m in zip(columns, means, strict=True)]
            highs = [m if cells[c][2] is None else cells[c][2] for c, m in zip(columns, means, strict=True)]
            style = "--" if cells[columns[0]][1] is None else "-"
            (line,) = axes.plot(at, means, style, marker="o", markersize=3, label=name)
            axes.fill_between(at, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xticks(at, columns)
        axes.set_title(table["title"], fontsize=9)
        axes.set_xlabel("choices given" if numbers else "")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_log(log: Sequence[Mapping[str, float]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws what a trainer logged, a panel for each quantity, by step, to a PNG. Raises ValueError for an empty log."""
    skipped = ("step", "epoch", "learning_rate", "grad_norm")
    names = sorted({n for entry in log for n in entry if n not in skipped and not n.startswith("train_")})
    if not names:
        raise ValueError("log: expected entries with losses, got none")
    figure, panels = _panels(len(names))
    for name, axes in zip(names, panels, strict=True):
        points = [(entry["step"], float(entry[name])) for entry in log if name in entry]
        axes.plot(*zip(*points, strict=True))
        axes.set_title(f"{title} {name}".strip(), fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    _save(figure, path)


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    figure.savefig(path, dpi=120, format="png")
