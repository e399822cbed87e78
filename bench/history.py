"""The history of what was measured: ``python -m bench.history`` enters new results into bench/history.csv and draws it.

One line a run and figure: when, at which commit, on which machine, what, its median and the interval of its
repetitions, in milliseconds. Runs that bench/results held at earlier commits are found in git, so nothing is lost when
a result is replaced. Only lines of one machine can be compared; the picture has a panel for each.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
FILES = ("decode", "ops", "users")
DRAWN = {  # of bench.decode, and what to call it
    "transformers": "plain transformers",
    "attached": "attached",
    "fused": "fused, a user in every row",
    "fused_base": "fused, base rows",
}
ROWS = 32


class Line(NamedTuple):
    """One figure of one run."""

    date: str
    commit: str
    machine: str
    figure: str
    ms: float
    low: float
    high: float


def lines_of(question: str, text: str) -> Iterator[Line]:
    """The figures of a file of bench/results, as text."""
    data = json.loads(text)
    records = data if isinstance(data, list) else [record | data["machine"] for record in data["results"]]
    for record in records:
        for what, ms, low, high in _figures(question, record):
            machine = f"{record.get('processor')}, {record.get('threads')} threads, {record.get('instruction set')}"
            machine += f", {record['gpu']}" if record.get("gpu") else ""
            yield Line(record["date"], record["commit"], machine, what, round(ms, 5), round(low, 5), round(high, 5))


def _figures(question: str, record: dict[str, Any]) -> Iterator[tuple[str, float, float, float]]:
    if question == "decode" and "ms_low" in record and "model" in record:
        what = f"step, {record['model']}, {record['dtype']}, {record['rows']} rows, {record['system']}"
        yield what, record["ms_per_step"], record["ms_low"], record["ms_high"]
    elif question == "users" and "ms_low" in record:
        yield record["measure"], record["ms"], record["ms_low"], record["ms_high"]
    elif question == "ops" and isinstance(record.get("seconds"), dict):
        timed = record["seconds"].get("op")
        if isinstance(timed, dict):
            what = f"{record['op']}, {record['case']}, {record['dtype']}"
            yield what, 1e3 * timed["median"], 1e3 * timed["low"], 1e3 * timed["high"]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True).stdout


def measured() -> Iterator[Line]:
    """Every figure of bench/results, now and at earlier commits."""
    for question in FILES:
        name = f"results/{question}.json"
        for commit in _git("log", "--format=%H", "--", name).split():
            try:
                text = _git("show", f"{commit}:./{name}")
            except subprocess.CalledProcessError:  # removed by that commit
                continue
            yield from lines_of(question, text)
        if (HERE / name).exists():
            yield from lines_of(question, (HERE / name).read_text())


def update(path: Path) -> list[Line]:
    """Enters what is new; all lines, by date."""
    known: list[Line] = []
    if path.exists():
        with open(path, newline="") as file:
            _, *rows = csv.reader(file)
        known = [Line(row[0], row[1], row[2], row[3], *(float(number) for number in row[4:])) for row in rows]
    lines = {(line.date, line.figure): line for line in [*measured(), *known]}
    ordered = sorted(lines.values())
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Line._fields)
        writer.writerows(ordered)
    return ordered


def draw(lines: list[Line], path: Path) -> None:
    """Steps of 32 rows, by date, a panel a machine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {f"{ROWS} rows, {system}": name for system, name in DRAWN.items()}
    machines: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        name = next((name for end, name in shown.items() if line.figure.endswith(end)), None)
        if name is not None and ", float32, " in line.figure:
            machines.setdefault(line.machine, {}).setdefault(name, []).append(line)
    if not machines:
        raise ValueError(f"{path.name}: expected steps of {ROWS} rows in the history, got none")
    figure, axes = plt.subplots(len(machines), 1, figsize=(7, 3.2 * len(machines)), squeeze=False, layout="constrained")
    for axis, (machine, series) in zip(axes[:, 0], machines.items(), strict=True):
        for marker, (name, found) in zip("osv^", series.items(), strict=False):
            when = [line.date[:16].replace("T", " ") for line in found]
            spread = [[line.ms - line.low for line in found], [line.high - line.ms for line in found]]
            ms = [line.ms for line in found]
            axis.errorbar(when, ms, yerr=spread, marker=marker, mfc="none", capsize=3, label=name)
        axis.set_title(machine, fontsize=9)
        axis.set_ylabel(f"milliseconds a step of {ROWS} rows")
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
        axis.tick_params(axis="x", labelrotation=30, labelsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of history.csv and history.png")
    out = parser.parse_args().out
    draw(update(out / "history.csv"), out / "history.png")
