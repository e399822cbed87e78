"""`fssa data make-choices`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Prepare data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """So that the command has a name of its own although it is the only one."""


@app.command()
def make_choices(
    source: Annotated[Path, typer.Argument(help="A table: .csv, .jsonl, or a Hugging Face dataset's directory.")],
    out: Annotated[Path, typer.Argument(help="The directory for choices.jsonl and choices.json.")],
    kind: Annotated[Literal["ratings", "votes", "rankings", "pairs"], typer.Option(help="What the table holds.")],
    user: Annotated[str, typer.Option(help="The column that says who.")] = "user",
    item: Annotated[str, typer.Option(help="The column that says what.")] = "item",
    value: Annotated[str, typer.Option(help="The column of ratings, votes or ranks.")] = "value",
    chosen: Annotated[str, typer.Option(help="Of pairs, the column of what was chosen.")] = "chosen",
    rejected: Annotated[str, typer.Option(help="Of pairs, the column of what was not.")] = "rejected",
    prompt: Annotated[str | None, typer.Option(help="The column of prompts; only items of one are compared.")] = None,
    group: Annotated[str | None, typer.Option(help="The column of groups; contexts and targets share none.")] = None,
    items: Annotated[Path | None, typer.Option(help="A table of what items are: texts, or features.")] = None,
    item_text: Annotated[str | None, typer.Option(help="Its column of texts; without, columns are features.")] = None,
    margin: Annotated[float, typer.Option(min=0, help="Values must differ by more.")] = 0.0,
    max_pairs: Annotated[int | None, typer.Option(min=1, help="At most so many choices of a user.")] = None,
    min_choices: Annotated[int, typer.Option(min=2, help="Leave out, and count, users with fewer.")] = 2,
    seed: Annotated[int, typer.Option(help="Draws the choices kept by --max-pairs.")] = 0,
) -> None:  # fmt: skip
    """Turn ratings, votes, rankings or pairs into a file of choices, checked for leaks."""
    from fssa_fast.data.make import Columns, read_items
    from fssa_fast.data.make import make_choices as make

    record = make(
        source,
        out,
        kind,
        columns=Columns(user, item, value, chosen, rejected, prompt, group),
        items=None if items is None else read_items(items, item, item_text),
        margin=margin,
        max_pairs=max_pairs,
        min_choices=min_choices,
        seed=seed,
    )
    typer.echo(f"{out}: {record['choices']['count']} choices of {record['users']} users")
    for reason, users in record["users left out"].items():
        if users:
            typer.echo(f"{out}: left out {len(users)} users with {reason}")
