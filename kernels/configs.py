"""The kernels' tiles: fixed, by shape class; nothing is tuned at run time.

What a row's bits depend on (the splits of a sum, the steps along it) follows the widths alone. The number of rows
chooses only how many of them a program takes and whether splits run side by side or one after the other, which the
bits do not depend on: a row's result is the same in every batch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from fssa_fast.kernels.common import power_of_two

WIDEST_NORM = 65536  # film_norm holds a row in registers
WIDEST_IN_REGISTERS = 256  # context holds a tile of h in registers where it is 16-bit and up to so wide
LOG2E = 1.4426950408889634


def _wide(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a launch can begin before the one before it has ended: on NVIDIA's chips from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


class FilmTile(NamedTuple):
    block: int
    warps: int


def film_tile(width: int, dtype: torch.dtype) -> FilmTile:
    """A row, or a stretch of it, at 16 bytes a thread."""
    lanes = 4 if _wide(dtype) else 8
    block = power_of_two(width, 32 * lanes, 256 * lanes)
    return FilmTile(block, block // (32 * lanes))


def norm_tile(width: int) -> FilmTile:
    """A whole row."""
    block = power_of_two(width, 128, WIDEST_NORM)
    # A program has at most 1,024 threads, and a warp of AMD's chips has 64 of them.
    most = 32 if block > 16384 and torch.version.hip is None else 16
    return FilmTile(block, max(1, min(most, block // 512)))


class ColumnTile(NamedTuple):
    rows: int
    columns: int
    splits: int
    warps: int


def column_tile(rows: int, width: int, slots: int) -> ColumnTile:
    """Sums over the rows of each slot; few slots share their rows out among `splits` programs."""
    columns = power_of_two(width, 16, 128)
    programs = slots * -(-width // columns)
    splits = max(1, min(16, 256 // programs, rows // 64))
    return ColumnTile(32, columns, splits, 4)


class ShrinkTile(NamedTuple):
    rows: int
    ranks: int
    step: int  # along D
    chunk: int  # of D, that one split sums
    splits: int
    joined: int  # splits that one program sums, one after the other
    warps: int
    stages: int


def shrink_tile(rows: int, width: int, rank: int, dtype: torch.dtype) -> ShrinkTile:
    """Splits of at least 512 of D, at most 16; side by side while there are few other tiles."""
    step = 16 if _wide(dtype) else 64
    splits = max(1, min(16, width // 512))
    chunk = -(-width // (splits * step)) * step
    splits = -(-width // chunk)
    height = 16 if rows <= 64 else 32
    ranks = power_of_two(rank, 16, 32 if _wide(dtype) else 64)
    tiles = -(-rows // height) * -(-rank // ranks)
    joined = splits if tiles >= 128 else 1
    return ShrinkTile(height, ranks, step, chunk, splits, joined, 4, 2 if _wide(dtype) and height > 16 else 3)


class ExpandTile(NamedTuple):
    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


def expand_tile(rows: int, widest: int, rank: int, dtype: torch.dtype) -> ExpandTile:
    """`rank` and `widest` are the largest of the targets'."""
    columns = power_of_two(widest, 16, 64 if widest < 4096 or _wide(dtype) else 128)
    return ExpandTile(16 if rows <= 64 else 32, columns, power_of_two(rank, 16, 32 if _wide(dtype) else 64), 4, 2)


class LinearTile(NamedTuple):
    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def linear_tile(rows: int, width: int, dtype: torch.dtype) -> LinearTile:
    """Modulations of users: few rows, so a program takes many columns and streams the weights."""
    height = 16 if rows <= 1024 else 32
    if _wide(dtype):
        columns = power_of_two(width, 16, 64 if height == 16 else 32)
        return LinearTile(height, columns, 16, columns // 8, 2)
    columns = power_of_two(width, 16, 128 if height == 16 else 64)
    return LinearTile(height, columns, 64, columns // 16, 3)


class AttentionTile(NamedTuple):
    pairs: int
    depth: int  # of a head, at a time
    warps: int


def attention_tile(depth: int, dtype: torch.dtype) -> AttentionTile:
    """Square tiles of a user's pairs."""
    if _wide(dtype):
        return AttentionTile(32, 32, 8)
    return AttentionTile(64, power_of_two(depth, 16, 64), 8)


class EncodeTile(NamedTuple):
    in_registers: bool  # h; else it goes through memory
    width: int  # of a vector, at a time; in registers all of it
    columns: int  # of a weight, at a time
    step: int
    stages: int  # of the walk along E
    depth: int  # of a head, at a time
    warps: int


def encode_tile(width: int, dtype: torch.dtype) -> EncodeTile:
    """context's encoders: a tile's h stays in registers where it fits."""
    stretch = power_of_two(width, 16, WIDEST_IN_REGISTERS)
    if _wide(dtype):
        return EncodeTile(False, stretch, 32, 16, 1, 16, 4)
    in_registers = width <= WIDEST_IN_REGISTERS
    return EncodeTile(in_registers, stretch, 32 if in_registers else 64, 64, 2, 16, 8)


class ManyTile(NamedTuple):
    rows: int  # pairs that a program encodes
    pairs: int  # that a program attends from, and to at a time; a multiple of rows
    depth: int  # of a head, at a time
    whole: bool  # whether that is all of it
    stages: int  # of the walk along the keys


def many_tile(width: int, heads: int, attention: bool, dtype: torch.dtype) -> ManyTile:
    """A user's many pairs: few enough a program that the chip is full, and the weights are not read too often."""
    if not attention:
        return ManyTile(16, 16, 16, True, 1)
    tile = attention_tile(width // heads, dtype)
    return ManyTile(32, tile.pairs, tile.depth, width // heads <= tile.depth, 1 if _wide(dtype) else 2)


class AttendTile(NamedTuple):
    lanes: int  # queries at a time: of one kv head, of as many tokens as there is room for
    step: int  # positions at a time
    chunk: int  # positions that are summed by themselves, then merged with the others
    warps: int
    stages: int


def attend_tile(head_width: int, dtype: torch.dtype) -> AttendTile:
    """Attention over the cache: one tile for prompts and for decoding, since a tile's shape decides a row's bits.

    Most of a decode's lanes are idle. 64 of them do as many operations a byte of keys and values as a chip has time for
    while the bytes arrive.
    """
    if _wide(dtype):
        return AttendTile(16, 16 if head_width > 64 else 32, 512, 8, 1)
    if head_width > 128:
        return AttendTile(32, 32, 512, 8, 2)
    return AttendTile(64, 32, 512, 4, 3) if head_width > 64 else AttendTile(64, 64, 512, 8, 2)


def attend_parts(programs: int, room: int, tile: AttendTile) -> int:
    """How many programs share out a tile of tokens' chunks, in a cache with room for so many positions a sequence.

    As many as fill the chip beside the other tiles, whatever the room; each takes one chunk in so many. The bits are
    the same for any number.
    """
    return min(-(-room // tile.chunk), max(1, 512 // programs))
