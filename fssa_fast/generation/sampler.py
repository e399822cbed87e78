"""The sampling of an engine's rows: what is kept for each between steps, and a step's tokens from its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fssa_fast.generation.native_draw import NativeDraw
from fssa_fast.generation.sampling import MAX_BIASED, Knobs, Sampling, likeliest
from fssa_fast.generation.which_draw import which_draw

# What a row asks for: a step does only what one of its rows asks for, and to these rows alone.
PENALISED, BIASED, MASKED, FOLLOWED, SAMPLED, FILTERED, LOGPROBS = (1 << i for i in range(7))
CHANGED = PENALISED | BIASED | MASKED  # the logits themselves


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities in the model's own distribution: the token's, and those of the likeliest, the highest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class _Rows:
    """A step's rows, what each asks for, what any of them does, and the rows on the device."""

    rows: np.ndarray
    kinds: np.ndarray
    asked: int
    where: Tensor


class Sampler:
    """R rows, each given to one request after another, in tensors that stay where they are.

    Args:
        rows: R. vocabulary: V, how many logits a token has. max_length: of a request, prompt and answer.
    """

    def __init__(self, rows: int, vocabulary: int, max_length: int, device: torch.device) -> None:
        self._shape, self._vocabulary, self._device = (rows, max_length), vocabulary, device
        self._kinds = np.zeros(rows, dtype=np.uint8)
        self._logprobs = np.zeros(rows, dtype=np.int64)
        self._knobs = Knobs.new(rows, device)
        self._draw = which_draw(device)
        self._penalties: _Penalties | None = None  # these three: made when a request first asks for one
        self._biases: tuple[Tensor, Tensor] | None = None
        self._forbidden: Tensor | None = None
        self._last: _Rows | None = None  # of the last step: the same rows mostly come again

    def assign(
        self, row: int, sampling: Sampling, seed: int, tokens: Sequence[int], prompt_length: int, followed: bool
    ) -> None:
        """Gives a row to a request that has these tokens, of which the first `prompt_length` are its prompt.

        followed: whether a grammar gives the row another mask in every step.
        """
        self._last = None
        knobs, kinds = self._knobs, FOLLOWED if followed else 0
        knobs.temperature[row] = sampling.temperature
        knobs.min_p[row], knobs.top_k[row], knobs.top_p[row] = sampling.min_p, sampling.top_k, sampling.top_p
        knobs.seed[row] = seed
        if sampling.temperature > 0:
            kinds |= SAMPLED | (FILTERED if sampling.top_k or sampling.top_p < 1 else 0)
        if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0):
            kinds |= PENALISED
            if self._penalties is None:
                self._penalties = _Penalties(*self._shape, self._device)
            self._penalties.assign(row, sampling, tokens, prompt_length)
        if sampling.logit_bias:
            kinds |= BIASED
            self._bias(row, sampling.logit_bias)
        if sampling.allowed_tokens is not None:
            self.mask(row, mask_of(sampling.allowed_tokens, self._vocabulary))
            kinds |= MASKED
        if sampling.logprobs is not None:
            kinds |= LOGPROBS
            self._logprobs[row] = sampling.logprobs
        self._kinds[row] = kinds

    def mask(self, row: int, mask: np.ndarray) -> None:
        """Lets a row draw only the tokens whose bits are set in its mask, int32 [V / 32]."""
        if self._forbidden is None:
            size = self._shape[0], self._vocabulary
            self._forbidden = torch.zeros(size, dtype=torch.bool, device=self._device)
        allowed = np.unpackbits(mask.view(np.uint8), count=self._vocabulary, bitorder="little")
        self._forbidden[row] = torch.from_numpy(allowed == 0)
        if not self._kinds[row] & MASKED:
            self._last = None
            self._kinds[row] |= MASKED

    def followed(self, rows: np.ndarray) -> list[int]:
        """Those of the rows that have a grammar."""
        known = self._rows(rows)
        return rows[(known.kinds & FOLLOWED) != 0].tolist() if known.asked & FOLLOWED else []

    def sample(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray) -> list[int]:
        """The next token of each row, -1 where its logits are not finite.

        Args:
            logits: [m, V]. rows, positions: int32 [m], of each row's last token.
        """
        known, at = self._rows(rows), self._on_device(positions)
        kinds, asked, where = known.kinds, known.asked, known.where
        if not asked & (CHANGED | SAMPLED) and not isinstance(self._draw, NativeDraw):  # which sees it row by row
            return likeliest(logits).tolist()
        if not asked & CHANGED:
            return self._draw(logits, self._knobs, where, at, bool(asked & FILTERED)).tolist()
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for changes in (False, True):
            which = ((kinds & CHANGED) != 0) == changes
            if not which.any():
                continue
            some = torch.from_numpy(np.flatnonzero(which)).to(self._device)
            scores = logits[some]
            if changes:
                scores = scores.float()
                self._change(scores, rows[which], kinds[which], positions[which])
            tokens[some] = self._draw(scores, self._knobs, where[some], at[some], bool(asked & FILTERED))
        if asked & PENALISED:
            some = torch.from_numpy(np.flatnonzero(kinds & PENALISED)).to(self._device)
            assert self._penalties is not None
            self._penalties.record(where[some], at[some] + 1, tokens[some])
        return tokens.tolist()

    def logprobs(self, logits: Tensor, rows: np.ndarray, tokens: Sequence[int]) -> Iterator[tuple[int, TokenLogprobs]]:
        """For each row that asked for them, its index and the log-probabilities of its token; `tokens` as drawn."""
        known = self._rows(rows)
        if not known.asked & LOGPROBS:
            return
        which = [i for i in np.flatnonzero(known.kinds & LOGPROBS).tolist() if tokens[i] >= 0]
        if not which:
            return
        found = logits[torch.tensor(which, device=self._device)].float().log_softmax(-1)
        chosen = found.gather(1, torch.tensor([[tokens[i]] for i in which], device=self._device))[:, 0].tolist()
        counts = [int(self._logprobs[rows[i]]) for i in which]
        values, ids = (part.tolist() for part in found.topk(min(max(counts), self._vocabulary)))
        for i, own, count, best, names in zip(which, chosen, counts, values, ids, strict=True):
            yield i, TokenLogprobs(tokens[i], own, tuple(zip(names[:count], best[:count], strict=True)))

    def _rows(self, rows: np.ndarray) -> _Rows:
        """What is known of a step's rows, an array that nobody writes to again."""
        if self._last is None or self._last.rows is not rows:
            kinds = self._kinds[rows]
            self._last = _Rows(rows, kinds, int(np.bitwise_or.reduce(kinds)), self._on_device(rows))
        return self._last

    # ------------------------------------------------------------ changes of the logits

    def _change(self, scores: Tensor, rows: np.ndarray, kinds: np.ndarray, positions: np.ndarray) -> None:
        """Biases, penalties and masks on scores [k, V], float32, in place."""

        def those(kind: int, change: Callable[[Tensor, Tensor], Tensor]) -> None:
            which = np.flatnonzero(kinds & kind)
            if len(which):
                some = torch.from_numpy(which).to(self._device)
                scores[some] = change(scores[some], self._on_device(rows[which]).long())

        those(BIASED, self._biased)
        lengths = self._on_device(positions[(kinds & PENALISED) != 0] + 1)
        those(PENALISED, lambda x, where: self._penalised(x, where, lengths, int(positions.max()) + 1))
        those(MASKED, self._masked)

    def _biased(self, scores: Tensor, rows: Tensor) -> Tensor:
        assert self._biases is not None
        return scores.scatter_add_(1, self._biases[0][rows], self._biases[1][rows])

    def _penalised(self, scores: Tensor, rows: Tensor, lengths: Tensor, longest: int) -> Tensor:
        assert self._penalties is not None
        return self._penalties.apply(scores, rows, lengths, longest)

    def _masked(self, scores: Tensor, rows: Tensor) -> Tensor:
        assert self._forbidden is not None
        return scores.masked_fill_(self._forbidden[rows], float("-inf"))

    def _bias(self, row: int, bias: object) -> None:
        if self._biases is None:
            size = self._shape[0], MAX_BIASED
            self._biases = (
                torch.zeros(size, dtype=torch.int64, device=self._device), torch.zeros(size, device=self._device),
            )  # fmt: skip
        tokens, values = self._biases
        tokens[row], values[row] = 0, 0.0
        items = list(dict(bias).items())  # type: ignore[call-overload]
        tokens[row, : len(items)] = torch.tensor([token for token, _ in items])
        values[row, : len(items)] = torch.tensor([float(value) for _, value in items])

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class _Penalties:
    """The tokens that R rows have, prompt and answer, and what it costs a token to be among them."""

    def __init__(self, rows: int, max_length: int, device: torch.device) -> None:
        self._history = torch.zeros(rows, max_length, dtype=torch.int32, device=device)
        self._prompts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._repetition, self._presence, self._frequency = torch.zeros(3, rows, 1, device=device)

    def assign(self, row: int, sampling: Sampling, tokens: Sequence[int], prompt_length: int) -> None:
        self._history[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self._prompts[row] = prompt_length
        self._repetition[row] = sampling.repetition_penalty
        self._presence[row], self._frequency[row] = sampling.presence_penalty, sampling.frequency_penalty

    def record(self, rows: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Adds a token at a position of each row; where it is none, -1, or the row is full, nobody reads it."""
        last = self._history.shape[1] - 1
        self._history[rows.long(), positions.long().clamp(max=last)] = tokens.int().clamp(min=0)

    def apply(self, scores: Tensor, rows: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Scores [k, V] less the penalties, in place, for rows of these lengths [k].

        A token that is there several times is gathered and written as often, with the same value: the order does not
        matter. Places that do not count repeat one that does.
        """
        history, prompts = self._history[rows, :longest].long(), self._prompts[rows][:, None]
        lengths, index = lengths.long()[:, None], torch.arange(longest, device=scores.device)
        seen = torch.where(index < lengths, history, history[:, :1])
        x, by = scores.gather(1, seen), self._repetition[rows]
        scores.scatter_(1, seen, torch.where(x > 0, x / by, x * by))
        answered = lengths > prompts
        first = torch.where(answered, history.gather(1, prompts.clamp(max=longest - 1)), history[:, :1])
        counts = (index >= prompts) & (index < lengths)
        said = torch.where(counts, history, first)
        scores.scatter_add_(1, said, torch.where(counts, -self._frequency[rows], 0.0))
        return scores.scatter_(1, said, scores.gather(1, said) - torch.where(answered, self._presence[rows], 0.0))


def mask_of(tokens: Sequence[int], vocabulary: int) -> np.ndarray:
    """A mask, int32 [V / 32], whose bits are set for these tokens: the first token's is the lowest bit of the first."""
    allowed = np.zeros(-(-vocabulary // 32) * 32, dtype=bool)
    allowed[list(tokens)] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)
