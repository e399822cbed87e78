"""Results as tables: Markdown to read, CSV to reuse."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fssa_fast.training.scores import Scores, interval


@dataclass(frozen=True)
class Cell:
    """A mean and its 95 % interval; without one where low is None."""

    mean: float
    low: float | None = None
    high: float | None = None

    def text(self, scale: float, digits: int) -> str:
        """As "61.2 [59.8, 62.7]"."""
        mean = f"{scale * self.mean:.{digits}f}"
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


@dataclass
class Table:
    """Rows by name, a cell for each column; numbers are shown times `scale`."""

    title: str
    columns: list[str]
    rows: dict[str, list[Cell]] = field(default_factory=dict)
    first: str = "model"
    scale: float = 100.0
    digits: int = 1

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        lines = [f"**{self.title}**", "", f"| {self.first} | " + " | ".join(self.columns) + " |"]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        for name, cells in self.rows.items():
            lines.append(f"| {name} | " + " | ".join(cell.text(self.scale, self.digits) for cell in cells) + " |")
        return "\n".join(lines)

    def csv(self) -> str:
        """The table in CSV: a line a cell."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([self.first, "column", "mean", "low", "high"])
        for name, cells in self.rows.items():
            for column, cell in zip(self.columns, cells, strict=True):
                writer.writerow([name, column, cell.mean, cell.low, cell.high])
        return out.getvalue()

    def json(self) -> dict[str, Any]:
        """The table as plain data."""
        rows = {
            name: {c: [cell.mean, cell.low, cell.high] for c, cell in zip(self.columns, cells, strict=True)}
            for name, cells in self.rows.items()
        }
        return {"title": self.title, "columns": self.columns, "mean, low, high": rows}


Measured = dict[str, dict[int, list[Scores]]]
"""Of each model, by number of choices given, the scores of each run."""


def tables_of(title: str, measured: Measured, *, digits: int = 1) -> list[Table]:
    """Accuracy, log-loss and calibration of the same predictions, by choices given; intervals over scores' units."""
    columns = [str(count) for count in next(iter(measured.values()))]
    accuracy = Table(f"{title}: held-out choices predicted, %, by choices given", columns, digits=digits)
    loss = Table(f"{title}: log-loss, nats (even odds: 0.693), by choices given", columns, scale=1, digits=3)
    error = Table(f"{title}: expected calibration error, %, by choices given", columns)
    for model, by_count in measured.items():
        runs = list(by_count.values())
        accuracy.rows[model] = [Cell(*interval([scores.accuracies for scores in own])) for own in runs]
        loss.rows[model] = [Cell(*interval([scores.losses for scores in own])) for own in runs]
        error.rows[model] = [Cell(float(np.mean([scores.calibration_error for scores in own]))) for own in runs]
    return [accuracy, loss, error]
