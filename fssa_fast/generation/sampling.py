"""How the next tokens of many rows are drawn from their logits, each row by knobs and a seed of its own.

`draw` is the definition, in PyTorch, for every device: a fixed number of operations on tensors at fixed addresses, and
nothing read by the host, so that a CUDA graph can hold it. On the CPU the native core draws (which_draw.py).

A row's draw depends on its logits, its knobs, its seed and its position alone. Probabilities are held as integers,
2^34 for the likeliest token, so that a sum is the same in whatever order it is taken; the random number of a position
is a hash of seed and position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import torch
from torch import Tensor

ONE = float(1 << 34)  # the likeliest token's weight: 2^18 of them, a large vocabulary, are still exact in float64
MAX_BIASED = 1024
MAX_LOGPROBS = 20


class SamplingOptions(TypedDict, total=False):
    """`Sampling`'s fields, for signatures that take them by name."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    allowed_tokens: Sequence[int] | None
    seed: int | None
    logprobs: int | None


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; the meaning of each knob is vLLM's, and OpenAI's where OpenAI has it.

    In this order:
    logit_bias: token ids to what is added to their logits, in [-100, 100].
    repetition_penalty: the logit of a token in prompt or answer is divided by it where positive, else multiplied.
    frequency_penalty, presence_penalty: subtracted from a token's logit for each time that it is in the answer, and
        once if it is in the answer at all; in [-2, 2].
    allowed_tokens: no other token can be drawn (not even the one that ends an answer, unless it is among them).
    temperature: logits are divided by it; 0 takes the likeliest token, the first of several, and ends here.
        0, or 1e-5 to 1e5: beyond, float32 cannot tell tokens apart.
    min_p: drops tokens less likely than this share of the likeliest one's probability.
    top_k: keeps that many of the likeliest tokens; 0: all. top_p: keeps the likeliest of those left that have this
        share of their probability. Tokens as likely as the last one that is kept are kept.
    seed: of the random numbers; None draws one.
    logprobs: also gives the chosen token's log-probability, and that of so many of the likeliest tokens: of the
        model's distribution, before all of these knobs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_tokens: Sequence[int] | None = None
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not (_within(self.temperature, 1e-5, 1e5) or (_is_number(self.temperature) and self.temperature == 0)):
            raise ValueError(f"temperature: expected 0 or a number in [1e-5, 1e5], got {self.temperature!r}")
        if not _within(self.top_p, 0, 1) or self.top_p == 0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if not _is_number(self.top_k, Integral) or not 0 <= self.top_k < 1 << 31:
            raise ValueError(f"top_k: expected an integer in [0, 2**31), got {self.top_k!r}")
        for name, low, high in _RANGES:
            if not _within(getattr(self, name), low, high):
                raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {getattr(self, name)!r}")
        if self.seed is not None and not (_is_number(self.seed, Integral) and 0 <= self.seed < 1 << 63):
            raise ValueError(f"seed: expected None or an integer in [0, 2**63), got {self.seed!r}")
        if self.logprobs is not None and not (
            _is_number(self.logprobs, Integral) and 0 <= self.logprobs <= MAX_LOGPROBS
        ):
            raise ValueError(f"logprobs: expected None or an integer in [0, {MAX_LOGPROBS}], got {self.logprobs!r}")

    def check_tokens(self, vocabulary: int) -> None:
        """Raises TypeError or ValueError for what is no token in `logit_bias` and `allowed_tokens`."""
        bias, allowed = self.logit_bias, self.allowed_tokens
        if bias is not None:
            if not isinstance(bias, Mapping) or len(bias) > MAX_BIASED:
                raise TypeError(f"logit_bias: expected at most {MAX_BIASED} token ids with numbers, got {bias!r:.80}")
            for value in bias.values():
                if not _within(value, -100, 100):
                    raise ValueError(f"logit_bias: expected numbers in [-100, 100], got {value!r}")
        if allowed is not None and (not isinstance(allowed, Sequence) or isinstance(allowed, str | bytes)):
            raise TypeError(f"allowed_tokens: expected a list of token ids, got {allowed!r:.80}")
        if allowed is not None and not allowed:
            raise ValueError("allowed_tokens: expected at least one token id, got none")
        for name, tokens in (("logit_bias", bias or ()), ("allowed_tokens", allowed or ())):
            for token in tokens:
                if not _is_number(token, Integral) or not 0 <= token < vocabulary:
                    raise ValueError(f"{name}: expected token ids in [0, {vocabulary}), got {token!r}")


