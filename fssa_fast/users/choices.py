"""A user's choices, as texts or as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from fssa_fast.users.embedder import TextEmbedder


@dataclass(frozen=True)
class Choice:
    """One choice: `chosen` was preferred to `rejected`, as answers to `prompt`.

    Both are texts, or both embeddings [E] (then prompt is not used: it is part of what was embedded).
    """

    chosen: str | Tensor
    rejected: str | Tensor
    prompt: str = ""

    def __post_init__(self) -> None:
        chosen, rejected = self.chosen, self.rejected
        if isinstance(chosen, str) and isinstance(rejected, str):
            same = chosen == rejected
        elif _is_embedding(chosen) and _is_embedding(rejected):
            same = chosen.shape == rejected.shape and torch.equal(chosen, rejected)
        else:
            raise TypeError(
                f"choice: expected two texts or two floating embeddings, got {_kind(chosen)} and {_kind(rejected)}"
            )
        if same:
            raise ValueError("choice: expected two different options, got a thing and itself")
        if not isinstance(self.prompt, str):
            raise TypeError(f"choice: expected a text for prompt, got {_kind(self.prompt)}")
        for name, text in (("chosen", chosen), ("rejected", rejected), ("prompt", self.prompt)):
            try:
                _ = text.encode() if isinstance(text, str) else b""
            except UnicodeEncodeError as error:
                raise ValueError(f"choice: expected Unicode for {name}, got half of a surrogate pair") from error


def _is_embedding(option: object) -> TypeGuard[Tensor]:
    return isinstance(option, Tensor) and option.is_floating_point()


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def embed_choices(choices: Sequence[Choice], width: int, embedder: TextEmbedder | None) -> Tensor:
    """The choices as pairs [K, 2, E] in float32, chosen first.

    Raises TypeError for what is no sequence of choices; ValueError for texts without an embedder, embeddings of another
    width, NaN or infinite ones.
    """
    if not isinstance(choices, Sequence) or not all(isinstance(choice, Choice) for choice in choices):
        raise TypeError(f"choices: expected a sequence of Choice, got {choices!r:.80}")
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
            pairs[k, side] = vector.detach()
            if not torch.isfinite(pairs[k, side]).all():
                raise ValueError(f"choices[{k}].{name}: expected numbers finite in float32, got NaN or infinity")
    return pairs
