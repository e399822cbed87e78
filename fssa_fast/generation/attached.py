"""A policy's model as it is, with what the engine asks of a fused form: for models that have none.

One request at a time, with a cache that the model itself makes: whatever it keeps, keys and values or a state, belongs
to that request alone. That is right for every model that returns what it keeps, and not made to be fast.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fssa_fast.generation.cache import BLOCK
from fssa_fast.generation.steered import Steered

CACHES = ("cache", "past_key_values", "cache_params")  # the names that transformers' models have for what they keep


class _Kept:
    """One request's: what the model returned to be handed back, and the tokens that it has not seen yet."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.tokens: list[int] = []


class AttachedCache:
    """What the model keeps for up to S requests. Blocks only count tokens: the model allocates as it goes."""

    shares_prefixes = False

    def __init__(self, sequences: int, max_length: int, blocks: int) -> None:
        self.max_length, self.block, self.blocks = max_length, BLOCK, 1 + blocks
        self.kept = [_Kept() for _ in range(sequences)]

    def assign(self, sequence: int, blocks: list[int]) -> None:
        """Nothing: a request's cache grows by itself."""

    def release(self, sequence: int) -> None:
        """Lets go what is kept for a request that has ended or is put back."""
        self.kept[sequence] = _Kept()


class AttachedModel:
    """The attached form, for `Engine`.

    A prompt is computed at once, when its last token comes: recurrent models do not take one in pieces.

    Raises: ValueError for a model that does not return what it keeps between tokens, at its first token.
    """

    cache_block = BLOCK

    def __init__(self, policy: Steered) -> None:
        self.policy, self.model, self.device = policy, policy.model, policy.device
        config = policy.model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.max_positions: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.turn = threading.RLock()
        takes = inspect.signature(policy.model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in takes:
            self._options["logits_to_keep"] = 1

    def new_cache(self, sequences: int, max_length: int, blocks: int) -> AttachedCache:
        """A cache for that many requests of at most max_length tokens, and of so many blocks in all."""
        return AttachedCache(sequences, max_length, blocks)

    def check(self) -> None:
        """Nothing: the model is asked as it is."""

    def warm_up(self, cache: AttachedCache, rows: int, tokens: int) -> Iterator[int]:
        """Nothing: the model runs as it is."""
        return iter(())

    def forget(self, cache: AttachedCache) -> None:
        """Nothing: all that is kept for a cache is in it."""

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        sequences: Tensor,
        positions: Tensor,
        cache: AttachedCache,
        logits_of: Tensor | None = None,
    ) -> Tensor:
        """As `FusedModel.forward`; logits are asked for of the last tokens of sequences alone."""
        rows = sequences.tolist()
        for row, token, position in zip(rows, ids.tolist(), positions.tolist(), strict=True):
            if position == 0:
                cache.release(row)
            cache.kept[row].tokens.append(token)
        asked = range(len(rows)) if logits_of is None else logits_of.tolist()
        found = [self._next(cache.kept[rows[i]], slots[i : i + 1]) for i in asked]
        return torch.cat(found) if found else torch.empty(0, self.vocabulary, device=self.device)

    def _next(self, kept: _Kept, slot: Tensor) -> Tensor:
        """The logits [1, V] after a request's tokens."""
        tokens, kept.tokens = torch.tensor([kept.tokens], device=self.device), []
        with self.policy.serve(None, slot):
            output = self.model(tokens, **kept.arguments, **self._options)
        name = next((name for name in CACHES if output.get(name) is not None), None)
        if name is None:
            raise ValueError(
                f"model: expected one that returns what it keeps as {' or '.join(CACHES)}, got "
                f"{type(self.model).__name__}, which returns {', '.join(output.keys())}"
            )
        kept.arguments = {name: output[name]}
        return output.logits[:, -1]
