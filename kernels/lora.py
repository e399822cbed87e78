"""lora: shrink, then expand: two launches, whatever the number of projections that share the input.

Shrink multiplies rows by A into hidden [splits, rows, R] in float32, D shared out in splits so that a decode step's few
rows still fill the chip. Expand sums the splits in their order, modulates by the rows' slots, multiplies by every
projection's B and adds to y. No atomics; what a row's bits depend on follows the widths (see configs). Where the chip
can, expand is launched while shrink runs, and waits for it where it first reads hidden (EARLY).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fssa_fast.kernels import configs
from fssa_fast.kernels.common import (
    accumulate,
    as_rows,
    dot,
    narrow,
    rows_per_slot,
    shares_memory,
    slot_segments,
    store,
)


@triton.jit(do_not_specialize=["rows"])
def lora_shrink_kernel(
    x_ptr, a_ptr, hidden_ptr, rows, width, rank, chunk, x_stride, a_stride, hidden_stride, hidden_split_stride,
    JOINED: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """hidden = x A^T; program (rows, ranks, split): one split, or JOINED of them one after the other."""
    if EARLY:
        gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    x_rows = x_ptr + m * x_stride
    a_rows = a_ptr + r.to(tl.int64) * a_stride
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for split in range(tl.program_id(2) * JOINED, tl.program_id(2) * JOINED + JOINED):
        start = split * chunk
        part = tl.zeros([ROWS, RANKS], tl.float32)
        total += accumulate(
            part, x_rows + start, a_rows + start, m < rows, r < rank, min(chunk, width - start), False, STEP
        )
    at = hidden_ptr + tl.program_id(2) * hidden_split_stride + m[:, None] * hidden_stride + r[None, :]
    store(at, total, (m < rows)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["group"])
def lora_expand_kernel(
    hidden_ptr, y_ptrs, out_ptrs, b_ptrs, y_strides, out_strides, b_strides, ranks, columns, gamma_ptr, beta_ptr,
    slots_ptr, scaling, rows, group, hidden_stride, hidden_split_stride, gamma_stride, gamma_step, beta_stride,
    beta_step,
    BETA: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """out = y + scaling * (gamma * hidden + beta) B of every projection.

    Program (rows, tile): the tiles of all projections' columns, one projection after the other.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    met = m < rows
    slot = tl.load(slots_ptr + m // group, mask=met, other=0).to(tl.int64)
    gamma_rows = gamma_ptr + slot * gamma_stride
    beta_rows = beta_ptr + slot * beta_stride
    if EARLY:
        gdc_wait()
    tile = tl.program_id(1)
    rank_offset = 0
    for i in tl.static_range(len(y_ptrs)):
        tiles = tl.cdiv(columns[i], COLUMNS)
        if (tile >= 0) & (tile < tiles):
            n = tile * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, ranks[i], RANKS):
                r = start + tl.arange(0, RANKS)
                inside = r < ranks[i]
                b_at = b_ptrs[i] + r[:, None].to(tl.int64) * b_strides[i] + n[None, :]
                b = tl.load(b_at, mask=inside[:, None] & (n < columns[i])[None, :], other=0.0)
                mask = met[:, None] & inside[None, :]
                column = rank_offset + r[None, :]
                hidden_at = hidden_ptr + m[:, None] * hidden_stride + column
                hidden = tl.zeros([ROWS, RANKS], tl.float32)
                for split in tl.static_range(SPLITS):  # in their order, so that a row's bits are the same every time
                    hidden += tl.load(hidden_at + split * hidden_split_stride, mask=mask, other=0.0)
                hidden *= tl.load(gamma_rows[:, None] + column * gamma_step, mask=mask, other=0.0).to(tl.float32)
                if BETA:
                    hidden += tl.load(beta_rows[:, None] + column * beta_step, mask=mask, other=0.0).to(tl.float32)
                total = dot(narrow(hidden, b.dtype), b, total)
            mask = met[:, None] & (n < columns[i])[None, :]
            y_at = y_ptrs[i] + m[:, None] * y_strides[i] + n[None, :]
            y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
            store(out_ptrs[i] + m[:, None] * out_strides[i] + n[None, :], y + scaling * total, mask)
        tile -= tiles
        rank_offset += ranks[i]


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["group"])
def lora_ranks_kernel(
    grad_ptr, hidden_ptr, gamma_ptr, beta_ptr, order_ptr, starts_ptr, dproduct_ptr, modulated_ptr, dgamma_ptr,
    dbeta_ptr, slots, rank, group, scaling, gamma_stride, gamma_step, beta_stride, beta_step,
    BETA: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Between the two products, backward; program (slot, ranks, split) walks its share of the slot's rows.

    grad is that of scaling * (gamma * hidden + beta) before scaling. Writes the gradient of hidden, and what B met,
    scaled, for the two products that follow; sums dgamma and dbeta to [split, slot, R].
    """
    slot = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    inside = r < rank
    gamma = tl.load(gamma_ptr + slot * gamma_stride + r * gamma_step, mask=inside, other=0.0).to(tl.float32)
    if BETA:
        beta = tl.load(beta_ptr + slot * beta_stride + r * beta_step, mask=inside, other=0.0).to(tl.float32)
    dgamma = tl.zeros([COLUMNS], tl.float32)
    dbeta = tl.zeros([COLUMNS], tl.float32)
    first = tl.load(starts_ptr + slot) * group
    last = tl.load(starts_ptr + slot + 1) * group
    for start in range(first + split * ROWS, last, SPLITS * ROWS):
        i = start + tl.arange(0, ROWS)
        met = i < last
        row = tl.load(order_ptr + i // group, mask=met, other=0) * group + i % group
        mask = met[:, None] & inside[None, :]
        at = row[:, None] * rank + r[None, :]
        hidden = tl.load(hidden_ptr + at, mask=mask, other=0.0)
        grad = scaling * tl.load(grad_ptr + at, mask=mask, other=0.0)
        modulated = gamma[None, :] * hidden
        if BETA:
            modulated += beta[None, :]
        store(dproduct_ptr + at, gamma[None, :] * grad, mask)
        store(modulated_ptr + at, scaling * modulated, mask)
        dgamma += tl.sum(grad * hidden, 0)
        dbeta += tl.sum(grad, 0)
    at = (split * slots + slot) * rank + r
    store(dgamma_ptr + at, dgamma, inside)
    store(dbeta_ptr + at, dbeta, inside)


def _shrink(x: Tensor, a: Tensor, hidden: Tensor | None = None) -> Tensor:
    """x [N, D] by a [R, D]: the splits [splits, N, R] in float32; their sum, written to hidden [N, R] where given."""
    count, width = x.shape
    rank = a.shape[0]
    tile = configs.shrink_tile(count, width, rank, x.dtype)
    joined = tile.joined if hidden is None else tile.splits
    parts = tile.splits // joined
    out = x.new_empty(parts, count, rank, dtype=torch.float32) if hidden is None else hidden.unsqueeze(0)
    lora_shrink_kernel[(triton.cdiv(count, tile.rows), triton.cdiv(rank, tile.ranks), parts)](
        x, a, out, count, width, rank, tile.chunk, x.stride(0), a.stride(0), out.stride(1), out.stride(0),
        JOINED=joined, EARLY=configs.launches_early(x.device), ROWS=tile.rows, RANKS=tile.ranks, STEP=tile.step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _lora(
    x: Tensor, ys: Sequence[Tensor], outs: Sequence[Tensor], a: Tensor, bs: Sequence[Tensor], gamma: Tensor,
    beta: Tensor | None, slots: Tensor, scaling: float,
) -> None:  # fmt: skip
    """Both launches; ys and outs are rows, and may be the same."""
    group = rows_per_slot(x, slots)
    rows = as_rows(x)
    hidden = _shrink(rows, as_rows(a))
    bs = [as_rows(b) for b in bs]
    ranks, widths = tuple(b.shape[0] for b in bs), tuple(b.shape[1] for b in bs)
    count = rows.shape[0]
    tile = configs.expand_tile(count, max(widths), max(ranks), x.dtype)
    shift = gamma if beta is None else beta
    early = configs.launches_early(x.device)
    lora_expand_kernel[(triton.cdiv(count, tile.rows), sum(triton.cdiv(width, tile.columns) for width in widths))](
        hidden, tuple(ys), tuple(outs), tuple(bs), tuple(y.stride(0) for y in ys), tuple(o.stride(0) for o in outs),
        tuple(b.stride(0) for b in bs), ranks, widths, gamma, shift, slots.contiguous(), scaling, count, group,
        hidden.stride(1), hidden.stride(0), *gamma.stride(), *shift.stride(),
        BETA=beta is not None, EARLY=early, SPLITS=hidden.shape[0], ROWS=tile.rows, COLUMNS=tile.columns,
        RANKS=tile.ranks, num_warps=tile.warps, num_stages=tile.stages, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def lora(
    x: Tensor,
    ys: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> list[Tensor]:
    """`fssa_fast.ops.lora`, in two launches."""
    outs = [y.new_empty(y.shape) for y in ys]
    if x.numel():
        _lora(x, [as_rows(y) for y in ys], [as_rows(o) for o in outs], a, bs, gamma, beta, slots, scaling)
    return outs


def lora_(
    x: Tensor,
    ys: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> None:
    """`fssa_fast.ops.lora_`, in two launches, and a copy for every y whose rows are not evenly spaced."""
    if x.numel():
        sources = [as_rows(y) for y in ys]
        _lora(x, sources, sources, a, bs, gamma, beta, slots, scaling)
        for y, source in zip(ys, sources, strict=True):
            if not shares_memory(y, source):
                y.copy_(source.view(y.shape))


def lora_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of `lora` by x, a, bs, gamma and beta (taken as zeros where None); the same bits at every call.

    Hidden and its gradient are found by the shrink kernel in float32, a launch a projection and one; one kernel then
    joins them with the modulations. dx, da and dbs are plain matrix products, and torch's.
    """
    rank, bank = a.shape[0], gamma.shape[0]
    if not x.numel():
        return (
            x.new_empty(x.shape), a.new_zeros(a.shape), [b.new_zeros(b.shape) for b in bs],
            gamma.new_zeros(gamma.shape), gamma.new_zeros(gamma.shape),
        )  # fmt: skip
    rows, grads = as_rows(x), [as_rows(g) for g in grads]
    count = rows.shape[0]
    ranks = [b.shape[0] for b in bs]
    hidden, dhidden = x.new_empty(2, count, rank, dtype=torch.float32)
    _shrink(rows, as_rows(a), hidden)
    for grad, b, part in zip(grads, bs, dhidden.split(ranks, 1), strict=True):
        _shrink(grad, as_rows(b), part)
    tile = configs.column_tile(count, rank, bank)
    order, starts = slot_segments(slots, bank)
    dproduct, modulated = x.new_empty(2, count, rank)
    sums = x.new_empty(2, tile.splits, bank, rank, dtype=torch.float32)
    shift = gamma if beta is None else beta
    lora_ranks_kernel[(bank, triton.cdiv(rank, tile.columns), tile.splits)](
        dhidden, hidden, gamma, shift, order, starts, dproduct, modulated, sums[0], sums[1], bank, rank,
        rows_per_slot(x, slots), scaling, *gamma.stride(), *shift.stride(), BETA=beta is not None,
        SPLITS=tile.splits, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    dgamma, dbeta = (part.sum(0).to(x.dtype) for part in sums)
    dbs = [part.T @ grad for part, grad in zip(modulated.split(ranks, 1), grads, strict=True)]
    return (dproduct @ a).view(x.shape), dproduct.T @ rows, dbs, dgamma, dbeta
