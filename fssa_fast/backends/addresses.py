"""Tensors as the native code takes them: addresses, strides and sizes, in the groups of csrc/fssa.h.

Views are taken as they are where the elements of a row are neighbours, and copied where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fssa_fast.arguments import INNER, POOLING

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor as [rows, width], the elements of a row adjacent: a view where its strides allow."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def at(rows: Tensor) -> tuple[int, int]:
    """Where a matrix begins and how far apart its rows are, in elements."""
    return rows.data_ptr(), rows.stride(0)


def slots_of(slots: Tensor, rows: int, limit: int) -> tuple[int, bool, int, int, int]:
    """The slots, contiguous, as the core takes them."""
    count = slots.numel()
    return slots.data_ptr(), slots.dtype == torch.int64, count, rows // count if count else 1, limit


def new_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def modulation_of(gamma: Tensor, beta: Tensor | None) -> tuple[tuple[int, int], tuple[int, int], int]:
    """A `fssa_modulation` of matrices with adjacent columns, or of a gamma whose row is one number, expanded."""
    return at(gamma), (0, 0) if beta is None else at(beta), gamma.stride(1)


def gamma_rows(gamma: Tensor) -> Tensor:
    """gamma as `modulation_of` takes it."""
    return gamma if gamma.stride(1) == 0 else rows_of(gamma)


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


class ContextInput(NamedTuple):
    """A `fssa_context_input`, by tensors that are contiguous."""

    pairs: Tensor
    choices: Tensor
    offsets: Tensor
    weights: list[Tensor | None]
    encoder: tuple[int, ...]  # E, H, Z, heads, inner, pooling

    @classmethod
    def of(
        cls, pairs: Tensor, choices: Tensor, offsets: Tensor, weights: Sequence[Tensor | None], inner: str,
        pooling: str, heads: int,
    ) -> ContextInput:  # fmt: skip
        """The arguments of the op `context`."""
        first, last = weights[0], weights[-2]
        assert first is not None and last is not None
        return cls(
            pairs.contiguous(), choices.long().contiguous(), offsets.to(pairs.device).long().contiguous(),
            [weight if weight is None else weight.contiguous() for weight in weights],
            (pairs.shape[2], len(first), len(last), heads, INNER.index(inner), POOLING.index(pooling)),
        )  # fmt: skip

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    def group(self, threads: int) -> tuple[object, ...]:
        """As the core takes it, with so many threads."""
        pairs, choices, offsets, weights, encoder = self
        where = pairs.data_ptr(), choices.data_ptr(), offsets.data_ptr(), addresses(weights)
        return CODES[pairs.dtype], len(pairs), self.users, encoder, *where, threads
