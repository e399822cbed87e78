"""`fssa reproduce NAME`: trains, evaluates and prints one table of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Name = Literal["synthetic", "polis", "stated-choice", "hh", "policy", "step-cost"]


def reproduce(
    name: Annotated[Name, typer.Argument(help="Which result.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, 0, 1, ...")] = 3,
    data: Annotated[Path | None, typer.Option(help="The data set's directory, where the result needs one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where to write all figures, as JSON.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Where run directories go; none is kept else.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, to try things out.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Which of Polis' conversations; bowling-green else.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base model's directory, for policies.")] = None,
) -> None:
    """Reproduce a result: train, evaluate, and print its table."""
    from fssa_fast.records import environment, write_json

    if (data is None) == (name in ("polis", "stated-choice", "hh", "policy")):
        need = "expected the data set's directory" if data is None else "expected none"
        raise ValueError(f"--data: {need} for {name}, got {data}")
    if (base is None) == (name == "policy"):
        raise ValueError(f"--base: expected {'a' if base is None else 'no'} base model's directory for {name}")
    if conversation is not None and name != "polis":
        raise ValueError(f"--conversation: expected none for {name}, got {conversation}")
    directory = data or Path()  # there is one where it is used
    options: dict[str, Any] = {"seeds": range(seeds), "steps": steps}
    if name == "synthetic":
        from fssa_fast.reproduce.synthetic import reproduce as run

        found = run(runs=runs, **options)
    elif name == "step-cost":
        from fssa_fast.reproduce.step_cost import reproduce as measure

        found = measure(steps=steps or 5)
    elif name == "policy":
        from fssa_fast.reproduce.policy import reproduce as run_policy

        found = run_policy(base=base or Path(), data=directory, runs=runs, **options)
    else:
        from fssa_fast.reproduce.people import reproduce as run_people

        found = run_people(name, data=directory, runs=runs, conversation=conversation, **options)
    for table in found["tables"]:
        typer.echo(table.markdown() + "\n")
    for line in found["checks"]:
        typer.echo(line)
    if json is not None:
        content = {**found, "tables": [table.json() for table in found["tables"]]}
        write_json(json, {"result": name, "seeds": seeds, **content, "environment": environment()})
        typer.echo(f"{json}: written")
