"""The linears of context's encoders: the inner one's of a tile of pairs, the outer one's of a user's pooled vector.

Between two products of one program the rows go through memory behind a barrier, so that no width has to fit in
registers; a tile's h stays in them where it does.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.kernels.common import accumulate, dot, narrow, softplus, store


class Choices(NamedTuple):
    """The choices of U users, packed, as the kernels take them."""

    pairs: Tensor  # [N, 2, E]
    choices: Tensor  # [N]
    offsets: Tensor  # [U + 1]
    embedding: int
    pair_stride: int
    option_stride: int


class Scratch(NamedTuple):
    """What the programs leave for themselves and each other; `first` and `h` only where h is not in registers."""

    first: Tensor  # [N, H], inner0's output; h itself where inner is "linear"
    h: Tensor  # [N, H]
    qkv: Tensor  # [N, 3H]
    parts: Tensor  # float32 [tiles, H]: of each tile of a user of many pairs, its share of the pooled vector
    turns: Tensor  # int32 [1 + 2U], zeros: turns taken; and of each user how many tiles are encoded, how many pooled
    vectors: Tensor  # float32 [U, 4, H]: pooled, joined (through the output projection), outer0's output after its ReLU


class Shape(NamedTuple):
    """An encoder's widths; depth is a head's, and exponent makes of a query times a key what exp2 takes."""

    width: int
    heads: int
    depth: int
    exponent: float


class Encoded(NamedTuple):
    """Where results go, with noise the latents."""

    noise: Tensor | None  # [U, H]
    noise_stride: int
    rows: Tensor  # [U, width]
    width: int


@triton.jit
def _options(given, m, met):
    """Where the rows of the pairs' chosen options begin, and those of the rejected."""
    choice = tl.load(given.choices + m, mask=met, other=0).to(tl.int64)
    rows = given.pairs + m * given.pair_stride
    return rows + choice * given.option_stride, rows + (1 - choice) * given.option_stride


