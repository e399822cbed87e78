"""The command `fssa`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fssa_fast.commands import chat, data, experiment, generate, train, users
from fssa_fast.commands.ask import ask
from fssa_fast.commands.evaluate import compare, evaluate, gate
from fssa_fast.commands.plot import plot
from fssa_fast.commands.reproduce import reproduce
from fssa_fast.commands.serve import key, serve

app = typer.Typer(
    name="fssa",
    help="Per-user steering of language models at the speed of the plain model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)  # so that --version needs no command
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from fssa_fast import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def doctor() -> None:
    """Print the environment report that a bug report needs."""
    from fssa_fast.report import environment

    typer.echo(environment())


@app.command()
def import_reference(
    directory: Annotated[Path, typer.Argument(help="A checkpoint of the reference: config.yaml, model_best.pt.")],
    out: Annotated[Path, typer.Argument(help="Where to write it, as safetensors and JSON.")],
    base: Annotated[str | None, typer.Option(help="The base model's path, for a policy.")] = None,
) -> None:
    """Turn a checkpoint of the reference implementation of arXiv 2412.13998 into one of ours."""
    from fssa_fast.nn import RewardModel
    from fssa_fast.policy import SteerablePolicy
    from fssa_fast.policy.reference_checkpoint import read_reference

    found = read_reference(directory)
    if isinstance(found, RewardModel):
        found.save_pretrained(out)
    else:
        SteerablePolicy.from_reference(directory, base).save_pretrained(out)
    typer.echo(f"{out}: written")


app.add_typer(users.app, name="users")
app.add_typer(train.app, name="train")
app.add_typer(data.app, name="data")
app.add_typer(experiment.app, name="experiment")
app.command("eval")(evaluate)
for command in (generate.generate, chat.chat, ask, compare, gate, plot, reproduce, serve, key):
    app.command()(command)


def main() -> None:
    """Runs the command; errors that the user can mend are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
