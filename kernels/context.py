"""context: from choices to latents to rows of the bank.

Users of few pairs take two launches: that of `fssa_fast.kernels.context_few`, and the last of those below. The others
take all five, because the attention among a user's many pairs is more than one program should do. Which way a user
goes follows its own number of pairs, never the other users.

1. encode: pairs to h, and for attention to queries, keys and values. A choice picks the row that is read.
2. statistics: log of the softmax's denominator a query; only where a user may have more pairs than one tile holds.
3. pool: of each tile of a user's pairs, the sum over k of (the softmax's column sum) v_k, or of h_k.
4. outer: the users' tiles added in order, the attention's output projection (once a user), the outer MLP, the latent.
5. rows: latents to modulations, written into the bank's rows in its dtype.

Users are ragged and packed. User u owns the tiles `offsets[u] // P + u` up to, not including, `offsets[u + 1] // P + u
+ 1` for tiles of P pairs counted from its own first pair: always enough, known without reading the offsets on the host,
so nothing waits for the GPU. What a user's bits depend on is its own pairs.

Backward: the forward again, three kernels for the attention, and torch's matrix products for all plain gradients of
linears, which a well-kept library does better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.kernels import configs
from fssa_fast.kernels.common import accumulate, as_rows, dot, narrow, softplus, store
from fssa_fast.kernels.context_few import FEW, encode_few
from fssa_fast.kernels.context_linears import encode_rows, linear_rows
from fssa_fast.ops.context import ContextWeights


@triton.jit
def _user_of_tile(offsets_ptr, users, tile, PAIRS: tl.constexpr):
    """The last user whose first tile is not after this one; see the module's docstring."""
    low = tile * 0
    high = low + users
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(offsets_ptr + middle).to(tl.int32) // PAIRS + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low