@triton.jit
def _inner0(total, given, w, chosen, rejected, met, n, inside, STEP: tl.constexpr, STAGES: tl.constexpr):
    """total + inner0 [chosen ; rejected] of the outputs n."""
    rows = w.inner0 + n.to(tl.int64) * (2 * given.embedding)
    total = accumulate(total, chosen, rows, met, inside, given.embedding, False, STEP, STAGES)
    total = accumulate(total, rejected, rows + given.embedding, met, inside, given.embedding, False, STEP, STAGES)
    return total + tl.load(w.inner0_bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def encode_in_registers(given, w, m, met, width, ROWS: tl.constexpr, TILE):
    """h of the pairs m: float32 [ROWS, TILE.width], of which `width` columns mean something."""
    chosen, rejected = _options(given, m, met)
    n = tl.arange(0, TILE.width)
    inside = n < width
    h = tl.zeros([ROWS, TILE.width], tl.float32)
    if w.inner1 is None:
        return _inner0(h, given, w, chosen, rejected, met, n, inside, TILE.step, TILE.stages)
    else:
        for start in range(0, width, TILE.columns):  # a stretch of the first linear, and at once the second's share
            c = start + tl.arange(0, TILE.columns)
            first = tl.zeros([ROWS, TILE.columns], tl.float32)
            first = _inner0(first, given, w, chosen, rejected, met, c, c < width, TILE.step, TILE.stages)
            first = tl.where(first < 0, 0.0, first)  # lets NaN through, as torch does
            first = narrow(first, w.inner0.dtype.element_ty)
            mask = (c < width)[:, None] & inside[None, :]
            inner1 = tl.load(w.inner1 + n[None, :].to(tl.int64) * width + c[:, None], mask=mask, other=0.0)
            h = dot(first, inner1, h)
        return h + tl.load(w.inner1_bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _linear_rows(
    x_rows, x_mask, depth, w_ptr, bias_ptr, y_rows, width, RELU: tl.constexpr, ROWS: tl.constexpr, TILE
):
    """y = relu?(x) w^T + bias, all columns; w [width, depth]."""
    for start in range(0, width, TILE.columns):
        n = start + tl.arange(0, TILE.columns)
        total = tl.zeros([ROWS, TILE.columns], tl.float32)
        w_rows = w_ptr + n.to(tl.int64) * depth
        total = accumulate(total, x_rows, w_rows, x_mask, n < width, depth, RELU, TILE.step, TILE.stages)
        total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        store(y_rows[:, None] + n[None, :], total, x_mask[:, None] & (n < width)[None, :])


@triton.jit
def encode_in_memory(given, w, scratch, m, met, width, ROWS: tl.constexpr, TILE):
    """Fills scratch's first, h and qkv of the pairs m; a barrier must follow before they are read."""
    chosen, rejected = _options(given, m, met)
    for start in range(0, width, TILE.columns):
        n = start + tl.arange(0, TILE.columns)
        total = tl.zeros([ROWS, TILE.columns], tl.float32)
        total = _inner0(total, given, w, chosen, rejected, met, n, n < width, TILE.step, TILE.stages)
        store(scratch.first + m[:, None] * width + n[None, :], total, met[:, None] & (n < width)[None, :])
    h_rows = scratch.h + m * width
    if w.inner1 is not None:
        tl.debug_barrier()
        first_rows = scratch.first + m * width
        _linear_rows(first_rows, met, width, w.inner1, w.inner1_bias, h_rows, width, True, ROWS, TILE)
    if w.qkv is not None:
        tl.debug_barrier()
        qkv_rows = scratch.qkv + m * (3 * width)
        _linear_rows(h_rows, met, width, w.qkv, w.qkv_bias, qkv_rows, 3 * width, False, ROWS, TILE)


@triton.jit
def sum_rows(h_ptr, m, met, divisor, y_ptr, width, COLUMNS: tl.constexpr):
    """y = the sum of the rows m of h [N, H] over the divisor."""
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        mask = met[:, None] & (n < width)[None, :]
        h = tl.load(h_ptr + (m * width)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, tl.sum(h, 0) / divisor, mask=n < width)


@triton.jit
def _matrix_vector(
    x_ptr, w_ptr, bias_ptr, bias_scale, y_ptr, outputs, width, RELU: tl.constexpr, TILE
):
    """y = relu?(w x + bias_scale bias); x and y in memory, float32 or y's dtype."""
    for start in range(0, outputs, TILE.columns):
        c = start + tl.arange(0, TILE.columns)
        products = tl.zeros([TILE.columns, TILE.width], tl.float32)
        for begin in range(0, width, TILE.width):
            n = begin + tl.arange(0, TILE.width)
            x = tl.load(x_ptr + n, mask=n < width, other=0.0).to(tl.float32)
            inside = (c < outputs)[:, None] & (n < width)[None, :]
            w = tl.load(w_ptr + c[:, None].to(tl.int64) * width + n[None, :], mask=inside, other=0.0).to(tl.float32)
            products += w * x[None, :]
        bias = tl.load(bias_ptr + c, mask=c < outputs, other=0.0).to(tl.float32)
        y = tl.sum(products, 1) + bias_scale * bias
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # lets NaN through, as torch does
        store(y_ptr + c, y, c < outputs)


@triton.jit
def encode_pooled(user, count, w, to, vectors, width, TILE):
    """From the user's pooled vector to its row of `to`; with noise the latent, mean + softplus(s) * noise.

    vectors [4, H] are the user's: the first is pooled and must have been written before a barrier.
    """
    joined = vectors
    if w.out is not None:
        joined = vectors + width
        _matrix_vector(vectors, w.out, w.out_bias, count, joined, width, width, False, TILE)
        tl.debug_barrier()
    outer = vectors + 2 * width
    _matrix_vector(joined, w.outer0, w.outer0_bias, 1, outer, width, width, True, TILE)
    tl.debug_barrier()
    encoded = to.rows + user * to.width
    if to.noise is None:
        _matrix_vector(outer, w.outer1, w.outer1_bias, 1, encoded, to.width, width, False, TILE)
    else:
        mean, deviation = vectors, vectors + 3 * width
        _matrix_vector(outer, w.outer1, w.outer1_bias, 1, mean, width, width, False, TILE)
        w_deviation, bias = w.outer1 + width * width, w.outer1_bias + width
        _matrix_vector(outer, w_deviation, bias, 1, deviation, width, width, False, TILE)
        tl.debug_barrier()
        for start in range(0, width, TILE.width):
            n = start + tl.arange(0, TILE.width)
            inside = n < width
            noise = tl.load(to.noise + user * to.noise_stride + n, mask=inside, other=0.0).to(tl.float32)
            spread = softplus(tl.load(deviation + n, mask=inside, other=0.0))
            store(encoded + n, tl.load(mean + n, mask=inside, other=0.0) + spread * noise, inside)
