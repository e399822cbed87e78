"""`fssa experiment report`: what a server's history says of the versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Versions of an adapter, as their users chose.", no_args_is_help=True)


@app.callback()
def _only() -> None:
    """Versions of an adapter, as their users chose."""


@app.command()
def report(
    history: Annotated[list[Path], typer.Argument(help="Files that `fssa serve --history` wrote, of every replica.")],
    experiment: Annotated[str | None, typer.Option(help="Only what was recorded under this name.")] = None,
    version: Annotated[list[str] | None, typer.Option(help="NAME=DIRECTORY, may be repeated: how well that version "
                                                      "foresaw its users' choices, over time.")] = None,
    store: Annotated[str | None, typer.Option(help="The users' database, where versions are named.")] = None,
    alpha: Annotated[float, typer.Option(help="How often, at most, a confidence sequence ever misses.")] = 0.05,
    periods: Annotated[int, typer.Option(min=1, help="Of the table over time.")] = 4,
    json: Annotated[Path | None, typer.Option("--json", help="Where to write all figures, as JSON.")] = None,
) -> None:  # fmt: skip
    """Win rates between versions, valid whenever you look, and drift of choices against what versions foresee."""
    from dataclasses import asdict

    from fssa_fast.commands.options import named
    from fssa_fast.data.history import read_history
    from fssa_fast.evaluation.experiment import drift, foreseen, win_rates
    from fssa_fast.policy import SteerablePolicy
    from fssa_fast.records import environment, write_json
    from fssa_fast.users import open_store

    if bool(version) != (store is not None):
        raise ValueError("--store, --version: expected both or neither")
    lines = [line for line in read_history(history) if experiment is None or line.experiment == experiment]
    choices = [line for line in lines if line.kind == "choice"]
    typer.echo(f"{len(lines) - len(choices)} completions, {len(choices)} choices, "
               f"{len({line.user for line in choices})} users with choices")  # fmt: skip
    duels = win_rates(lines, alpha=alpha)
    for duel in duels:
        typer.echo(f"{duel.a} against {duel.b}: {100 * duel.wins:.1f} % of {duel.n} choices "
                   f"[{100 * duel.low:.1f}, {100 * duel.high:.1f}]: {duel.winner or 'neither'} is better")  # fmt: skip
    if not duels:
        typer.echo("no choice between answers of two versions")
    found = {"duels": [asdict(duel) | {"winner": duel.winner} for duel in duels], "alpha": alpha}
    if store is not None:
        at_rest, seen, base = open_store(store), {}, None
        for name, directory in named("--version", version):
            policy = SteerablePolicy.from_pretrained(directory, base)
            seen[name] = foreseen(lines, name, policy, at_rest)
            base = policy.detach()
        at_rest.close()
        table = drift(seen, periods)
        typer.echo("\n" + table.markdown())
        found |= {"foreseen": {name: [asdict(one) for one in own] for name, own in seen.items()}, "drift": table.json()}
    if json is not None:
        write_json(json, {**found, "environment": environment()})
