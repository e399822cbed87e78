"""A user's pooled choices, kept so that one more costs O(K H) instead of encoding all K again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_fast.nn import ContextEncoder
from fssa_fast.ops import latent_of


class GrowingContext:
    """The context encoder's state after a user's choices, exact: its latent is that of encoding them all together.

    Attention is a softmax over the keys for every query. Of each query the running maximum, denominator and accumulator
    are kept, so a new choice changes them by its key and value, and adds a query of its own. Memory: 4 K H numbers.

    Args: encoder: in evaluation; its weights must stay as they are while this object is used.
    """

    def __init__(self, encoder: ContextEncoder) -> None:
        self._encoder = encoder
        self.count = 0
        weight = encoder.inner0.weight
        self._sum = weight.new_zeros(encoder.latent_width)
        self._heads = encoder.heads if encoder.qkv is not None else 0
        self._tables: list[Tensor] = []
        if self._heads:
            self._room(16)

    def _room(self, size: int) -> None:
        """Tables of queries, keys, values and accumulators [heads, size, width], maxima and denominators."""
        heads, width = self._heads, self._encoder.latent_width // self._heads
        new = self._sum.new_zeros
        tables = [new(heads, size, width) for _ in range(4)] + [new(heads, size) for _ in range(2)]
        if self.count:
            for table, old in zip(tables, self._tables, strict=True):
                table[:, : self.count] = old[:, : self.count]
        self._tables, self._size = tables, size

    @torch.no_grad()
    def append(self, pairs: Tensor) -> None:
        """Adds choices: pairs [n, 2, E], chosen first. n times O(K H); the first ones all at once, O(n^2 H)."""
        encoder = self._encoder
        h = F.linear(pairs.to(self._sum).flatten(1), encoder.inner0.weight, encoder.inner0.bias)
        if encoder.inner1 is not None:
            h = encoder.inner1(h.relu())
        if encoder.qkv is None:
            self._sum += h.sum(0)
            self.count += len(h)
            return
        rows = encoder.qkv(h).view(len(h), 3, self._heads, encoder.latent_width // self._heads)
        if self.count:
            for row in rows:
                self._attend(*row)
        else:
            self._begin(rows)

    def _begin(self, rows: Tensor) -> None:
        """The state after the first n choices, whose queries, keys and values are rows [n, 3, heads, width]."""
        n = len(rows)
        if n > self._size:
            self._room(2 * n)
        queries, keys, values, sums = (table[:, :n] for table in self._tables[:4])
        highest, totals = (table[:, :n] for table in self._tables[4:])
        for table, new in zip((queries, keys, values), rows.permute(1, 2, 0, 3), strict=True):
            table.copy_(new)
        for start in range(0, n, 512):  # so many queries' scores at once
            some = slice(start, start + 512)
            scores = torch.bmm(queries[:, some], keys.mT).mul_(queries.shape[-1] ** -0.5)
            highest[:, some] = scores.amax(-1)
            weights = scores.sub_(highest[:, some].unsqueeze(-1)).exp_()
            totals[:, some] = weights.sum(-1)
            sums[:, some] = torch.bmm(weights, values)
        self.count = n

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.count == self._size:
            self._room(2 * self._size)
        n, scale = self.count, query.shape[-1] ** -0.5
        queries, keys, values, sums = (table[:, :n] for table in self._tables[:4])
        highest, totals = (table[:, :n] for table in self._tables[4:])
        # What the new key and value change for the queries before: [heads, n].
        scores = torch.bmm(key.unsqueeze(1), queries.mT).squeeze(1).mul_(scale)
        if (scores > highest).any():
            higher = torch.maximum(scores, highest)
            shrink = (highest - higher).exp_()
            sums.mul_(shrink.unsqueeze(-1))
            totals.mul_(shrink)
            highest.copy_(higher)
        weights = (scores - highest).exp_()
        totals.add_(weights)
        sums.addcmul_(weights.unsqueeze(-1), value.unsqueeze(1))
        # The new query, over all keys with its own.
        for table, new in zip(self._tables[:3], (query, key, value), strict=True):
            table[:, n] = new
        keys, values = (table[:, : n + 1] for table in self._tables[1:3])
        scores = torch.bmm(query.unsqueeze(1), keys.mT).squeeze(1).mul_(scale)
        top = scores.max(-1, keepdim=True).values
        weights = (scores - top).exp_()
        self._tables[3][:, n] = torch.bmm(weights.unsqueeze(1), values).squeeze(1)
        self._tables[4][:, n] = top.squeeze(-1)
        self._tables[5][:, n] = weights.sum(-1)
        self.count = n + 1

    @torch.no_grad()
    def latent(self) -> Tensor:
        """The latent [H], the mean where latents are sampled. O(K H)."""
        encoder, count = self._encoder, self.count
        pooled = self._sum
        if encoder.out is not None and count:
            sums, totals = self._tables[3][:, :count], self._tables[5][:, :count]
            attended = torch.bmm(totals.reciprocal().unsqueeze(1), sums).flatten()
            pooled = F.linear(attended, encoder.out.weight) + count * encoder.out.bias
        elif encoder.pooling == "mean" and count:
            pooled = pooled / count
        return latent_of(encoder.outer1(encoder.outer0(pooled).relu()), encoder.latent_width)
