"""`fssa ask`: which question to put to a user next, and what asking well is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def ask(
    run: Annotated[Path, typer.Argument(help="The run of a reward model with sampled latents.")],
    known: Annotated[Path, typer.Argument(help="The user's choices so far, as a file of choices; may be empty.")],
    pool: Annotated[Path, typer.Argument(help="Pairs that may be asked, as a file of choices; order does not matter.")],
    top: Annotated[int, typer.Option(min=1, help="How many to print, best first.")] = 5,
    embedder: Annotated[str | None, typer.Option(help="The text encoder, where options are texts.")] = None,
    pooling: Annotated[Literal["mean", "first", "last"], typer.Option(help="Its pooling.")] = "mean",
) -> None:
    """Print the pairs whose answers would tell most about a user, with the information expected, in nats."""
    import torch

    from fssa_fast.data.files import Choice, read_choices
    from fssa_fast.data.lines import DataError
    from fssa_fast.evaluation.questions import expected_information
    from fssa_fast.nn import NPBTL
    from fssa_fast.users import TextEmbedder

    model = NPBTL.from_pretrained(run)
    encoder = None if embedder is None else TextEmbedder.from_pretrained(embedder, pooling=pooling)

    def pairs_of(choices: list[Choice], path: Path) -> torch.Tensor:
        if any(isinstance(choice.chosen, str) for choice in choices):
            if encoder is None:
                raise DataError(f"{path}: expected features, since no embedder was named; got texts")
            texts = [(c.prompt, str(option)) for c in choices for option in (c.chosen, c.rejected)]
            return encoder.encode(texts).view(len(choices), 2, -1)
        found = torch.tensor([[choice.chosen, choice.rejected] for choice in choices])
        return found if len(choices) else torch.empty(0, 2, model.embedding_width)

    asked = read_choices(pool)
    answered = read_choices(known) if known.read_bytes().strip() else []
    information = expected_information(model, pairs_of(answered, known), pairs_of(asked, pool))
    for i in information.argsort(descending=True)[:top].tolist():
        choice = asked[i]
        typer.echo(f"{float(information[i]):.4f}\tline {choice.line}\t{choice.chosen}\t{choice.rejected}")
