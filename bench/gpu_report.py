"""What bench/gpu_round.sh found, as JSON and as a page: python -m bench.gpu_report FOLDER NAME

FOLDER holds gpu.json (bench.gpu, where that ran), steps (a line a step: name, outcome, time) and about (a line a fact);
NAME.json and NAME.md are written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = ("cuda", "triton")
Row = dict[str, Any]
# Against what, in which calls, how many times as fast.
RATES = (
    ("products", "lora_, prefill", 0.7),
    ("definition", "context_rows_, 1 user of 10,", 10.0),
    ("gathered", "lora_, 64 users", 3.0),
)


class Figure(NamedTuple):
    """A figure that has a bar to meet."""

    what: str
    found: str
    met: bool


def _best(rows: list[Row], of: Row, by: tuple[str, ...] = KERNELS) -> Row | None:
    """The fastest of these among the rows of the same call."""
    same = [row for row in rows if (row["op"], row["case"]) == (of["op"], of["case"]) and row["by"] in by]
    return min(same, key=lambda row: row["median"], default=None)


def figures(found: dict[str, Any]) -> Iterator[Figure]:
    """The figures of bench/results/README.md, as far as they were measured; of our kernels, the faster."""
    rows: list[Row] = found["results"]
    calls = {(row["op"], row["case"]): row for row in rows}.values()
    for call in calls:
        ours, op, case = _best(rows, call), call["op"], call["case"]
        if ours is None:
            continue
        if op in ("film", "film_norm", "lora_") and case.startswith("decode"):
            over, share = ours["median"] - found["machine"]["empty captured launch, us"], ours["of copy bandwidth"]
            yield Figure(
                f"{op}, {case}: 0.8 of the copy bandwidth, or 2 us over an empty launch",
                f"{share:.2f}, {over:.2f} us over", share >= 0.8 or over <= 2,
            )  # fmt: skip
        for by, calls_of, factor in RATES:
            other = _best(rows, call, (by,))
            if other is not None and f"{op}, {case}".startswith(calls_of):
                ratio = other["median"] / ours["median"]
                yield Figure(f"{op}, {case}: {factor} times the rate of {by}", f"{ratio:.2f} times", ratio >= factor)
        if op == "context_rows_" and case.startswith("1 user of 10,"):
            yield Figure(f"{op}, {case}: 40 us", f"{ours['median']:.1f} us", ours["median"] <= 40)


def markdown(name: str, found: dict[str, Any]) -> str:
    """The page: steps, figures against their bars, machine, every time."""
    lines = [f"# {name}", "", "| step | outcome | time |", "|---|---|---|"]
    lines += [f"| {step['step']} | {step['outcome']} | {step['time']} |" for step in found["steps"]]
    if not found["results"]:
        return "\n".join([*lines, "", "No measurements.", ""])
    lines += ["", "| figure and its bar | found | |", "|---|---|---|"]
    lines += [f"| {f.what} | {f.found} | {'met' if f.met else 'missed'} |" for f in figures(found)]
    lines += ["", *(f"* {key}: {value}" for key, value in (found["machine"] | found["about"]).items())]
    lines += ["", "| op | case | by | us | 20 % | 80 % | of copy bandwidth |", "|---|---|---|---|---|---|---|"]
    for row in found["results"]:
        share = f"{row['of copy bandwidth']:.2f}" if "of copy bandwidth" in row else ""
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("median", "low", "high"))
        lines.append(f"| {row['op']} | {row['case']} | {row['by']} | {numbers} | {share} |")
    return "\n".join([*lines, ""])


def _pairs(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description="Write up a round on a GPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", type=Path)
    args = parser.parse_args()
    measured = args.folder / "gpu.json"
    found = json.loads(measured.read_text()) if measured.exists() else {"machine": {}, "results": []}
    found["about"] = dict(_pairs(args.folder / "about"))
    found["steps"] = [dict(zip(("step", "outcome", "time"), row, strict=True)) for row in _pairs(args.folder / "steps")]
    Path(f"{args.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    Path(f"{args.name}.md").write_text(markdown(args.name.name, found))


if __name__ == "__main__":
    main()
