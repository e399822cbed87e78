"""How a request's next token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CANDIDATES = 128


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token. top_k 0 and top_p 1 keep all tokens. seed None draws one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a finite number, at least 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {self.top_k!r}")


class Sampler:
    """Draws the tokens of one request, with a generator of its own: the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """A token by its logits [V], which are finite or -inf; on the CPU."""
        sampling = self.sampling
        scores = logits.float() / sampling.temperature
        if not sampling.top_k and sampling.top_p == 1:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        # The likeliest tokens alone: sorting the whole vocabulary would take longer than a step of a small model.
        count = min(sampling.top_k or _CANDIDATES, len(scores))
        while True:
            top, tokens = scores.topk(count)
            probabilities = (top - (top if sampling.top_k else scores).logsumexp(0)).exp()
            before = probabilities.cumsum(0) - probabilities
            if sampling.top_k or count == len(scores) or before[-1] >= sampling.top_p:
                break
            count = min(8 * count, len(scores))
        # A token stays where those before it add up to less than top_p: the first always does.
        probabilities[before >= sampling.top_p] = 0
        return int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])
