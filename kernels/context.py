"""context: from choices to latents in one launch, on to rows of the bank in a second.

A user of few pairs is one program's work, one of many pairs is shared out: see `fssa_fast.kernels.context_few` and
`fssa_fast.kernels.context_many`. Which way a user goes, and its bits, follow its own pairs, never the other users.
Users are ragged and packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.arguments import ContextWeights
from fssa_fast.kernels import configs
from fssa_fast.kernels.common import accumulate, as_rows, constants, store
from fssa_fast.kernels.context_few import FEW, FEWER, pool_few
from fssa_fast.kernels.context_linears import Choices, Encoded, Scratch, Shape, encode_pooled
from fssa_fast.kernels.context_many import take_turn


@triton.jit(do_not_specialize=["users", "tiles"])
def context_encode_kernel(
    given, w, scratch, to, users, tiles, shape,
    MEAN: tl.constexpr, SOME_FEW: tl.constexpr, SOME_MANY: tl.constexpr, MANY, TILE,
):  # fmt: skip
    """Fills `to`. Programs: the users, if SOME_FEW, then the turns, if SOME_MANY.

    Each way has its own copy of `encode_pooled`: one for both takes more registers than there are.
    """
    program = tl.program_id(0)
    alone = users if SOME_FEW else 0
    if program < alone:
        user = program.to(tl.int64)
        begin = tl.load(given.offsets + user).to(tl.int64)
        count = (tl.load(given.offsets + user + 1) - begin).to(tl.int32)
        if count <= FEW:
            vectors = scratch.vectors + user * (4 * shape.width)
            if count <= FEWER:
                pool_few(given, w, scratch, vectors, begin, count, shape, MEAN, FEWER, TILE)
            else:
                pool_few(given, w, scratch, vectors, begin, count, shape, MEAN, FEW, TILE)
            tl.debug_barrier()
            encode_pooled(user, count, w, to, vectors, shape.width, TILE)
    else:
        if SOME_MANY:
            user, count, vectors, complete = take_turn(given, w, scratch, users, tiles, shape, MEAN, MANY, TILE)
            if complete:
                tl.debug_barrier()
                encode_pooled(user, count, w, to, vectors, shape.width, TILE)


@triton.jit(do_not_specialize=["users"])
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


class Call(NamedTuple):
    """The arguments of a call, as the kernels take them."""

    pairs: Tensor
    choices: Tensor
    offsets: Tensor
    weights: ContextWeights
    pooling: str
    heads: int
    fewest: int  # pairs a user has, as far as that is known without waiting for a GPU
    most: int

    @classmethod
    def of(
        cls, pairs: Tensor, choices: Tensor, offsets: Tensor, weights: Sequence[Tensor | None], pooling: str, heads: int
    ) -> Call:
        """The arguments made contiguous where they have to be, on one device."""
        fewest, most = 0, len(pairs)
        if offsets.device.type == "cpu" and len(offsets) > 1:
            fewest, most = (int(n) for n in offsets.diff().aminmax())
        choices = choices.contiguous()
        return cls(
            pairs if pairs.stride(2) == 1 else pairs.contiguous(),
            choices.view(torch.uint8) if choices.dtype == torch.bool else choices,
            offsets.to(pairs.device).contiguous(),
            ContextWeights(*(None if t is None else t.contiguous() for t in weights)),
            pooling, heads, fewest, most,
        )  # fmt: skip


def encode(call: Call, outputs: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """One launch: what the outer encoder gives [U, outputs], with noise the latents; and the vectors of `Scratch`."""
    w, pairs = call.weights, call.pairs
    users, (count, _, embedding), width = len(call.offsets) - 1, pairs.shape, w.inner0.shape[0]
    encoded = pairs.new_empty(users, outputs)
    attention, some_few, some_many = w.qkv is not None, call.fewest <= FEW.value, call.most > FEW.value
    tile = configs.encode_tile(width, pairs.dtype)
    many = configs.many_tile(width, call.heads, attention, pairs.dtype)
    depth = width // call.heads if attention else width
    tiles = 2 * triton.cdiv(count, many.pairs) if some_many else 0
    turns = tiles * (many.pairs // many.rows + (call.heads * triton.cdiv(depth, many.depth) if attention else 0))

    h_rows, qkv_rows = (0 if tile.in_registers else count), (count if some_many or not tile.in_registers else 0)
    h = pairs.new_empty(h_rows, width)
    scratch = Scratch(
        torch.empty_like(h) if w.inner1 is not None else h,
        h,
        pairs.new_empty(qkv_rows, 3 * width) if attention else h,
        pairs.new_empty(tiles, width, dtype=torch.float32),
        torch.zeros(1 + 2 * users if some_many else 0, dtype=torch.int32, device=pairs.device),
        pairs.new_empty(users, 4, width, dtype=torch.float32),
    )
    if users:
        context_encode_kernel[(users * some_few + turns,)](
            Choices(pairs, call.choices, call.offsets, embedding, pairs.stride(0), pairs.stride(1)), w, scratch,
            Encoded(noise, 0 if noise is None else noise.stride(0), encoded, outputs), users, tiles,
            Shape(width, call.heads, depth, configs.LOG2E * depth**-0.5), MEAN=call.pooling == "mean",
            SOME_FEW=some_few, SOME_MANY=some_many, MANY=constants(many), TILE=constants(tile), num_warps=tile.warps,
            num_stages=1,
        )  # fmt: skip
    return encoded, scratch.vectors


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
    call = Call.of(pairs, choices, offsets, weights, pooling, heads)
    return encode(call, len(call.weights.outer1), None)[0]


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
    call = Call.of(pairs, choices, offsets, weights, pooling, heads)
    depth = modulation.shape[1]
    if noise is not None:  # a point latent takes none
        noise = as_rows(noise) if len(call.weights.outer1) == 2 * depth else None
    latents, _ = encode(call, depth, noise)
    users = len(latents)
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