_RANGES = (
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
)


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _within(value: object, low: float, high: float) -> bool:
    return _is_number(value) and low <= value <= high  # type: ignore[operator]  # NaN is within nothing


_DTYPES = {
    "temperature": torch.float32,
    "min_p": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "seed": torch.int64,
}


@dataclass(frozen=True)
class Knobs:
    """The knobs of `draw` for R rows, each a tensor [R], contiguous, that stays where it is.

    Raises: TypeError, ValueError for another dtype, shape or device.
    """

    temperature: Tensor  # float32
    min_p: Tensor
    top_k: Tensor  # int32
    top_p: Tensor  # float64
    seed: Tensor  # int64

    def __post_init__(self) -> None:
        like = self.temperature
        for name, dtype in _DTYPES.items():
            values = getattr(self, name)
            if values.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {values.dtype}")
            if values.dim() != 1 or values.shape != like.shape or not values.is_contiguous():
                raise ValueError(f"{name}: expected one for each row, contiguous, got shape {list(values.shape)}")
            if values.device != like.device:
                raise ValueError(f"{name}: expected device {like.device}, got {values.device}")

    @classmethod
    def new(cls, rows: int, device: torch.device) -> Knobs:
        """Knobs that take the likeliest token."""
        made = {name: torch.zeros(rows, dtype=dtype, device=device) for name, dtype in _DTYPES.items()}
        made["top_p"].fill_(1.0)
        return cls(**made)


def draw(logits: Tensor, knobs: Knobs, rows: Tensor, positions: Tensor, filtered: bool = True) -> Tensor:
    """The next token of each row: the definition.

    Args:
        logits: [m, V], finite, or -inf for what cannot be drawn. rows: of the knobs, int32 [m].
        positions: of the token before, int32 [m]: a position's random number is drawn once.
        filtered: False where no row has a top_k or a top_p.

    Returns: token ids, int64 [m]; -1 for a row whose highest logit is NaN or infinite.
    """
    temperature, min_p, top_k, top_p, seed = (
        values[rows.long()] for values in (knobs.temperature, knobs.min_p, knobs.top_k, knobs.top_p, knobs.seed)
    )
    scores = logits.float()
    highest = scores.amax(1)
    below = highest[:, None] - scores
    greedy = temperature == 0
    shares = torch.exp(-(below / torch.where(greedy, 1.0, temperature)[:, None]))
    weights = torch.where(shares < min_p[:, None], 0.0, shares * ONE).to(torch.int64)
    if filtered:
        distances = below.view(torch.int32)  # numbers that are not negative are in the order of their bits
        count = torch.where(top_k > 0, top_k, logits.shape[1]).long()
        last = _least(distances, torch.ones_like(weights), count)
        weights = torch.where(distances <= last[:, None], weights, 0)
        last = _least(distances, weights, torch.ceil(top_p * weights.sum(1)).long())
        weights = torch.where(distances <= last[:, None], weights, 0)
    reached = (uniform(seed, positions) * weights.sum(1)).long()
    drawn = (weights.cumsum(1) <= reached[:, None]).sum(1)
    return torch.where(torch.isfinite(highest), torch.where(greedy, below.argmin(1), drawn), -1)


def likeliest(logits: Tensor) -> Tensor:
    """What `draw` gives where all temperatures are 0: token ids, int64 [m], or -1."""
    highest, tokens = logits.max(1)
    return torch.where(torch.isfinite(highest), tokens, -1)


def _least(distances: Tensor, amounts: Tensor, wanted: Tensor) -> Tensor:
    """The least distance [m] up to which a row's amounts [m, V] add up to what is wanted [m], found bit by bit."""
    found = torch.zeros_like(wanted, dtype=torch.int32)
    for bit in range(30, -1, -1):
        trial = found | (1 << bit)
        short = torch.where(distances < trial[:, None], amounts, 0).sum(1) < wanted
        found = torch.where(short, trial, found)
    return found


def uniform(seed: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1), float64, for each seed (int64) and position: SplitMix64's, whose counter is the position."""
    state = _mixed(_mixed(seed + _GOLDEN) + (positions.long() + 1) * _GOLDEN)
    return _shifted(state, 11).double() * 2.0**-53


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # of int64 as if it had no sign


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)
