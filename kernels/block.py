"""What a fused block does between its matrix products: adapt, gate, the norm with film, and attention over a cache.

A launch each, into the tensors given, with nothing read back by the host: so a decode step can be captured in a graph
and replayed. The cache holds keys [N, kv_heads, head_width, 32] and values [N, kv_heads, 32, head_width] in pages of 32
positions; `table` [S, P] says which page holds positions 32 p .. 32 p + 31 of a sequence. A token of sequence -1 is
nobody's: it writes nothing into the cache, and attends to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.kernels import configs
from fssa_fast.kernels.common import dot, narrow, store
from fssa_fast.kernels.film import film_norm_kernel


@triton.jit(do_not_specialize=["rows"])
def adapt_kernel(
    hidden_ptrs, gamma_ptrs, beta_ptrs, b_ptrs, y_ptrs, hidden_strides, gamma_strides, gamma_steps, beta_strides,
    beta_steps, b_strides, y_strides, ranks, columns, slots_ptr, rows,
    STARTS: tl.constexpr, BETAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y += (gamma * hidden + beta) B^T of all its parts; program (rows, tile), the tiles of all ys one after another.

    STARTS[i] is the first of y i's parts.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    met = m < rows
    slot = tl.load(slots_ptr + m, mask=met, other=0).to(tl.int64)
    tile = tl.program_id(1)
    # Unrolled over the ys, of which a program meets one: a tuple's pointers can be chosen only when it is compiled.
    for i in tl.static_range(len(y_ptrs)):
        tiles = tl.cdiv(columns[i], COLUMNS)
        if (tile >= 0) & (tile < tiles):
            n = tile * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            FIRST: tl.constexpr = STARTS[i]  # older Tritons take an element of a tuple for a number met at run time
            LAST: tl.constexpr = STARTS[i + 1]
            for part in tl.static_range(FIRST, LAST):
                gamma_rows = gamma_ptrs[part] + slot * gamma_strides[part]
                beta_rows = beta_ptrs[part] + slot * beta_strides[part]
                for start in range(0, ranks[part], RANKS):
                    r = start + tl.arange(0, RANKS)
                    inside = r < ranks[part]
                    b_at = b_ptrs[part] + n[None, :].to(tl.int64) * b_strides[part] + r[:, None]
                    b = tl.load(b_at, mask=inside[:, None] & (n < columns[i])[None, :], other=0.0)
                    mask = met[:, None] & inside[None, :]
                    hidden_at = hidden_ptrs[part] + m[:, None] * hidden_strides[part] + r[None, :]
                    hidden = tl.load(hidden_at, mask=mask, other=0.0).to(tl.float32)
                    gamma_at = gamma_rows[:, None] + r[None, :] * gamma_steps[part]
                    hidden *= tl.load(gamma_at, mask=mask, other=0.0).to(tl.float32)
                    if BETAS[part]:
                        beta_at = beta_rows[:, None] + r[None, :] * beta_steps[part]
                        hidden += tl.load(beta_at, mask=mask, other=0.0).to(tl.float32)
                    total = dot(narrow(hidden, b.dtype), b, total)
            mask = met[:, None] & (n < columns[i])[None, :]
            y_at = y_ptrs[i] + m[:, None] * y_strides[i] + n[None, :]
            store(y_at, tl.load(y_at, mask=mask, other=0.0).to(tl.float32) + total, mask)
        tile -= tiles


@triton.jit
def gate_kernel(
    gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, y_stride, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    """y = activation(gate) * up; program (row, stretch of columns)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    gate = tl.load(gate_ptr + row * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + d, mask=inside, other=0.0).to(tl.float32)
    # gelu's (1 + tanh(u)) / 2 is the logistic function of 2 u
    x = gate if SILU else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    store(y_ptr + row * y_stride + d, gate / (1 + tl.exp(-x)) * up, inside)


