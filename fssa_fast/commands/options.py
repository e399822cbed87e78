"""The options that commands share, and what they name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from fssa_fast.nn import RewardModel
    from fssa_fast.policy import SteerablePolicy

Policy = Annotated[str, typer.Argument(help="A saved policy: the folder with steering.json, or its name on the hub.")]
Device = Annotated[str | None, typer.Option(help="Where models run: cpu, cuda, cuda:1, ...; a GPU, if there is one.")]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the base model; its own, if not given.")
]
Base = Annotated[str | None, typer.Option(help="The base model's folder or hub name, if not as the policy says.")]
Embedder = Annotated[str | None, typer.Option(help="The embedder's folder or hub name, if not as the policy says.")]
_STORE = "The users' database: a file, made where there is none, or a URL postgresql://..."
StoreOption = Annotated[str | None, typer.Option(help=_STORE)]
Store = Annotated[str, typer.Option(help=_STORE)]


def warn_outside(model: RewardModel, options: Tensor, where: str) -> None:
    """Says on the error stream which features of options [..., E] are beyond those seen in training."""
    found = model.outside(options)
    if found is not None:
        typer.echo(f"warning: {where}: the model extrapolates: {found}", err=True)


def placed(device: str | None, dtype: str | None) -> dict[str, Any]:
    """The options --device and --dtype as loaders of models take them. Raises ValueError for a device not there."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device: expected one that is here, such as cpu, got {device!r}: {reason}") from None
    return {"device_map": device, "dtype": None if dtype is None else getattr(torch, dtype)}


def load_policy(
    directory: str, base: str | None, embedder: str | None, store: str | None, room: int = 64, **where: Any
) -> SteerablePolicy:
    """The policy on its base model, with its users in that store; room for so many of them at once; where: `placed`."""
    from fssa_fast.policy import SteerablePolicy

    policy = SteerablePolicy.from_pretrained(directory, base, embedder=embedder, capacity=room, **where)
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
