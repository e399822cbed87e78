"""A user's choices, as texts or as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fssa_fast.steering.embedder import TextEmbedder


@dataclass(frozen=True)
class Choice:
    """One choice: `chosen` was preferred to `rejected`, as answers to `prompt`.

    Both are texts, or both embeddings [E] (then prompt is not used: it is part of what was embedded).
    """

    chosen: str | Tensor
    rejected: str | Tensor
    prompt: str = ""

    def __post_init__(self) -> None:
        kinds = isinstance(self.chosen, str), isinstance(self.rejected, str)
        if kinds[0] != kinds[1]:
            raise TypeError("choice: expected two texts or two embeddings, got one of each")
        same = self.chosen == self.rejected if kinds[0] else _equal(self.chosen, self.rejected)
        if same:
            raise ValueError("choice: expected two different options, got a thing and itself")


def _equal(a: str | Tensor, b: str | Tensor) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def embed_choices(choices: Sequence[Choice], width: int, embedder: TextEmbedder | None) -> Tensor:
    """The choices as pairs [K, 2, E] in float32, chosen first.

    Raises ValueError for texts without an embedder, embeddings of another width, NaN or infinite ones.
    """
    pairs = torch.empty(len(choices), 2, width)
    texts = [
        embedder_text
        for choice in choices
        if isinstance(choice.chosen, str) and isinstance(choice.rejected, str)
        for embedder_text in ((choice.prompt, choice.chosen), (choice.prompt, choice.rejected))
    ]
    if texts and embedder is None:
        raise ValueError("choices: expected embeddings, since this policy has no text embedder; got texts")
    embedded = iter(embedder.encode(texts)) if texts and embedder is not None else iter(())
    for k, choice in enumerate(choices):
        for side, (name, option) in enumerate((("chosen", choice.chosen), ("rejected", choice.rejected))):
            vector = next(embedded) if isinstance(option, str) else option
            if vector.shape != (width,):
                raise ValueError(
                    f"choices[{k}].{name}: expected an embedding of shape [{width}], got {list(vector.shape)}"
                )
            if not torch.isfinite(vector).all():
                raise ValueError(f"choices[{k}].{name}: expected finite numbers, got NaN or infinity")
            pairs[k, side] = vector.detach()
    return pairs
