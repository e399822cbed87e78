"""Tensors as the native code takes them: addresses, strides and sizes.

Views are taken as they are where the elements of a row are neighbours, and copied where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def gamma_of(gamma: Tensor) -> tuple[Tensor, int]:
    """gamma, and the distance of its columns: 0 where a row is one number, expanded."""
    if gamma.stride(1) == 0:
        return gamma, 0
    return rows_of(gamma), 1


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def encoder_of(
    pairs: Tensor, offsets: Tensor, weights: Sequence[Tensor | None], inner: str, pooling: str, heads: int
) -> tuple[int, ...]:
    """Sizes and kind of an encoder: (N, U, E, H, Z, heads, inner, pooling)."""
    first, last = weights[0], weights[-2]
    assert first is not None and last is not None
    return (
        pairs.shape[0], offsets.shape[0] - 1, pairs.shape[2], first.shape[0], last.shape[0], heads,
        INNER.index(inner), POOLING.index(pooling),
    )  # fmt: skip


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
