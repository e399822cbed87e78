"""What the kernels of the three ops share: the product of two tiles, the walk along K, and the view of x as rows."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """`total + a @ b`, accumulated in float32; float32 operands are multiplied as such, not as tf32."""
    if INTERPRETED:  # the interpreter's product of bfloat16 tiles is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to dtype, to nearest even; the interpreter's own conversion to bfloat16 cuts bits off."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store(at, value, mask):
    """Stores float32 values in the dtype that `at` points to."""
    tl.store(at, narrow(value, at.dtype.element_ty), mask=mask)


@triton.jit
def softplus(x):
    """log(1 + exp(x)); a series where 1 + exp(-|x|) would drop too many bits."""
    y = tl.exp(-tl.abs(x))
    log1p = tl.where(y < 0.01, y * (1 - y * (0.5 - y * (0.3333333333 - y * 0.25))), tl.log(1 + y))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def accumulate(
    total, x_rows, w_rows, x_mask, w_mask, size, RELU: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """`total[m, n] + sum_k x[m, k] * w[n, k]` for k < size; x_rows and w_rows point at the rows' first elements.

    K is walked in steps of BLOCK_K, in order, for every tile alike. With fewer than 64 rows a tile every NVIDIA chip
    takes its warp-level tensor-core instruction, so an element's bits do not depend on the tile's height. STAGES of the
    walk are under way at once; None: as many as of the kernel's other loops.
    """
    for start in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < size
        w = tl.load(w_rows[None, :] + k[:, None], mask=w_mask[None, :] & inside[:, None], other=0.0)
        x = tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None] & inside[None, :], other=0.0)
        if RELU:
            x = x.to(tl.float32)  # the interpreter cannot compare bfloat16
            x = tl.where(x < 0, 0.0, x)  # lets NaN through, as torch does
        if x.dtype != w.dtype:
            x = narrow(x, w.dtype)
        total = dot(x, w, total)
    return total


def constants(tile: Any) -> Any:
    """A named tuple of numbers as a kernel's argument whose fields are known when it is compiled."""
    return type(tile)(*map(tl.constexpr, tile))


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor as [rows, width], a view where its strides allow; columns are adjacent."""
    width = tensor.shape[-1]
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def shares_memory(tensor: Tensor, view: Tensor) -> bool:
    """Whether `as_rows(tensor)` gave a view rather than a copy."""
    return tensor.data_ptr() == view.data_ptr()


def rows_per_slot(x: Tensor, slots: Tensor) -> int:
    """How many rows of `as_rows(x)` share one element of slots."""
    return 1 if slots.dim() == x.dim() - 1 else math.prod(x.shape[1:-1])


def slot_segments(slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The indices of slots [n] in the order of their slot, and where each of the `count` slots begins [count + 1]."""
    ordered, order = slots.reshape(-1).sort(stable=True)
    bounds = torch.arange(count + 1, dtype=ordered.dtype, device=ordered.device)
    return order, torch.searchsorted(ordered, bounds)


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds `size`, within [low, high]."""
    return max(low, min(high, 1 << (size - 1).bit_length()))
