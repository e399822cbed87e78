"""What multi-LoRA kernels do, for comparison: a gather matrix-vector kernel, every row with an adapter of its own.

The algorithm of Punica's BGMV (arXiv 2310.18547): row n gathers A[slots[n]] and B[slots[n]], an adapter a user.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shrink_kernel(x_ptr, a_ptr, slots_ptr, hidden_ptr, width, RANK: tl.constexpr, STEP: tl.constexpr):
    """Program (row, split of D): its part of A[slot] x, added to hidden."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    d = split * STEP + tl.arange(0, STEP)
    r = tl.arange(0, RANK)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
    a_at = a_ptr + slot * RANK * width + r[:, None] * width + d[None, :]
    a = tl.load(a_at, mask=(d < width)[None, :], other=0.0).to(tl.float32)
    tl.store(hidden_ptr + (split * tl.num_programs(0) + row) * RANK + r, tl.sum(a * x[None, :], 1))


@triton.jit
def _expand_kernel(
    hidden_ptr, b_ptr, slots_ptr, y_ptr, width, scaling, splits, RANK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Program (row, columns): y += scaling * B[slot] hidden."""
    row = tl.program_id(0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    hidden = tl.zeros([RANK], tl.float32)
    for split in range(splits):
        hidden += tl.load(hidden_ptr + (split * tl.num_programs(0) + row) * RANK + r)
    b_at = b_ptr + slot * RANK * width + r[:, None] * width + n[None, :]
    b = tl.load(b_at, mask=(n < width)[None, :], other=0.0).to(tl.float32)
    y_at = y_ptr + row * width + n
    y = tl.load(y_at, mask=n < width, other=0.0).to(tl.float32)
    tl.store(y_at, (y + scaling * tl.sum(b * hidden[:, None], 0)).to(y_ptr.dtype.element_ty), mask=n < width)


def gathered_lora_(x: Tensor, y: Tensor, a: Tensor, b: Tensor, slots: Tensor, scaling: float) -> None:
    """y += scaling * B[slots] A[slots] x, in place: x [N, D], y [N, O], a [S, R, D], b [S, R, O], R a power of two."""
    rows, width = x.shape
    rank, step, columns = a.shape[1], 256, 128
    splits = triton.cdiv(width, step)
    hidden = x.new_empty(splits, rows, rank, dtype=torch.float32)
    _shrink_kernel[(rows, splits)](x, a, slots, hidden, width, RANK=rank, STEP=step)
    _expand_kernel[(rows, triton.cdiv(y.shape[1], columns))](
        hidden, b, slots, y, y.shape[1], scaling, splits, RANK=rank, COLUMNS=columns
    )  # fmt: skip
