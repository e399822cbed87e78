"""How a request's next token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token. top_k 0 and top_p 1 keep all tokens. seed None draws one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a finite number, at least 0, got {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if not _is_number(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k: expected an integer, at least 0, got {self.top_k!r}")
        if self.seed is not None and not (_is_number(self.seed, Integral) and 0 <= self.seed < 1 << 63):
            raise ValueError(f"seed: expected None or an integer in [0, 2**63), got {self.seed!r}")


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


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
        if sampling.top_k and sampling.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -math.inf)
        probabilities = scores.softmax(-1)
        tokens = None
        if sampling.top_p < 1:
            probabilities, tokens = _likeliest(probabilities, sampling.top_p)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(drawn if tokens is None else tokens[drawn])


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens with their probabilities, each kept where those before it add up to less than top_p."""
    for count in (512, len(probabilities)):  # nearly always a few hundred do, and sorting all would take longer
        kept, tokens = probabilities.topk(min(count, len(probabilities)))
        before = kept.cumsum(0) - kept
        if before[-1] >= top_p:
            break
    return kept[before < top_p], tokens[before < top_p]
