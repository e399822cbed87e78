"""context's way for a user of many pairs: many programs of one launch, who wait for each other.

Programs take turns in the order they begin. The first turns each encode a tile of some user's pairs; the others each
attend, from a tile of queries and in one head, to all of the user's keys, once all of its pairs are encoded. A program
only waits for turns before its own, whose programs run already, so no launch is too large. Whose turn completes a user
adds what the tiles gave, in their order, and goes on to what is encoded.

The attention never holds more than a tile of scores: a running maximum, denominator and sum of values a query.

Tiles are of PAIRS pairs, counted from the user's own first. Call PAIRS pairs of the packed order a window. Two tiles of
users of many pairs begin in it at most: one of the user who has the window's first pair, tile 2 w, and one of the last
user to begin after that, tile 2 w + 1. So much is known without reading the offsets on the host: nothing waits for the
GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fssa_fast.kernels.common import accumulate, dot, narrow, store
from fssa_fast.kernels.context_few import FEW
from fssa_fast.kernels.context_linears import encode_in_memory, encode_in_registers, sum_rows


@triton.jit
def last_user(offsets_ptr, users, at, PAIRS: tl.constexpr):
    """The last user who begins at this pair or before; or at this tile, where each begins a new one of PAIRS pairs."""
    low = at * 0  # of at's type, which the loop keeps
    high = low + users
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(offsets_ptr + middle).to(tl.int32)
        if PAIRS is not None:
            begins = begins // PAIRS + middle
        low = tl.where(begins <= at, middle, low)
        high = tl.where(begins <= at, high, middle)
    return low


@triton.jit
def _tile(offsets_ptr, users, tile, PAIRS: tl.constexpr):
    """The tile's user, the user's first and last pair (exclusive), the tile's first pair; see the module's docstring.

    Where there is no such tile its first pair is not before the last.
    """
    window = tile // 2 * PAIRS
    inside = tile % 2 * (PAIRS - 1)
    user = last_user(offsets_ptr, users, window + inside, None)
    first = tl.load(offsets_ptr + user).to(tl.int32)
    last = tl.load(offsets_ptr + user + 1).to(tl.int32)
    begin = first + tl.cdiv(tl.maximum(window - first, 0), PAIRS) * PAIRS
    if (inside > 0) & (first <= window):  # the window's second tile, and nobody begins after its first pair
        begin = last
    return user, first, last, begin


@triton.jit
def _arrive(count_ptr):
    """Says that what this program wrote is there; returns how many have said so before."""
    tl.debug_barrier()  # one thread adds, for what all of them wrote
    return tl.atomic_add(count_ptr, 1)


@triton.jit
def _wait(count_ptr, wanted):
    """Until so many have arrived: what they wrote can be read."""
    # A load might be served by this processor's own cache for ever; an atomic of nothing is not.
    while tl.atomic_add(count_ptr, 0, sem="acquire") < wanted:
        pass
    tl.debug_barrier()


@triton.jit
def _encode_tile(given, w, scratch, part, begin, last, width, MANY, TILE):
    """qkv of MANY.rows pairs from `begin` on; without attention the sum of their h, to `part`."""
    m = (begin + tl.arange(0, MANY.rows)).to(tl.int64)
    met = m < last
    if TILE.in_registers:
        h = encode_in_registers(given, w, m, met, width, MANY.rows, TILE)
        n = tl.arange(0, TILE.width)
        if w.qkv is None:
            tl.store(part + n, tl.sum(tl.where(met[:, None], h, 0.0), 0), mask=n < width)
        else:
            rounded = narrow(h, w.qkv.dtype.element_ty)
            for start in range(0, 3 * width, TILE.columns):
                c = start + tl.arange(0, TILE.columns)
                mask = (n < width)[:, None] & (c < 3 * width)[None, :]
                weight = tl.load(w.qkv + c[None, :].to(tl.int64) * width + n[:, None], mask=mask, other=0.0)
                y = dot(rounded, weight, tl.zeros([MANY.rows, TILE.columns], tl.float32))
                y += tl.load(w.qkv_bias + c, mask=c < 3 * width, other=0.0).to(tl.float32)[None, :]
                at = scratch.qkv + m[:, None] * (3 * width) + c[None, :]
                store(at, y, met[:, None] & (c < 3 * width)[None, :])
    else:
        encode_in_memory(given, w, scratch, m, met, width, MANY.rows, TILE)
        if w.qkv is None:
            tl.debug_barrier()
            sum_rows(scratch.h, m, met, 1, part, width, TILE.columns)


@triton.jit
def _attend_tile(qkv_ptr, part, begin, first, last, head, stretch, shape, MANY):
    """part's columns of a stretch of a head = sum_i sum_j p_ij v_j, over a tile of queries i and all keys j."""
    width, depth = shape.width, shape.depth
    query = (begin + tl.arange(0, MANY.pairs)).to(tl.int64)
    asks = query < last
    d = stretch * MANY.depth + tl.arange(0, MANY.depth)
    q_rows = qkv_ptr + query * (3 * width) + head * depth
    if MANY.whole:
        q = tl.load(q_rows[:, None] + d[None, :], mask=asks[:, None] & (d < depth)[None, :], other=0.0)
    high = tl.full([MANY.pairs], float("-inf"), tl.float32)
    total = tl.zeros([MANY.pairs], tl.float32)
    mixed = tl.zeros([MANY.pairs, MANY.depth], tl.float32)
    for start in tl.range(first, last, MANY.pairs, num_stages=MANY.stages):
        key = (start + tl.arange(0, MANY.pairs)).to(tl.int64)
        answers = key < last
        k_rows = qkv_ptr + key * (3 * width) + width + head * depth
        score = tl.zeros([MANY.pairs, MANY.pairs], tl.float32)
        if MANY.whole:
            k = tl.load(k_rows[None, :] + d[:, None], mask=(d < depth)[:, None] & answers[None, :], other=0.0)
            score = dot(q, k, score)
        else:
            score = accumulate(score, q_rows, k_rows, asks, answers, depth, False, MANY.depth)
        score = tl.where(answers[None, :], score * shape.exponent, float("-inf"))
        higher = tl.maximum(high, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        fade = tl.exp2(high - higher)
        total = total * fade + tl.sum(p, 1)
        v_at = k_rows[:, None] + (width + d)[None, :]
        v = tl.load(v_at, mask=answers[:, None] & (d < depth)[None, :], other=0.0)
        mixed = dot(narrow(p, v.dtype), v, mixed * fade[:, None])
        high = higher
    pooled = tl.sum(tl.where(asks[:, None], mixed / total[:, None], 0.0), 0)
    tl.store(part + head * depth + d, pooled, mask=d < depth)


@triton.jit
def _add_parts(parts, first, count, divisor, pooled, width, PAIRS: tl.constexpr, TILE):
    """pooled = the sum of the parts of a user's tiles, over the divisor."""
    for start in range(0, width, TILE.width):
        n = start + tl.arange(0, TILE.width)
        total = tl.zeros([TILE.width], tl.float32)
        for begin in range(0, tl.cdiv(count, PAIRS), 16):  # 16 at once: in flight together, summed in one order
            number = begin + tl.arange(0, 16)
            tile = 2 * (first // PAIRS + number) + tl.where((number == 0) & (first % PAIRS > 0), 1, 0)
            mask = (number < tl.cdiv(count, PAIRS))[:, None] & (n < width)[None, :]
            total += tl.sum(tl.load(parts + tile.to(tl.int64)[:, None] * width + n[None, :], mask=mask, other=0.0), 0)
        tl.store(pooled + n, total / divisor, mask=n < width)


@triton.jit
def take_turn(given, w, scratch, users, tiles, shape, MEAN: tl.constexpr, MANY, TILE):
    """One program's turn, some user's: returns the user, its count, its vectors, and whether pooled is now among them.

    MANY and TILE are `configs.ManyTile` and `configs.EncodeTile`.
    """
    width, heads = shape.width, shape.heads
    # Not program_id: programs need not begin in its order, and one that waited for a turn not yet begun could hold the
    # place that this turn needs.
    turn = tl.atomic_add(scratch.turns, 1)
    encoding: tl.constexpr = MANY.pairs // MANY.rows  # turns a tile
    attending = heads * tl.cdiv(shape.depth, MANY.depth)  # the same
    tile = turn // encoding
    if turn >= tiles * encoding:
        tile = (turn - tiles * encoding) // attending
    user, first, last, begin = _tile(given.offsets, users, tile, MANY.pairs)
    count = last - first
    arrived = scratch.turns + 1 + 2 * user
    part = scratch.parts + tile.to(tl.int64) * width
    vectors = scratch.vectors + user.to(tl.int64) * (4 * width)
    complete = False
    if count > FEW:
        if turn < tiles * encoding:
            begin += turn % encoding * MANY.rows
            if begin < last:
                _encode_tile(given, w, scratch, part, begin, last, width, MANY, TILE)
                before = _arrive(arrived)
                if w.qkv is None:
                    complete = before == tl.cdiv(count, MANY.rows) - 1
        elif begin < last:
            if w.qkv is not None:
                _wait(arrived, tl.cdiv(count, MANY.rows))
                job = (turn - tiles * encoding) % attending
                head, stretch = job % heads, job // heads
                _attend_tile(scratch.qkv, part, begin, first, last, head, stretch, shape, MANY)
                complete = _arrive(arrived + 1) == tl.cdiv(count, MANY.pairs) * attending - 1
    if complete:
        tl.debug_barrier()
        divisor = 1
        if MEAN:
            divisor = count
        _add_parts(scratch.parts, first, count, divisor, vectors, width, MANY.pairs, TILE)
    return user.to(tl.int64), count, vectors, complete