@triton.jit
def _turned(rows, met, norm_ptr, cos, sin, half, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    """Heads after their norm and the rotation by their position: the lower and upper halves, [G, HALF] in float32.

    rows [G] points at the heads' first columns; cos and sin [G] at those of their positions.
    """
    h = tl.arange(0, HALF)
    inside = h < half
    mask = met[:, None] & inside[None, :]
    low = tl.load(rows[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(rows[:, None] + half + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * half) + eps)[:, None]
        low = low * inverse * tl.load(norm_ptr + h, mask=inside, other=0.0).to(tl.float32)[None, :]
        high = high * inverse * tl.load(norm_ptr + half + h, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_low = tl.load(cos[:, None] + h[None, :], mask=mask, other=0.0)
    sin_low = tl.load(sin[:, None] + h[None, :], mask=mask, other=0.0)
    cos_high = tl.load(cos[:, None] + half + h[None, :], mask=mask, other=0.0)
    sin_high = tl.load(sin[:, None] + half + h[None, :], mask=mask, other=0.0)
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def remember_kernel(
    k_ptr, v_ptr, rotary, cache, heads, width, half, k_stride, v_stride,
    NORM: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes a token's keys, after norm and rotary position, and its values into the cache; program (token)."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(cache.positions + token).to(tl.int64)
    sequence = tl.load(cache.sequences + token).to(tl.int64)
    page = tl.load(cache.table + tl.maximum(sequence, 0) * cache.table_stride + position // PAGE).to(tl.int64)
    g = tl.arange(0, HEADS)
    h = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    met = g < tl.where(sequence < 0, 0, heads)  # nobody's token goes the same way and writes nothing
    angles = position * width + 0 * g
    low, high = _turned(
        k_ptr + token * k_stride + g * width, met, rotary.norm, rotary.cos + angles, rotary.sin + angles, half,
        rotary.eps, NORM, HALF,
    )  # fmt: skip
    base = (page * heads + g) * width * PAGE
    key_at = cache.key_pages + base[:, None] + h[None, :] * PAGE + position % PAGE
    mask = met[:, None] & (h < half)[None, :]
    store(key_at, low, mask)
    store(key_at + half * PAGE, high, mask)
    mask = met[:, None] & (d < width)[None, :]
    value = tl.load(v_ptr + token * v_stride + (g * width)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(cache.value_pages + base[:, None] + position % PAGE * width + d[None, :], value, mask=mask)


@triton.jit
def turn_kernel(
    q_ptr, k_ptr, v_ptr, queries, others, cache, turned_ptr, heads, kv_heads, width, half, q_stride, k_stride, v_stride,
    page_size,
    NORM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Queries after norm and rotary position; keys likewise, and values, into pages of rows; program (token)."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(cache.positions + token).to(tl.int64)
    sequence = tl.load(cache.sequences + token).to(tl.int64)
    page = tl.load(cache.table + tl.maximum(sequence, 0) * cache.table_stride + position // page_size).to(tl.int64)
    h = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    i = tl.arange(0, HEADS)
    met = i < heads
    angles = position * width + 0 * i
    low, high = _turned(
        q_ptr + token * q_stride + i * width, met, queries.norm, queries.cos + angles, queries.sin + angles, half,
        queries.eps, NORM, HALF,
    )  # fmt: skip
    at = turned_ptr + ((token * heads + i) * width)[:, None] + h[None, :]
    mask = met[:, None] & (h < half)[None, :]
    store(at, low, mask)
    store(at + half, high, mask)
    g = tl.arange(0, KV_HEADS)
    met = g < tl.where(sequence < 0, 0, kv_heads)
    angles = position * width + 0 * g
    low, high = _turned(
        k_ptr + token * k_stride + g * width, met, others.norm, others.cos + angles, others.sin + angles, half,
        others.eps, NORM, HALF,
    )  # fmt: skip
    row = ((page * page_size + position % page_size) * kv_heads + g) * width
    mask = met[:, None] & (h < half)[None, :]
    store(cache.key_pages + row[:, None] + h[None, :], low, mask)
    store(cache.key_pages + row[:, None] + half + h[None, :], high, mask)
    mask = met[:, None] & (d < width)[None, :]
    value = tl.load(v_ptr + token * v_stride + (g * width)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(cache.value_pages + row[:, None] + d[None, :], value, mask=mask)


@triton.jit
def _tanh(x):
    """tanh within some roundings of its value; where it is small, by a continued fraction, since 1 - exp cancels."""
    square = x * x
    small = x * (945 + square * (105 + square)) / (945 + square * (420 + 15 * square))
    e = tl.exp(-2 * tl.abs(x))  # of -|x|: never infinite
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def _merged(top, total, sums, other_top, other_total, other_sums):
    """The softmax's running maximum, denominator and sums [G], [G], [G, D] of two stretches of positions."""
    highest = tl.maximum(top, other_top)
    own = tl.exp(top - highest)
    other = tl.exp(other_top - highest)
    return highest, total * own + other_total * other, sums * own[:, None] + other_sums * other[:, None]


@triton.jit
def _store_heads(out_rows, width, mask, total, sums, WIDTH: tl.constexpr):
    """sums / total of a tile's rows; zeros where nothing was attended to."""
    d = tl.arange(0, WIDTH)
    value = sums / tl.where(total == 0, 1.0, total)[:, None]
    store(out_rows[:, None] + d[None, :], value, mask[:, None] & (d < width)[None, :])


@triton.jit
def _attend_chunk(
    low, high, pages, own_keys, own_values, begin, ends, window, chunk, page_size, width, half, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The softmax's maximum, denominator and sums over a chunk's positions, for the rows of one sequence.

    A row sees the `window` positions before its `ends`, or all (0); the first that any sees is `begin`. Steps begin at
    multiples of STEP, and one in which a row sees nothing leaves its numbers as they are, bit for bit: a row's result
    does not depend on the others in its tile.
    """
    h = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    within = tl.arange(0, STEP)
    STRETCH: tl.constexpr = min(STEP, PAGE)  # of positions whose keys are neighbours
    # A finite number that is less than all scores: -inf - -inf, of steps in which nothing is seen, would be NaN.
    top = tl.full([LANES], -1e38, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    sums = tl.zeros([LANES, WIDTH], tl.float32)
    stop = tl.minimum(chunk * CHUNK + CHUNK, tl.max(ends, 0))
    first = tl.maximum(chunk * CHUNK, begin // STEP * STEP)
    # The page of the next step is asked for in this one: else its keys could not be on their way while this one's are
    # multiplied.
    page = tl.load(pages + (first + within) // PAGE, mask=(first + within) // PAGE * PAGE < stop, other=0).to(tl.int64)
    for start in range(first, stop, STEP):
        at = start + within
        after = at + STEP
        next_page = tl.load(pages + after // PAGE, mask=after // PAGE * PAGE < stop, other=0).to(tl.int64)
        seen = at[None, :] < ends[:, None]
        if WINDOW:
            seen &= at[None, :] >= ends[:, None] - window
        key_at = tl.max_contiguous(tl.multiple_of(page * page_size + at % PAGE, STRETCH), STRETCH)
        key_mask = (h < half)[:, None]  # whole pages, to be loaded 16 bytes at a time: what is not seen is left out
        keys = own_keys + h[:, None] * PAGE + key_at[None, :]
        scores = tl.zeros([LANES, STEP], tl.float32)
        scores = dot(low, tl.load(keys, mask=key_mask, other=0.0), scores)
        scores = dot(high, tl.load(keys + half * PAGE, mask=key_mask, other=0.0), scores)
        scores *= scale
        if SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp(scores - highest[:, None])
        rescaled = tl.exp(top - highest)
        top = highest
        total = total * rescaled + tl.sum(shares, 1)
        value_at = own_values + (page * page_size + at % PAGE * width)[:, None] + d[None, :]
        values = tl.load(value_at, mask=(at < stop)[:, None] & (d < width)[None, :], other=0.0)
        sums = dot(narrow(shares, values.dtype), values, sums * rescaled[:, None])
        page = next_page
    return top, total, sums


@triton.jit(do_not_specialize=["tokens", "together"])
def attend_kernel(
    q_ptr, rotary, cache, out_ptr, scratch, group, width, half, scale, softcap, window, q_stride, out_stride, tokens,
    together,
    NORM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, JOINED: tl.constexpr, PAGE: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Attention of tokens' queries of one kv head, up to each token; program (tile of tokens, kv head, part).

    A tile has LANES rows: GROUP for each of `together` tokens. The tokens of one sequence meet its keys together, one
    sequence after the other. Chunks begin at multiples of CHUNK, and part p takes chunks p, p + parts, ... JOINED: one
    program does all, one after the other, else it leaves what it found for join_kernel, which merges them in the same
    order. `together` is no constant, so that a token by itself and one among others run the same instructions.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.arange(0, LANES)
    number = row // GROUP
    g = row % GROUP
    token = tl.program_id(0) * together + number
    met = (g < group) & (number < together) & (token < tokens)
    position = tl.load(cache.positions + token, mask=met, other=0)
    sequence = tl.load(cache.sequences + token, mask=met, other=-1)
    d = tl.arange(0, WIDTH)
    angles = position.to(tl.int64) * width
    low, high = _turned(
        q_ptr + token.to(tl.int64) * q_stride + (head * group + g) * width, met, rotary.norm, rotary.cos + angles,
        rotary.sin + angles, half, rotary.eps, NORM, HALF,
    )  # fmt: skip
    # The halves of a head are multiplied apart and summed, so that the rotation never has to join them.
    low = narrow(low, cache.key_pages.dtype.element_ty)
    high = narrow(high, cache.key_pages.dtype.element_ty)
    page_size = heads * width * PAGE
    own_keys = cache.key_pages + head * width * PAGE
    own_values = cache.value_pages + head * width * PAGE
    column = (head * group + g) * width
    if JOINED:  # else join_kernel does it
        nobodys = met & (sequence < 0)
        nothing = tl.zeros([LANES, WIDTH], tl.float32)
        out_rows = out_ptr + token.to(tl.int64) * out_stride + column
        _store_heads(out_rows, width, nobodys, tl.zeros([LANES], tl.float32), nothing, WIDTH)
    # Sequences from the highest number down: each turn takes the rows of the highest that is left.
    current = tl.max(sequence, 0)
    while current >= 0:
        mine = sequence == current
        ends = tl.where(mine, position + 1, 0)
        begin = 0
        if WINDOW:
            begin = tl.maximum(tl.min(tl.where(mine, position + 1, 2147483647), 0) - window, 0)
        pages = cache.table + current.to(tl.int64) * cache.table_stride
        last = tl.cdiv(tl.max(ends, 0), CHUNK)
        first = begin // CHUNK
        if JOINED:
            top = tl.full([LANES], -1e38, tl.float32)
            total = tl.zeros([LANES], tl.float32)
            sums = tl.zeros([LANES, WIDTH], tl.float32)
            # A chunk at a time even where one program does all: with join_kernel's, the bits are the same.
            for chunk in range(first, last):
                chunk_top, chunk_total, chunk_sums = _attend_chunk(
                    low, high, pages, own_keys, own_values, begin, ends, window, chunk, page_size, width, half, scale,
                    softcap, WINDOW, SOFTCAP, PAGE, CHUNK, STEP, LANES, HALF, WIDTH,
                )  # fmt: skip
                top, total, sums = _merged(top, total, sums, chunk_top, chunk_total, chunk_sums)
            _store_heads(out_ptr + token.to(tl.int64) * out_stride + column, width, mine, total, sums, WIDTH)
        else:
            parts = tl.num_programs(2)
            first += (tl.program_id(2) - first % parts + parts) % parts
            for chunk in range(first, last, parts):
                top, total, sums = _attend_chunk(
                    low, high, pages, own_keys, own_values, begin, ends, window, chunk, page_size, width, half, scale,
                    softcap, WINDOW, SOFTCAP, PAGE, CHUNK, STEP, LANES, HALF, WIDTH,
                )  # fmt: skip
                at = ((chunk * tokens + token).to(tl.int64) * heads + head) * group + g
                tl.store(scratch.tops + at, top, mask=mine)
                tl.store(scratch.totals + at, total, mask=mine)
                mask = mine[:, None] & (d < width)[None, :]
                tl.store(scratch.sums + at[:, None] * width + d[None, :], sums, mask=mask)
        current = tl.max(tl.where(sequence < current, sequence, -1), 0)


@triton.jit
def join_kernel(
    cache, out_ptr, scratch, group, width, window, out_stride,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merges what attend_kernel's programs have left for a token; program (token, kv head)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    position = tl.load(cache.positions + token)
    end = tl.where(tl.load(cache.sequences + token) < 0, 0, position + 1)
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    g = tl.arange(0, GROUP)
    d = tl.arange(0, WIDTH)
    met = g < group
    mask = met[:, None] & (d < width)[None, :]
    top = tl.full([GROUP], -1e38, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    sums = tl.zeros([GROUP, WIDTH], tl.float32)
    for chunk in range(begin // CHUNK, tl.cdiv(end, CHUNK)):
        row = ((chunk * tl.num_programs(0) + token) * heads + head) * group + g
        chunk_top = tl.load(scratch.tops + row, mask=met, other=-1e38)
        chunk_total = tl.load(scratch.totals + row, mask=met, other=0.0)
        chunk_sums = tl.load(scratch.sums + row[:, None] * width + d[None, :], mask=mask, other=0.0)
        top, total, sums = _merged(top, total, sums, chunk_top, chunk_total, chunk_sums)
    _store_heads(out_ptr + token * out_stride + (head * group + g) * width, width, met, total, sums, WIDTH)


class Part(NamedTuple):
    """An adapter's second half: y [N, O] += (gamma[slot] * hidden [N, R] + beta[slot]) B^T, b [O, R]."""

    hidden: Tensor
    gamma: Tensor
    beta: Tensor | None
    b: Tensor
    y: Tensor


def adapt_(parts: Sequence[Part], slots: Tensor) -> None:
    """Adds adapters to their ys, in one launch; slots [N]. Parts of the same y are summed before they are added."""
    by_y: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        y = part.y
        by_y.setdefault((y.data_ptr(), y.storage_offset(), y.stride(), y.shape), []).append(part)
    targets = list(by_y.values())
    ordered = [part for own in targets for part in own]
    starts = [0]
    for own in targets:
        starts.append(starts[-1] + len(own))
    ys = tuple(own[0].y for own in targets)
    widths, ranks = tuple(y.shape[1] for y in ys), tuple(part.b.shape[1] for part in ordered)
    betas = [part.gamma if part.beta is None else part.beta for part in ordered]
    rows = len(ys[0])
    tile = configs.expand_tile(rows, max(widths), max(ranks), ys[0].dtype)

    def strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...]:
        return tuple(tensor.stride(dim) for tensor in tensors)

    hiddens, gammas, bs = ([getattr(part, name) for part in ordered] for name in ("hidden", "gamma", "b"))
    adapt_kernel[(triton.cdiv(rows, tile.rows), sum(triton.cdiv(width, tile.columns) for width in widths))](
        tuple(hiddens), tuple(gammas), tuple(betas), tuple(bs), ys, strides(hiddens, 0), strides(gammas, 0),
        strides(gammas, 1), strides(betas, 0), strides(betas, 1), strides(bs, 0), strides(ys, 0), ranks, widths,
        slots, rows, STARTS=tuple(starts), BETAS=tuple(part.beta is not None for part in ordered), ROWS=tile.rows,
        COLUMNS=tile.columns, RANKS=tile.ranks, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def gate_(gate: Tensor, up: Tensor, y: Tensor, silu: bool) -> None:
    """y = activation(gate) * up, all [N, F]: silu, or gelu by its approximation with tanh."""
    tile = configs.film_tile(y.shape[1], y.dtype)
    gate_kernel[(len(y), triton.cdiv(y.shape[1], tile.block))](
        gate, up, y, y.shape[1], gate.stride(0), up.stride(0), y.stride(0), SILU=silu, BLOCK=tile.block,
        num_warps=tile.warps,
    )  # fmt: skip


def film_norm_(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float,
    hidden: Tensor, normed: Tensor,
) -> None:  # fmt: skip
    """The op `film_norm` of rows [N, D] into hidden and normed, contiguous; hidden may be residual, and normed x."""
    tile = configs.norm_tile(x.shape[1])
    film_norm_kernel[(len(x),)](
        x, residual, scale, shift, slots, weight, hidden, normed, x.shape[1], 1, eps, x.stride(0), residual.stride(0),
        *scale.stride(), *shift.stride(), BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip


class Cache(NamedTuple):
    """Where tokens are, and the cache, as the kernels take them."""

    positions: Tensor
    sequences: Tensor
    table: Tensor
    key_pages: Tensor
    value_pages: Tensor
    table_stride: int


class Scratch(NamedTuple):
    """What is left of each chunk for join_kernel, float32: sums [chunks, N, heads, head_width], and the others
    [chunks, N, heads].
    """

    sums: Tensor
    tops: Tensor
    totals: Tensor


class Rotary(NamedTuple):
    """cos and sin, float32 [positions, head_width]; the weight of the heads' norm, where they have one; its eps."""

    cos: Tensor
    sin: Tensor
    norm: Tensor | None
    eps: float


def remember_(
    k: Tensor, v: Tensor, rotary: Rotary, positions: Tensor, sequences: Tensor, table: Tensor, keys: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """Writes keys and values [N, kv_heads * head_width] of tokens into the cache, in one launch."""
    _, heads, width, page = keys.shape
    remember_kernel[(len(k),)](
        k, v, rotary, Cache(positions, sequences, table, keys, values, table.stride(0)), heads, width, width // 2,
        k.stride(0), v.stride(0),
        NORM=rotary.norm is not None, PAGE=page, HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(width // 2), WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def turn_(
    q: Tensor, k: Tensor, v: Tensor, queries: Rotary, others: Rotary, positions: Tensor, sequences: Tensor,
    table: Tensor, turned: Tensor, keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    """For another kernel's attention: queries into turned [N, heads, head_width], keys and values into a cache.

    The cache holds [pages, positions, kv_heads, head_width] of each. In one launch.
    """
    _, page, kv_heads, width = keys.shape
    heads = turned.shape[1]
    cache = Cache(positions, sequences, table, keys, values, table.stride(0))
    turn_kernel[(len(q),)](
        q, k, v, queries, others, cache, turned, heads, kv_heads, width, width // 2, q.stride(0), k.stride(0),
        v.stride(0), page,
        NORM=queries.norm is not None, HEADS=triton.next_power_of_2(heads), KV_HEADS=triton.next_power_of_2(kv_heads),
        HALF=triton.next_power_of_2(width // 2), WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


def attend_(
    q: Tensor, rotary: Rotary, positions: Tensor, sequences: Tensor, table: Tensor, keys: Tensor, values: Tensor,
    scale: float, softcap: float, window: int, out: Tensor,
) -> None:  # fmt: skip
    """Attention of q [N, heads * head_width] over the cache, up to each token itself, into out of the same shape.

    softcap, window: 0 for none. One launch; two where the cache has room for sequences of several chunks and there are
    few tokens. Where some sequence has several tokens, neighbours among them share a tile and meet its keys once.
    """
    _, heads, width, page = keys.shape
    group = q.shape[1] // (heads * width)
    padded = triton.next_power_of_2(group)
    tile = configs.attend_tile(width, q.dtype)
    lanes = max(tile.lanes, padded)
    together = lanes // padded if len(q) > len(table) else 1
    tiles, room = triton.cdiv(len(q), together), table.shape[1] * page
    parts = configs.attend_parts(tiles * heads, room, tile)
    scratch = Scratch(q, q, q)
    if parts > 1:
        sums = q.new_empty(triton.cdiv(room, tile.chunk), len(q), heads * group, width, dtype=torch.float32)
        scratch = Scratch(sums, *sums.new_empty(2, *sums.shape[:-1]))
    cache = Cache(positions, sequences, table, keys, values, table.stride(0))
    full = triton.next_power_of_2(width)
    attend_kernel[(tiles, heads, parts)](
        q, rotary, cache, out, scratch, group, width, width // 2, scale, softcap, window, q.stride(0), out.stride(0),
        len(q), together, NORM=rotary.norm is not None, WINDOW=window > 0, SOFTCAP=softcap > 0, JOINED=parts == 1,
        PAGE=page, CHUNK=tile.chunk, STEP=tile.step, LANES=lanes, GROUP=padded, HALF=max(16, full // 2),
        WIDTH=max(16, full), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        join_kernel[(len(q), heads)](
            cache, out, scratch, group, width, window, out.stride(0), CHUNK=tile.chunk, GROUP=padded,
            WIDTH=max(16, full), num_warps=4,
        )  # fmt: skip
