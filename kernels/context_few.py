"""context's way for a user of few pairs: one program takes them from choices to their pooled vector.

The pairs fit one tile, whose h never leaves the program where it fits in registers: queries and keys are made of it a
head at a time, and values not at all, since sum_j c_j (W_v h_j + b_v) = W_v (sum_j c_j h_j) + n b_v for column sums c
of the softmax, whose sum over the n keys is n. A wider h, or one of float32, goes through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fssa_fast.kernels.common import accumulate, dot, narrow
from fssa_fast.kernels.context_linears import encode_in_memory, encode_in_registers, sum_rows

FEW = tl.constexpr(64)  # pairs
FEWER = tl.constexpr(16)  # for so many a tile of tensor cores is enough


@triton.jit
def _column_sums(score, met, count, exponent):
    """The column sums of the softmax of scores [ROWS, ROWS], of which the first `count` rows and columns are met."""
    # A user without pairs keeps its scores: a maximum over nothing would be -inf, and -inf - -inf NaN.
    score = tl.where(met[None, :] | (count == 0), score * exponent, float("-inf"))
    p = tl.exp2(score - tl.max(score, 1)[:, None])
    p = tl.where(met[:, None], p / tl.sum(p, 1)[:, None], 0.0)
    return tl.sum(p, 0)


@triton.jit
def _attention_in_registers(h, w, pooled, met, count, shape, ROWS: tl.constexpr, TILE):
    """pooled = sum_i sum_j p_ij v_j, of h [ROWS, TILE.width]."""
    width, depth = shape.width, shape.depth
    n = tl.arange(0, TILE.width)
    inside = n < width
    rounded = narrow(h, w.qkv.dtype.element_ty)
    for head in range(0, shape.heads):  # a head at a time: q and k of all heads would not fit in registers
        score = tl.zeros([ROWS, ROWS], tl.float32)
        for start in range(0, depth, TILE.depth):
            d = start + tl.arange(0, TILE.depth)
            at = (head * depth + d).to(tl.int64)
            mask = inside[:, None] & (d < depth)[None, :]
            weight = tl.load(w.qkv + at[None, :] * width + n[:, None], mask=mask, other=0.0)
            q = dot(rounded, weight, tl.zeros([ROWS, TILE.depth], tl.float32))
            q += tl.load(w.qkv_bias + at, mask=d < depth, other=0.0).to(tl.float32)[None, :]
            at += width
            weight = tl.load(w.qkv + at[None, :] * width + n[:, None], mask=mask, other=0.0)
            k = dot(rounded, weight, tl.zeros([ROWS, TILE.depth], tl.float32))
            k += tl.load(w.qkv_bias + at, mask=d < depth, other=0.0).to(tl.float32)[None, :]
            score = dot(narrow(q, rounded.dtype), tl.trans(narrow(k, rounded.dtype)), score)
        column = _column_sums(score, met, count, shape.exponent)
        rough = narrow(column, rounded.dtype).to(tl.float32)
        # A product of tensor cores takes 16 rows of its dtype: the column sums go as two of them, rounded and what that
        # lost, so that the sum of the 16 has float32's bits but for a few.
        part = tl.arange(0, 16)[:, None]
        sums = tl.where(part == 0, rough[None, :], tl.where(part == 1, (column - rough)[None, :], 0.0))
        mixed = tl.sum(dot(narrow(sums, rounded.dtype), rounded, tl.zeros([16, TILE.width], tl.float32)), 0)
        for start in range(0, depth, TILE.depth):
            d = start + tl.arange(0, TILE.depth)
            at = (2 * width + head * depth + d).to(tl.int64)
            mask = (d < depth)[:, None] & inside[None, :]
            weight = tl.load(w.qkv + at[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
            v = tl.sum(weight * mixed[None, :], 1)
            v += count * tl.load(w.qkv_bias + at, mask=d < depth, other=0.0).to(tl.float32)
            tl.store(pooled + head * depth + d, v, mask=d < depth)


@triton.jit
def _attention_in_memory(qkv_ptr, pooled, m, met, count, shape, ROWS: tl.constexpr, TILE):
    """pooled = sum_i sum_j p_ij v_j, of the rows m of qkv [N, 3H]."""
    width, depth = shape.width, shape.depth
    for head in range(0, shape.heads):
        q_rows = qkv_ptr + m * (3 * width) + head * depth
        score = tl.zeros([ROWS, ROWS], tl.float32)
        score = accumulate(score, q_rows, q_rows + width, met, met, depth, False, TILE.depth)
        column = _column_sums(score, met, count, shape.exponent)
        for start in range(0, depth, TILE.depth):
            d = start + tl.arange(0, TILE.depth)
            mask = met[:, None] & (d < depth)[None, :]
            v = tl.load(q_rows[:, None] + (2 * width + d)[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(pooled + head * depth + d, tl.sum(column[:, None] * v, 0), mask=d < depth)


@triton.jit
def pool_few(given, w, scratch, pooled, begin, count, shape, MEAN: tl.constexpr, ROWS: tl.constexpr, TILE):
    """pooled [H], float32 in memory, of the `count` pairs from `begin` on, of which there are ROWS or fewer."""
    met = tl.arange(0, ROWS) < count
    m = begin + tl.arange(0, ROWS)
    width = shape.width
    divisor = 1
    if MEAN:
        divisor = tl.maximum(count, 1)
    if TILE.in_registers:
        h = encode_in_registers(given, w, m, met, width, ROWS, TILE)
        if w.qkv is not None:
            _attention_in_registers(h, w, pooled, met, count, shape, ROWS, TILE)
        else:
            n = tl.arange(0, TILE.width)
            tl.store(pooled + n, tl.sum(tl.where(met[:, None], h, 0.0), 0) / divisor, mask=n < width)
    else:
        encode_in_memory(given, w, scratch, m, met, width, ROWS, TILE)
        tl.debug_barrier()  # what follows reads rows that other threads of the program wrote
        if w.qkv is not None:
            _attention_in_memory(scratch.qkv, pooled, m, met, count, shape, ROWS, TILE)
        else:
            sum_rows(scratch.h, m, met, divisor, pooled, width, TILE.columns)
