"""`fssa train reward|policy CONFIG`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a reward model or a policy, as a YAML file says.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Argument(help="YAML; README and examples/ show one.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key.in.config=value, over the file; repeatable.")]
Resume = Annotated[bool, typer.Option(help="Go on from the run's last whole checkpoint, where there is one.")]


@app.command()
def reward(config: ConfigFile, settings: Set = None, resume: Resume = False) -> None:
    """Train a reward model (np-btl, btl, dpl) on choices."""
    from fssa_fast.data.choices import split_users
    from fssa_fast.data.files import choice_data, read_choices
    from fssa_fast.records import file_hash
    from fssa_fast.training.config import RewardRun, read_run_config
    from fssa_fast.training.fit import fit_reward

    run = read_run_config(RewardRun, config, settings or ())
    embedder = run.data.load_embedder()
    embed = None if embedder is None else embedder.encode
    data = choice_data(read_choices(run.data.path), embed, path=run.data.path)
    train, validation, test = split_users(len(data.users), run.data.split_seed, run.data.shares)
    model = fit_reward(
        run.model,
        data.of_users(train),
        data.of_users(validation) if validation else None,
        run.output,
        training=run.training,
        examples=run.examples,
        seed=run.seed,
        resume=resume,
        features=embedder is None,
        provenance={
            "config": asdict(run),
            "data": {"path": run.data.path, "sha256": file_hash(run.data.path)},
            "users": {
                "training": [data.users[i] for i in train],
                "validation": [data.users[i] for i in validation],
                "test": [data.users[i] for i in test],
            },
        },
    )
    typer.echo(f"{run.output}: {model.kind} trained")


@app.command()
def policy(config: ConfigFile, settings: Set = None, resume: Resume = False) -> None:
    """Train a policy by NP-DPO on choices between texts."""
    from fssa_fast.training.config import PolicyRun, read_run_config
    from fssa_fast.training.fit_policy import fit_policy

    run = read_run_config(PolicyRun, config, settings or ())
    fit_policy(run, resume=resume)
    typer.echo(f"{run.output}: policy trained")
