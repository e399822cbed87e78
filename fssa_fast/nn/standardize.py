"""Features on one scale, by statistics of those a model was trained on; they are part of the model and of its file."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Shifts and scales features [..., E] to mean 0 and deviation 1 over those that it was `fitted` to.

    A feature that was constant there is 0 for its value. low and high, [E], are the least and the largest value seen.
    """

    mean: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("mean", "spread", "low", "high"):
            self.register_buffer(name, torch.empty(width))

    @classmethod
    def fitted(cls, options: Tensor) -> Self:
        """The statistics of options [n, E]. Raises ValueError where all are the same, for nothing tells them apart."""
        exact = options.double()
        spread = exact.std(0, correction=0)
        # Of a constant column the sums' rounding is left over.
        constant = exact.amin(0) == exact.amax(0)
        if constant.all():
            raise ValueError("options: expected different ones, got all the same")
        found = cls(options.shape[1])
        found.mean = exact.mean(0).to(options)
        found.spread = spread.masked_fill(constant, 1.0).to(options)
        found.low, found.high = options.amin(0), options.amax(0)
        return found

    def forward(self, options: Tensor) -> Tensor:
        return (options - self.mean.to(options)) / self.spread.to(options)

    def outside(self, options: Tensor) -> str | None:
        """Which features of options [..., E] are beyond those seen in training, by words; None where none is."""
        low, high = options.flatten(0, -2).amin(0), options.flatten(0, -2).amax(0)
        found = [
            f"feature {i + 1} from {low[i]:g} to {high[i]:g} (in training from {self.low[i]:g} to {self.high[i]:g})"
            for i in ((low < self.low.to(low)) | (high > self.high.to(high))).nonzero().flatten().tolist()
        ]
        return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "") if found else None
