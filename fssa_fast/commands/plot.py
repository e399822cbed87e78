"""`fssa plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def plot(
    source: Annotated[Path, typer.Argument(help="A run directory, or the JSON that reproduce, eval or compare wrote.")],
    out: Annotated[Path, typer.Argument(help="The picture to write, .png.")],
) -> None:
    """Draw a result by number of choices, or a run's losses."""
    from fssa_fast.evaluation.plots import plot_log, plot_tables
    from fssa_fast.training.runs import last_checkpoint, read_run

    if out.suffix != ".png":
        raise ValueError(f"out: expected a name that ends in .png, got {out}")
    if source.is_dir():
        log = read_run(source).get("log")
        checkpoint = last_checkpoint(source)
        if log is None and checkpoint is not None:  # not finished
            log = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        plot_log(log or [], out, title=source.name)
    else:
        content = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.get("tables"):
            raise ValueError(f"{source}: expected results with tables, got none")
        plot_tables(content["tables"], out)
    typer.echo(f"{out}: written")
