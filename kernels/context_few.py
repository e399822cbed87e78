"""context for users of few pairs: a program a user, from choices to what the outer encoder gives, in one launch.

A user's pairs fit one tile, whose h never leaves the program where it fits in registers: queries and keys are made of
it a head at a time, and values not at all, since sum_j c_j (W_v h_j + b_v) = W_v (sum_j c_j h_j) + n b_v for column
sums c of the softmax, whose sum over the n keys is n. A wider h, or one of float32, goes through memory. Users with
more pairs than FEW are left to the kernels of `fssa_fast.kernels.context`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.kernels import configs
from fssa_fast.kernels.common import accumulate, dot, narrow, softplus, store
from fssa_fast.kernels.context_linears import encode_rows
from fssa_fast.ops.context import ContextWeights

FEW = 64
FEWER = 16  # for so many a tile of tensor cores is enough


@triton.jit
def _matrix_vector(
    x_ptr, w_ptr, bias_ptr, bias_scale, y_ptr, outputs, width,
    RELU: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = relu?(w x + bias_scale bias); x and y in memory, float32 or y's dtype."""
    for start in range(0, outputs, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        products = tl.zeros([COLUMNS, WIDTH], tl.float32)
        for begin in range(0, width, WIDTH):
            n = begin + tl.arange(0, WIDTH)
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
def _column_sums(score, met, count, exponent):
    """The column sums of the softmax of scores [ROWS, ROWS], of which the first `count` rows and columns are met."""
    score = tl.where(met[None, :] | (count == 0), score * exponent, float("-inf"))
    p = tl.exp2(score - tl.max(score, 1)[:, None])
    p = tl.where(met[:, None], p / tl.sum(p, 1)[:, None], 0.0)
    return tl.sum(p, 0)


@triton.jit
def _pooled_in_registers(
    pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_ptr, qkv_bias_ptr, pooled_ptr,
    begin, count, embedding, width, depth, heads, exponent, pair_stride, option_stride,
    MLP: tl.constexpr, ATTENTION: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`_pooled`, of an h that fits in registers."""
    dtype = inner0_ptr.dtype.element_ty
    row = tl.arange(0, ROWS)
    met = row < count
    m = begin + row
    choice = tl.load(choices_ptr + m, mask=met, other=0).to(tl.int64)
    chosen = pairs_ptr + m * pair_stride + choice * option_stride
    rejected = pairs_ptr + m * pair_stride + (1 - choice) * option_stride
    n = tl.arange(0, WIDTH)
    inside = n < width
    h = tl.zeros([ROWS, WIDTH], tl.float32)
    if MLP:
        for start in range(0, width, COLUMNS):  # a stretch of the first linear, and at once what the second makes of it
            c = start + tl.arange(0, COLUMNS)
            w_rows = inner0_ptr + c.to(tl.int64) * (2 * embedding)
            first = tl.zeros([ROWS, COLUMNS], tl.float32)
            first = accumulate(first, chosen, w_rows, met, c < width, embedding, False, STEP, STAGES)
            first = accumulate(first, rejected, w_rows + embedding, met, c < width, embedding, False, STEP, STAGES)
            first += tl.load(inner0_bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
            first = narrow(tl.where(first < 0, 0.0, first), dtype)
            mask = (c < width)[:, None] & inside[None, :]
            w = tl.load(inner1_ptr + n[None, :].to(tl.int64) * width + c[:, None], mask=mask, other=0.0)
            h = dot(first, w, h)
        h += tl.load(inner1_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        w_rows = inner0_ptr + n.to(tl.int64) * (2 * embedding)
        h = accumulate(h, chosen, w_rows, met, inside, embedding, False, STEP, STAGES)
        h = accumulate(h, rejected, w_rows + embedding, met, inside, embedding, False, STEP, STAGES)
        h += tl.load(inner0_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ATTENTION:
        rounded = narrow(h, dtype)
        for head in range(0, heads):
            score = tl.zeros([ROWS, ROWS], tl.float32)
            for start in range(0, depth, DEPTH):
                d = start + tl.arange(0, DEPTH)
                at = (head * depth + d).to(tl.int64)
                mask = inside[:, None] & (d < depth)[None, :]
                w = tl.load(qkv_ptr + at[None, :] * width + n[:, None], mask=mask, other=0.0)
                q = dot(rounded, w, tl.zeros([ROWS, DEPTH], tl.float32))
                q += tl.load(qkv_bias_ptr + at, mask=d < depth, other=0.0).to(tl.float32)[None, :]
                at += width
                w = tl.load(qkv_ptr + at[None, :] * width + n[:, None], mask=mask, other=0.0)
                k = dot(rounded, w, tl.zeros([ROWS, DEPTH], tl.float32))
                k += tl.load(qkv_bias_ptr + at, mask=d < depth, other=0.0).to(tl.float32)[None, :]
                score = dot(narrow(q, dtype), tl.trans(narrow(k, dtype)), score)
            column = _column_sums(score, met, count, exponent)
            rough = narrow(column, dtype).to(tl.float32)
            part = tl.arange(0, 16)[:, None]  # a product of tensor cores: the sums in two numbers of dtype each
            sums = tl.where(part == 0, rough[None, :], tl.where(part == 1, (column - rough)[None, :], 0.0))
            mixed = tl.sum(dot(narrow(sums, dtype), rounded, tl.zeros([16, WIDTH], tl.float32)), 0)
            for start in range(0, depth, DEPTH):
                d = start + tl.arange(0, DEPTH)
                at = (2 * width + head * depth + d).to(tl.int64)
                mask = (d < depth)[:, None] & inside[None, :]
                w = tl.load(qkv_ptr + at[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
                v = tl.sum(w * mixed[None, :], 1)
                v += count * tl.load(qkv_bias_ptr + at, mask=d < depth, other=0.0).to(tl.float32)
                tl.store(pooled_ptr + head * depth + d, v, mask=d < depth)
    else:
        total = tl.sum(tl.where(met[:, None], h, 0.0), 0)
        if MEAN:
            total = total / tl.maximum(count, 1)
        tl.store(pooled_ptr + n, total, mask=inside)


@triton.jit
def _pooled_in_memory(
    pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr, qkv_bias_ptr,
    first_ptr, h_ptr, qkv_ptr, pooled_ptr, begin, count, embedding, width, depth, heads, exponent, pair_stride,
    option_stride,
    MLP: tl.constexpr, ATTENTION: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`_pooled`, of an h that lies in memory."""
    row = tl.arange(0, ROWS)
    met = row < count
    m = begin + row
    encode_rows(
        m, met, pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr,
        qkv_bias_ptr, first_ptr, h_ptr, qkv_ptr, embedding, width, pair_stride, option_stride,
        MLP, ATTENTION, ROWS, COLUMNS, STEP, STAGES,
    )  # fmt: skip
    tl.debug_barrier()
    if ATTENTION:
        for head in range(0, heads):
            q_rows = qkv_ptr + m * (3 * width) + head * depth
            score = tl.zeros([ROWS, ROWS], tl.float32)
            score = accumulate(score, q_rows, q_rows + width, met, met, depth, False, DEPTH)
            column = _column_sums(score, met, count, exponent)
            for start in range(0, depth, DEPTH):
                d = start + tl.arange(0, DEPTH)
                mask = met[:, None] & (d < depth)[None, :]
                v = tl.load(q_rows[:, None] + (2 * width + d)[None, :], mask=mask, other=0.0).to(tl.float32)
                tl.store(pooled_ptr + head * depth + d, tl.sum(column[:, None] * v, 0), mask=d < depth)
    else:
        for start in range(0, width, COLUMNS):
            n = start + tl.arange(0, COLUMNS)
            mask = met[:, None] & (n < width)[None, :]
            total = tl.sum(tl.load(h_ptr + (m * width)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32), 0)
            if MEAN:
                total = total / tl.maximum(count, 1)
            tl.store(pooled_ptr + n, total, mask=n < width)


@triton.jit
def _pooled(
    pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr, qkv_bias_ptr,
    first_ptr, h_ptr, qkv_ptr, pooled_ptr, begin, count, embedding, width, depth, heads, exponent, pair_stride,
    option_stride,
    MLP: tl.constexpr, ATTENTION: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, IN_REGISTERS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The pooling of one user's pairs, of which there are ROWS or fewer: float32 [H] in memory.

    first [N, H], h [N, H] and qkv [N, 3H] are only used where h is not in registers.
    """
    if IN_REGISTERS:
        _pooled_in_registers(
            pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr, qkv_bias_ptr,
            pooled_ptr, begin, count, embedding, width, depth, heads, exponent, pair_stride, option_stride,
            MLP, ATTENTION, MEAN, ROWS, WIDTH, COLUMNS, STEP, STAGES, DEPTH,
        )  # fmt: skip
    else:
        _pooled_in_memory(
            pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr, qkv_bias_ptr,
            first_ptr, h_ptr, qkv_ptr, pooled_ptr, begin, count, embedding, width, depth, heads, exponent, pair_stride,
            option_stride,
            MLP, ATTENTION, MEAN, ROWS, COLUMNS, STEP, STAGES, DEPTH,
        )  # fmt: skip


@triton.jit
def context_few_kernel(
    pairs_ptr, choices_ptr, offsets_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr,
    qkv_bias_ptr, out_ptr, out_bias_ptr, outer0_ptr, outer0_bias_ptr, outer1_ptr, outer1_bias_ptr, noise_ptr,
    first_ptr, h_ptr, qkv_ptr, vectors_ptr, encoded_ptr, embedding, width, encoded_width, depth, heads, exponent,
    pair_stride, option_stride, noise_stride,
    MLP: tl.constexpr, ATTENTION: tl.constexpr, MEAN: tl.constexpr, NOISE: tl.constexpr, FEWER: tl.constexpr,
    FEW: tl.constexpr, IN_REGISTERS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (user): encoded [U, encoded_width]; with NOISE the latent, mean + softplus(s) * noise.

    vectors [U, 4, H] float32 is where a vector goes whose parts several threads made and all of them read.
    """
    user = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + user).to(tl.int64)
    count = (tl.load(offsets_ptr + user + 1) - begin).to(tl.int32)
    if count <= FEW:
        vectors = vectors_ptr + user * (4 * width)
        if count <= FEWER:
            _pooled(
                pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr,
                qkv_bias_ptr, first_ptr, h_ptr, qkv_ptr, vectors, begin, count, embedding, width, depth, heads,
                exponent, pair_stride, option_stride,
                MLP, ATTENTION, MEAN, FEWER, IN_REGISTERS, WIDTH, COLUMNS, STEP, STAGES, DEPTH,
            )  # fmt: skip
        else:
            _pooled(
                pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr,
                qkv_bias_ptr, first_ptr, h_ptr, qkv_ptr, vectors, begin, count, embedding, width, depth, heads,
                exponent, pair_stride, option_stride,
                MLP, ATTENTION, MEAN, FEW, IN_REGISTERS, WIDTH, COLUMNS, STEP, STAGES, DEPTH,
            )  # fmt: skip
        tl.debug_barrier()
        joined = vectors
        if ATTENTION:
            joined = vectors + width
            _matrix_vector(vectors, out_ptr, out_bias_ptr, count, joined, width, width, False, WIDTH, COLUMNS)
            tl.debug_barrier()
        outer = vectors + 2 * width
        _matrix_vector(joined, outer0_ptr, outer0_bias_ptr, 1, outer, width, width, True, WIDTH, COLUMNS)
        tl.debug_barrier()
        encoded = encoded_ptr + user * encoded_width
        if NOISE:
            mean, deviation = vectors, vectors + 3 * width
            _matrix_vector(outer, outer1_ptr, outer1_bias_ptr, 1, mean, width, width, False, WIDTH, COLUMNS)
            outer1_ptr += width * width
            outer1_bias_ptr += width
            _matrix_vector(outer, outer1_ptr, outer1_bias_ptr, 1, deviation, width, width, False, WIDTH, COLUMNS)
            tl.debug_barrier()
            n = tl.arange(0, WIDTH)
            inside = n < width
            noise = tl.load(noise_ptr + user * noise_stride + n, mask=inside, other=0.0).to(tl.float32)
            spread = softplus(tl.load(deviation + n, mask=inside, other=0.0))
            store(encoded + n, tl.load(mean + n, mask=inside, other=0.0) + spread * noise, inside)
        else:
            _matrix_vector(
                outer, outer1_ptr, outer1_bias_ptr, 1, encoded, encoded_width, width, False, WIDTH, COLUMNS
            )  # fmt: skip


def encode_few(
    encoded: Tensor,
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    w: ContextWeights,
    inner: str,
    pooling: str,
    heads: int,
    noise: Tensor | None,
) -> None:
    """Fills encoded [U, Z], or latents [U, H], for users of up to FEW pairs."""
    width, embedding = w.inner0.shape[0], pairs.shape[2]
    tile = configs.few_tile(width, pairs.dtype)
    depth = width // heads if pooling == "self-attention" else width
    vectors = pairs.new_empty(len(encoded), 4, width, dtype=torch.float32)
    first = h = qkv = encoded  # not used
    if not tile.in_registers:
        h = pairs.new_empty(len(pairs), width)
        first = torch.empty_like(h) if inner == "mlp" else h
        qkv = pairs.new_empty(len(pairs), 3 * width) if pooling == "self-attention" else h
    context_few_kernel[(len(encoded),)](
        pairs, choices, offsets, *w, encoded if noise is None else noise, first, h, qkv, vectors, encoded,
        embedding, width, encoded.shape[1], depth, heads, configs.LOG2E * depth**-0.5, pairs.stride(0), pairs.stride(1),
        0 if noise is None else noise.stride(0), MLP=inner == "mlp", ATTENTION=pooling == "self-attention",
        MEAN=pooling == "mean", NOISE=noise is not None, FEWER=FEWER, FEW=FEW, IN_REGISTERS=tile.in_registers,
        WIDTH=tile.width, COLUMNS=tile.columns, STEP=tile.step, STAGES=tile.stages, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