@triton.jit
def _span_of_tile(offsets_ptr, users, tile, PAIRS: tl.constexpr):
    """The tile's user, the user's first and last pair (exclusive), and the tile's first pair."""
    user = _user_of_tile(offsets_ptr, users, tile, PAIRS)
    first = tl.load(offsets_ptr + user).to(tl.int64)
    last = tl.load(offsets_ptr + user + 1).to(tl.int64)
    begin = first + (tile - user - (first // PAIRS).to(tl.int32)) * PAIRS
    return user, first, last, begin


@triton.jit
def context_encode_kernel(
    pairs_ptr, choices_ptr, offsets_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr,
    qkv_bias_ptr, first_ptr, h_ptr, qkv_ptr, users, count, limit, embedding, width, pair_stride, option_stride,
    MLP: tl.constexpr, ATTENTION: tl.constexpr, BY_USER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Program (pairs): `encode_rows` of them.

    BY_USER, the pairs are a tile of a user's, and users of `limit` pairs or fewer are left out.
    """
    if BY_USER:
        user, first, last, begin = _span_of_tile(offsets_ptr, users, tl.program_id(0), ROWS)
        if (begin >= last) | (last - first <= limit):
            return
        m = begin + tl.arange(0, ROWS)
        met = m < last
    else:
        m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        met = m < count
    encode_rows(
        m, met, pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr,
        qkv_bias_ptr, first_ptr, h_ptr, qkv_ptr, embedding, width, pair_stride, option_stride,
        MLP, ATTENTION, ROWS, COLUMNS, STEP,
    )  # fmt: skip


@triton.jit
def context_statistics_kernel(
    qkv_ptr, weights_ptr, offsets_ptr, norms_ptr, means_ptr, users, width, depth, heads, exponent,
    BACKWARD: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, head): log2 of the softmax's denominator, exponents in base 2; norms [N, heads].

    Backward also means [N, heads], the softmax's mean of weights [N, heads]. Forward leaves out users of one tile.
    """
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(offsets_ptr, users, tl.program_id(0), PAIRS)
    wanted = begin < last
    if not BACKWARD:
        wanted = wanted & (last - first > PAIRS)
    if wanted:
        query = begin + tl.arange(0, PAIRS)
        q_rows = qkv_ptr + query * (3 * width) + head * depth
        high = tl.full([PAIRS], float("-inf"), tl.float32)
        total = tl.zeros([PAIRS], tl.float32)
        mean = tl.zeros([PAIRS], tl.float32)
        for start in range(first, last, PAIRS):
            key = start + tl.arange(0, PAIRS)
            k_rows = qkv_ptr + key * (3 * width) + width + head * depth
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            score = accumulate(score, q_rows, k_rows, query < last, key < last, depth, False, DEPTH) * exponent
            score = tl.where((key < last)[None, :], score, float("-inf"))
            higher = tl.maximum(high, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
            total = total * tl.exp2(high - higher) + tl.sum(p, 1)
            if BACKWARD:
                weight = tl.load(weights_ptr + key * heads + head, mask=key < last, other=0.0)
                mean = mean * tl.exp2(high - higher) + tl.sum(p * weight[None, :], 1)
            high = higher
        store(norms_ptr + query * heads + head, high + tl.log2(total), query < last)
        if BACKWARD:
            store(means_ptr + query * heads + head, mean / total, query < last)


@triton.jit
def context_pool_kernel(
    qkv_ptr, offsets_ptr, norms_ptr, parts_ptr, limit, users, width, depth, heads, exponent,
    PAIRS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, head): parts[tile, head] = sum_j (sum_i p_ij) v_j; of users of more than `limit` pairs."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(offsets_ptr, users, tile, PAIRS)
    if (begin < last) & (last - first > limit):
        key = begin + tl.arange(0, PAIRS)
        k_rows = qkv_ptr + key * (3 * width) + width + head * depth
        column = tl.zeros([PAIRS], tl.float32)
        for start in range(first, last, PAIRS):
            query = start + tl.arange(0, PAIRS)
            q_rows = qkv_ptr + query * (3 * width) + head * depth
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            score = accumulate(score, q_rows, k_rows, query < last, key < last, depth, False, DEPTH) * exponent
            score = tl.where((key < last)[None, :], score, float("-inf"))
            if last - first > PAIRS:
                norm = tl.load(norms_ptr + query * heads + head, mask=query < last, other=0.0)
            else:
                high = tl.max(score, 1)
                norm = high + tl.log2(tl.sum(tl.exp2(score - high[:, None]), 1))
            p = tl.where((query < last)[:, None], tl.exp2(score - norm[:, None]), 0.0)
            column += tl.sum(p, 0)
        for start in range(0, depth, DEPTH):
            d = start + tl.arange(0, DEPTH)
            v_at = qkv_ptr + key[:, None] * (3 * width) + 2 * width + head * depth + d[None, :]
            v = tl.load(v_at, mask=(key < last)[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32)
            pooled = tl.sum(column[:, None] * v, 0)
            store(parts_ptr + tile.to(tl.int64) * width + head * depth + d, pooled, d < depth)


@triton.jit
def context_sum_kernel(
    h_ptr, offsets_ptr, parts_ptr, users, limit, width, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Program (tile, columns): parts[tile] = sum of the tile's h; of users of more than `limit` pairs."""
    tile = tl.program_id(0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    user, first, last, begin = _span_of_tile(offsets_ptr, users, tile, PAIRS)
    if (begin < last) & (last - first > limit):
        row = begin + tl.arange(0, PAIRS)
        mask = (row < last)[:, None] & (n < width)[None, :]
        h = tl.load(h_ptr + row[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
        store(parts_ptr + tile.to(tl.int64) * width + n, tl.sum(h, 0), n < width)


@triton.jit
def context_outer_kernel(
    parts_ptr, offsets_ptr, out_w_ptr, out_bias_ptr, outer0_ptr, outer0_bias_ptr, outer1_ptr, outer1_bias_ptr,
    noise_ptr, pooled_ptr, joined_ptr, first_ptr, encoded_ptr, users, limit, width, encoded_width, noise_stride,
    ATTENTION: tl.constexpr, MEAN: tl.constexpr, NOISE: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program (users): pooled = sum of the user's parts; joined = out(pooled); encoded = outer(joined).

    Of the encoded only the first encoded_width columns; with NOISE the latent, mean + softplus(s) * noise. A program
    none of whose users has more than `limit` pairs does nothing; in others, what users with fewer get means nothing.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    met = m < users
    begin = tl.load(offsets_ptr + m, mask=met, other=0).to(tl.int64)
    count = tl.load(offsets_ptr + m + 1, mask=met, other=0).to(tl.int64) - begin
    if tl.max(tl.where(met, count, -1)) <= limit:
        return
    tiles = (count + PAIRS - 1) // PAIRS
    most = tl.max(tiles)
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        inside = n < width
        pooled = tl.zeros([ROWS, COLUMNS], tl.float32)
        for tile in range(0, most):
            row = begin // PAIRS + m + tile
            mask = (tile < tiles)[:, None] & inside[None, :]
            pooled += tl.load(parts_ptr + row[:, None] * width + n[None, :], mask=mask, other=0.0)
        if MEAN:
            pooled = pooled / tl.maximum(count, 1).to(tl.float32)[:, None]
        store(pooled_ptr + m[:, None] * width + n[None, :], pooled, met[:, None] & inside[None, :])
    if ATTENTION:
        tl.debug_barrier()
        for start in range(0, width, COLUMNS):
            n = start + tl.arange(0, COLUMNS)
            inside = n < width
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            w_rows = out_w_ptr + n.to(tl.int64) * width
            total = accumulate(total, pooled_ptr + m * width, w_rows, met, inside, width, False, STEP)
            bias = tl.load(out_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
            total += count.to(tl.float32)[:, None] * bias[None, :]
            store(joined_ptr + m[:, None] * width + n[None, :], total, met[:, None] & inside[None, :])
    tl.debug_barrier()
    linear_rows(
        joined_ptr + m * width, met, width, outer0_ptr, width, outer0_bias_ptr, first_ptr + m * width, width,
        False, ROWS, COLUMNS, STEP,
    )  # fmt: skip
    tl.debug_barrier()
    x_rows = first_ptr + m * width
    for start in range(0, encoded_width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        inside = n < encoded_width
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        w_rows = outer1_ptr + n.to(tl.int64) * width
        total = accumulate(total, x_rows, w_rows, met, inside, width, True, STEP)
        total += tl.load(outer1_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        mask = met[:, None] & inside[None, :]
        if NOISE:
            s = tl.zeros([ROWS, COLUMNS], tl.float32)
            s_rows = outer1_ptr + (encoded_width + n).to(tl.int64) * width
            s = accumulate(s, x_rows, s_rows, met, inside, width, True, STEP)
            s += tl.load(outer1_bias_ptr + encoded_width + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            noise = tl.load(noise_ptr + m[:, None] * noise_stride + n[None, :], mask=mask, other=0.0)
            total += softplus(s) * noise.to(tl.float32)
        store(encoded_ptr + m[:, None] * encoded_width + n[None, :], total, mask)


@triton.jit
def context_rows_kernel(
    latents_ptr, modulation_ptr, bias_ptr, bank_ptr, slots_ptr, users, depth, width, modulation_stride, bank_stride,
    bank_step, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program (columns, users): bank[slots] = modulation latent + bias."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    w_rows = modulation_ptr + n.to(tl.int64) * modulation_stride
    x_rows = latents_ptr + m.to(tl.int64) * depth
    total = accumulate(total, x_rows, w_rows, m < users, n < width, depth, False, STEP)
    total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots_ptr + m, mask=m < users, other=0).to(tl.int64)
    at = bank_ptr + slot[:, None] * bank_stride + n[None, :] * bank_step
    store(at, total, (m < users)[:, None] & (n < width)[None, :])


@triton.jit
def context_queries_kernel(
    qkv_ptr, weights_ptr, offsets_ptr, norms_ptr, means_ptr, dqkv_ptr, users, width, depth, heads, exponent, scale,
    PAIRS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Backward, program (tile of queries, head, stretch of its depth): dq_i = scale sum_j p_ij (w_j - mean_i) k_j."""
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(offsets_ptr, users, tl.program_id(0), PAIRS)
    if begin < last:
        query = begin + tl.arange(0, PAIRS)
        d = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
        q_rows = qkv_ptr + query * (3 * width) + head * depth
        norm = tl.load(norms_ptr + query * heads + head, mask=query < last, other=0.0)
        mean = tl.load(means_ptr + query * heads + head, mask=query < last, other=0.0)
        total = tl.zeros([PAIRS, DEPTH], tl.float32)
        for start in range(first, last, PAIRS):
            key = start + tl.arange(0, PAIRS)
            k_rows = qkv_ptr + key * (3 * width) + width + head * depth
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            score = accumulate(score, q_rows, k_rows, query < last, key < last, depth, False, DEPTH) * exponent
            p = tl.where((key < last)[None, :], tl.exp2(score - norm[:, None]), 0.0)
            weight = tl.load(weights_ptr + key * heads + head, mask=key < last, other=0.0)
            dscore = p * (weight[None, :] - mean[:, None])
            k_mask = (key < last)[:, None] & (d < depth)[None, :]
            k = tl.load(k_rows[:, None] + d[None, :], mask=k_mask, other=0.0)
            total = dot(narrow(dscore, k.dtype), k, total)
        at = dqkv_ptr + query[:, None] * (3 * width) + head * depth + d[None, :]
        store(at, total * scale, (query < last)[:, None] & (d < depth)[None, :])


@triton.jit
def context_keys_kernel(
    qkv_ptr, weights_ptr, offsets_ptr, norms_ptr, means_ptr, dpooled_ptr, dqkv_ptr, users, width, depth, heads,
    exponent, scale, PAIRS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Backward, program (tile of keys, head, stretch of its depth).

    dk_j = scale sum_i p_ij (w_j - mean_i) q_i, and dv_j = (sum_i p_ij) dpooled.
    """
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(offsets_ptr, users, tl.program_id(0), PAIRS)
    if begin < last:
        key = begin + tl.arange(0, PAIRS)
        d = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
        k_rows = qkv_ptr + key * (3 * width) + width + head * depth
        weight = tl.load(weights_ptr + key * heads + head, mask=key < last, other=0.0)
        total = tl.zeros([PAIRS, DEPTH], tl.float32)
        column = tl.zeros([PAIRS], tl.float32)
        for start in range(first, last, PAIRS):
            query = start + tl.arange(0, PAIRS)
            q_rows = qkv_ptr + query * (3 * width) + head * depth
            norm = tl.load(norms_ptr + query * heads + head, mask=query < last, other=0.0)
            mean = tl.load(means_ptr + query * heads + head, mask=query < last, other=0.0)
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            score = accumulate(score, k_rows, q_rows, key < last, query < last, depth, False, DEPTH) * exponent
            p = tl.where((query < last)[None, :], tl.exp2(score - norm[None, :]), 0.0)
            column += tl.sum(p, 1)
            dscore = p * (weight[:, None] - mean[None, :])
            q_mask = (query < last)[:, None] & (d < depth)[None, :]
            q = tl.load(q_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
            total = dot(narrow(dscore, q.dtype), q, total)
        mask = (key < last)[:, None] & (d < depth)[None, :]
        at = dqkv_ptr + key[:, None] * (3 * width) + head * depth + d[None, :]
        store(at + width, total * scale, mask)
        dpooled_at = dpooled_ptr + user.to(tl.int64) * width + head * depth + d
        dpooled = tl.load(dpooled_at, mask=d < depth, other=0.0).to(tl.float32)
        store(at + 2 * width, column[:, None] * dpooled[None, :], mask)


class _Encoded(NamedTuple):
    """What a forward leaves behind, for the backward; [N, ...] a pair, [U, ...] a user."""

    weights: ContextWeights
    choices: Tensor  # [N]
    offsets: Tensor  # [U + 1]
    first: Tensor  # [N, H], inner0's output; h itself where inner is "linear"
    h: Tensor  # [N, H]
    qkv: Tensor  # [N, 3H]; h where there is no attention
    tiles: int
    tile: configs.AttentionTile
    pooled: Tensor  # [U, H]
    joined: Tensor  # [U, H], pooled after the output projection; itself where there is no attention
    outer: Tensor  # [U, H], outer0's output


class _Call(NamedTuple):
    """The arguments of a call, as the kernels take them."""

    pairs: Tensor
    choices: Tensor
    offsets: Tensor
    weights: ContextWeights
    longest: int  # pairs a user has at most
    inner: str
    pooling: str
    heads: int


def _call(
    pairs: Tensor, choices: Tensor, offsets: Tensor, weights: Sequence[Tensor | None], inner: str, pooling: str,
    heads: int,
) -> _Call:  # fmt: skip
    longest = int(offsets.diff().max()) if offsets.device.type == "cpu" and len(offsets) > 1 else len(pairs)
    choices = choices.contiguous()
    return _Call(
        pairs if pairs.stride(2) == 1 else pairs.contiguous(),
        choices.view(torch.uint8) if choices.dtype == torch.bool else choices,
        offsets.to(pairs.device).contiguous(),
        ContextWeights(*(None if t is None else t.contiguous() for t in weights)),
        longest, inner, pooling, heads,
    )  # fmt: skip


def _forward(call: _Call, latent: bool, noise: Tensor | None) -> Tensor:
    """What the outer encoder gives [U, Z], or the latents [U, H]."""
    w = call.weights
    users, encoded_width = len(call.offsets) - 1, w.outer1.shape[0]
    width = w.inner0.shape[0]
    encoded = call.pairs.new_empty(users, width if latent else encoded_width)
    sampled = latent and noise is not None and encoded_width == 2 * width
    noise = as_rows(noise) if sampled and noise is not None else None
    if not users:
        return encoded
    if call.longest > FEW:
        _encode(call, encoded, noise, FEW)
    # last: what the other way leaves of users of few pairs is written over
    encode_few(encoded, call.pairs, call.choices, call.offsets, w, call.inner, call.pooling, call.heads, noise)
    return encoded


def _encode(call: _Call, encoded: Tensor, noise: Tensor | None, limit: int) -> _Encoded:
    """Launches 1 to 4, for users of more than `limit` pairs: fills `encoded`."""
    pairs, choices, offsets, w, longest, inner, pooling, heads = call
    users, width = offsets.shape[0] - 1, w.inner0.shape[0]
    count, _, embedding = pairs.shape
    attention = pooling == "self-attention"

    h = pairs.new_empty(count, width)
    first = pairs.new_empty(count, width) if inner == "mlp" else h
    qkv = pairs.new_empty(count, 3 * width) if attention else h
    if count:
        step = configs.linear_tile(count, width, pairs.dtype)
        by_user = limit >= 0
        context_encode_kernel[(count // step.rows + users if by_user else triton.cdiv(count, step.rows),)](
            pairs, choices, offsets, w.inner0, w.inner0_bias, w.inner1, w.inner1_bias, w.qkv, w.qkv_bias, first, h, qkv,
            users, count, limit, embedding, width, pairs.stride(0), pairs.stride(1), MLP=inner == "mlp",
            ATTENTION=attention, BY_USER=by_user, ROWS=step.rows, COLUMNS=step.columns, STEP=step.step,
            num_warps=step.warps, num_stages=step.stages,
        )  # fmt: skip

    depth = width // heads if attention else width
    tile = configs.attention_tile(depth, pairs.dtype)
    tiles = count // tile.pairs + users
    parts = pairs.new_empty(tiles, width, dtype=torch.float32)
    if count and users and attention:
        shape = (users, width, depth, heads, configs.LOG2E * depth**-0.5)
        block = {"PAIRS": tile.pairs, "DEPTH": tile.depth, "num_warps": tile.warps}
        norms = parts
        if longest > tile.pairs:
            norms = pairs.new_empty(count, heads, dtype=torch.float32)
            context_statistics_kernel[(tiles, heads)](
                qkv, norms, offsets, norms, norms, *shape, BACKWARD=False, **block
            )  # fmt: skip
        context_pool_kernel[(tiles, heads)](qkv, offsets, norms, parts, limit, *shape, **block)
    elif count and users:
        context_sum_kernel[(tiles, triton.cdiv(width, tile.depth))](
            h, offsets, parts, users, limit, width, PAIRS=tile.pairs, COLUMNS=tile.depth, num_warps=tile.warps
        )  # fmt: skip

    pooled, outer = pairs.new_empty(2, users, width)
    joined = pairs.new_empty(users, width) if attention else pooled
    if users:
        step = configs.linear_tile(0, width, pairs.dtype)
        noise_rows = encoded if noise is None else noise
        context_outer_kernel[(triton.cdiv(users, step.rows),)](
            parts, offsets, w.out, w.out_bias, w.outer0, w.outer0_bias, w.outer1, w.outer1_bias, noise_rows, pooled,
            joined, outer, encoded, users, limit, width, encoded.shape[1], noise_rows.stride(0), ATTENTION=attention,
            MEAN=pooling == "mean", NOISE=noise is not None, PAIRS=tile.pairs, ROWS=step.rows, COLUMNS=step.columns,
            STEP=step.step, num_warps=step.warps, num_stages=step.stages,
        )  # fmt: skip
    return _Encoded(w, choices, offsets, first, h, qkv, tiles, tile, pooled, joined, outer)


def context(
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
) -> Tensor:
    """`fssa_fast.ops.context`."""
    return _forward(_call(pairs, choices, offsets, weights, inner, pooling, heads), False, None)


def context_rows_(
    bank: Tensor,
    slots: Tensor,
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    modulation: Tensor,
    modulation_bias: Tensor,
    noise: Tensor | None,
    inner: str,
    pooling: str,
    heads: int,
) -> Tensor:
    """`fssa_fast.ops.context_rows_`."""
    latents = _forward(_call(pairs, choices, offsets, weights, inner, pooling, heads), True, noise)
    users, depth = latents.shape
    if users:
        modulation = as_rows(modulation)
        width = bank.shape[1]
        step = configs.linear_tile(users, width, pairs.dtype)
        context_rows_kernel[(triton.cdiv(width, step.columns), triton.cdiv(users, step.rows))](
            latents, modulation, modulation_bias.contiguous(), bank, slots.contiguous(), users, depth, width,
            modulation.stride(0), *bank.stride(), ROWS=step.rows, COLUMNS=step.columns, STEP=step.step,
            num_warps=step.warps, num_stages=step.stages,
        )  # fmt: skip
    return latents


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x W^T + b by x, W and b."""
    return grad @ weight, grad.T @ x, grad.sum(0)


def context_backward(
    grad: Tensor,
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `context` by pairs and by the weights that are not None, in order; the same bits at every call.

    The first four launches and three more, for the attention; what remains are plain matrix products, and torch's.
    """
    call = _call(pairs, choices, offsets, weights, inner, pooling, heads)
    w = call.weights
    e = _encode(call, pairs.new_empty(len(call.offsets) - 1, len(w.outer1)), None, -1)
    count, width = e.h.shape
    counts = e.offsets.diff()
    users = torch.repeat_interleave(counts, output_size=count)
    dw: dict[str, Tensor] = {}

    douter, dw["outer1"], dw["outer1_bias"] = _linear_backward(grad, e.outer.relu(), w.outer1)
    djoined, dw["outer0"], dw["outer0_bias"] = _linear_backward(douter * (e.outer > 0), e.joined, w.outer0)
    if pooling == "self-attention":
        dpooled, dw["out"], _ = _linear_backward(djoined, e.pooled, w.out)
        dw["out_bias"] = (counts[:, None] * djoined).sum(0).to(grad.dtype)
        dqkv = _attention_backward(e, dpooled, users, heads)
        dh, dw["qkv"], dw["qkv_bias"] = _linear_backward(dqkv, e.h, w.qkv)
    else:
        share = counts.clamp(min=1)[:, None] if pooling == "mean" else 1
        dh = (djoined / share)[users]
    if inner == "mlp":
        dh, dw["inner1"], dw["inner1_bias"] = _linear_backward(dh, e.first.relu(), w.inner1)
        dh = dh * (e.first > 0)
    order = torch.stack([e.choices, 1 - e.choices], 1).long()[:, :, None].expand(pairs.shape)
    joined = pairs.gather(1, order).flatten(1)
    dx, dw["inner0"], dw["inner0_bias"] = _linear_backward(dh, joined, w.inner0)
    dpairs = torch.empty_like(joined.view(pairs.shape)).scatter_(1, order, dx.view(pairs.shape))
    return dpairs, [dw[name] for name, weight in w._asdict().items() if weight is not None]


def _attention_backward(e: _Encoded, dpooled: Tensor, users: Tensor, heads: int) -> Tensor:
    """The gradient of qkv [N, 3H], from that of pooled [U, H]; users [N] says whose a pair is."""
    count, width = e.h.shape
    depth = width // heads
    dqkv = torch.empty_like(e.qkv)
    if count:
        dpooled = dpooled.contiguous()
        value = e.qkv[:, 2 * width :].float() * dpooled[users]
        weights = value.view(count, heads, depth).sum(-1)
        norms, means = weights.new_empty(2, count, heads)
        shape = (len(e.pooled), width, depth, heads, configs.LOG2E * depth**-0.5)
        block = {"PAIRS": e.tile.pairs, "DEPTH": e.tile.depth, "num_warps": e.tile.warps}
        grid = (e.tiles, heads, triton.cdiv(depth, e.tile.depth))
        inputs = (e.qkv, weights, e.offsets, norms, means)
        context_statistics_kernel[grid[:2]](*inputs, *shape, BACKWARD=True, **block)
        context_queries_kernel[grid](*inputs, dqkv, *shape, depth**-0.5, **block)
        context_keys_kernel[grid](*inputs, dpooled, dqkv, *shape, depth**-0.5, **block)
    return dqkv
