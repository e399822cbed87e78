"""The options that commands share, and what they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from fssa_fast.nn import RewardModel
    from fssa_fast.policy import SteerablePolicy

Policy = Annotated[Path, typer.Argument(help="A saved policy: the folder with steering.json.")]
Base = Annotated[str | None, typer.Option(help="The base model's path, if not the one that the policy names.")]
Embedder = Annotated[str | None, typer.Option(help="The embedder's path, if not the one that the policy names.")]
_STORE = "The users' database: a file, made where there is none, or a URL postgresql://..."
StoreOption = Annotated[str | None, typer.Option(help=_STORE)]
Store = Annotated[str, typer.Option(help=_STORE)]


def warn_outside(model: RewardModel, options: Tensor, where: str) -> None:
    """Says on the error stream which features of options [..., E] are beyond those seen in training."""
    found = model.outside(options)
    if found is not None:
        typer.echo(f"warning: {where}: the model extrapolates: {found}", err=True)


def load_policy(
    directory: Path, base: str | None, embedder: str | None, store: str | None, room: int = 64
) -> SteerablePolicy:
    """The policy on its base model, with its users in that store; room for so many of them at once."""
    from fssa_fast.policy import SteerablePolicy

    policy = SteerablePolicy.from_pretrained(directory, base, embedder=embedder, capacity=room)
    if store is not None:
        policy.use_store(store)
    return policy


def named(option: str, given: list[str] | None) -> Iterator[tuple[str, str]]:
    """The parts of values such as "name=value"."""
    for one in given or ():
        name, sign, value = one.partition("=")
        if not sign:
            raise ValueError(f"{option}: expected NAME=..., got {one!r}")
        yield name, value
