"""film and film_norm: rows scaled and shifted by their slot's modulation; one launch each, a row a program.

Backward: the rows of each slot are summed by one set of programs, in a fixed order, without atomics; those programs
meet every row once and write its gradient on the way. film_norm's first finds two numbers a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.kernels import configs
from fssa_fast.kernels.common import as_rows, narrow, rows_per_slot, slot_segments, store


@triton.jit(do_not_specialize_on_alignment=["group"])
def film_kernel(
    x_ptr, scale_ptr, shift_ptr, slots_ptr, y_ptr, width, group,
    x_stride, scale_stride, scale_step, shift_stride, shift_step, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x * (1 + scale[slot]) + shift[slot]; program (row, stretch of columns)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    slot = tl.load(slots_ptr + row // group).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + d, mask=inside).to(tl.float32)
    scale = tl.load(scale_ptr + slot * scale_stride + d * scale_step, mask=inside).to(tl.float32)
    shift = tl.load(shift_ptr + slot * shift_stride + d * shift_step, mask=inside).to(tl.float32)
    store(y_ptr + row * width + d, x * (1 + scale) + shift, inside)


@triton.jit(do_not_specialize_on_alignment=["group"])
def film_norm_kernel(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, slots_ptr, weight_ptr, hidden_ptr, normed_ptr, width, group, eps,
    x_stride, residual_stride, scale_stride, scale_step, shift_stride, shift_step, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden = film(residual + x), normed = weight * hidden / rms(hidden), of hidden as it is stored."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    slot = tl.load(slots_ptr + row // group).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + slot * scale_stride + d * scale_step, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + slot * shift_stride + d * shift_step, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    hidden = narrow((residual + x) * (1 + scale) + shift, hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * width + d, hidden, mask=inside)
    hidden = hidden.to(tl.float32)
    scaled = hidden * tl.rsqrt(tl.sum(hidden * hidden) / width + eps)
    store(normed_ptr + row * width + d, scaled * weight, inside)


@triton.jit(do_not_specialize_on_alignment=["group"])
def film_norm_rows_kernel(
    grad_ptr, x_ptr, residual_ptr, scale_ptr, shift_ptr, slots_ptr, weight_ptr, inverse_ptr, pull_ptr, width, group,
    eps, grad_stride, x_stride, residual_stride, scale_stride, scale_step, shift_stride, shift_step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's 1 / rms, and what the norm's gradient takes away for every unit of hidden: rms^-3 mean(grad w hidden)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    slot = tl.load(slots_ptr + row // group).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + slot * scale_stride + d * scale_step, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + slot * shift_stride + d * shift_step, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + d, mask=inside, other=0.0).to(tl.float32)
    hidden = (residual + x) * (1 + scale) + shift
    inverse = tl.rsqrt(tl.sum(hidden * hidden) / width + eps)
    tl.store(inverse_ptr + row, inverse)
    tl.store(pull_ptr + row, inverse * inverse * inverse * tl.sum(grad * weight * hidden) / width)


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["group"])
def film_columns_kernel(
    grad_ptr, grad_normed_ptr, x_ptr, residual_ptr, scale_ptr, shift_ptr, weight_ptr, inverse_ptr, pull_ptr, order_ptr,
    starts_ptr, dx_ptr, dscale_ptr, dshift_ptr, dweight_ptr, slots, width, group, grad_stride, grad_normed_stride,
    x_stride, residual_stride, scale_stride, scale_step, shift_stride, shift_step,
    NORM: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients; program (slot, columns, split) walks its share of the slot's rows. Sums go to [split, slot, D]."""
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    inside = d < width
    scale = tl.load(scale_ptr + slot * scale_stride + d * scale_step, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        shift = tl.load(shift_ptr + slot * shift_stride + d * shift_step, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    dscale = tl.zeros([COLUMNS], tl.float32)
    dshift = tl.zeros([COLUMNS], tl.float32)
    dweight = tl.zeros([COLUMNS], tl.float32)
    first = tl.load(starts_ptr + slot) * group
    last = tl.load(starts_ptr + slot + 1) * group
    for start in range(first + split * ROWS, last, SPLITS * ROWS):
        i = start + tl.arange(0, ROWS)
        met = i < last
        row = tl.load(order_ptr + i // group, mask=met, other=0) * group + i % group
        mask = met[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            residual_at = residual_ptr + row[:, None] * residual_stride + d[None, :]
            normed_at = grad_normed_ptr + row[:, None] * grad_normed_stride + d[None, :]
            x += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
            grad_normed = tl.load(normed_at, mask=mask, other=0.0).to(tl.float32)
            inverse = tl.load(inverse_ptr + row, mask=met, other=0.0)[:, None]
            pull = tl.load(pull_ptr + row, mask=met, other=0.0)[:, None]
            hidden = x * (1 + scale)[None, :] + shift[None, :]
            grad += inverse * grad_normed * weight[None, :] - pull * hidden
            dweight += tl.sum(grad_normed * hidden * inverse, 0)
        store(dx_ptr + row[:, None] * width + d[None, :], grad * (1 + scale)[None, :], mask)
        dscale += tl.sum(grad * x, 0)
        dshift += tl.sum(grad, 0)
    at = (split * slots + slot) * width + d
    store(dscale_ptr + at, dscale, inside)
    store(dshift_ptr + at, dshift, inside)
    if NORM:
        store(dweight_ptr + at, dweight, inside)


def film(x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
    """`fssa_fast.ops.film`, in one launch."""
    y = x.new_empty(x.shape)
    if x.numel():
        rows = as_rows(x)
        count, width = rows.shape
        tile = configs.film_tile(width, x.dtype)
        film_kernel[(count, triton.cdiv(width, tile.block))](
            rows, scale, shift, slots.contiguous(), y, width, rows_per_slot(x, slots),
            rows.stride(0), *scale.stride(), *shift.stride(), BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return y


def film_norm(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`fssa_fast.ops.film_norm`, in one launch; D at most `configs.WIDEST_NORM`."""
    hidden, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel():
        rows, residuals = as_rows(x), as_rows(residual)
        count, width = rows.shape
        tile = configs.norm_tile(width)
        film_norm_kernel[(count,)](
            rows, residuals, scale, shift, slots.contiguous(), weight.contiguous(), hidden, normed, width,
            rows_per_slot(x, slots), eps, rows.stride(0), residuals.stride(0), *scale.stride(), *shift.stride(),
            BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return hidden, normed


def _columns(
    grad: Tensor, grad_normed: Tensor, x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor,
    weight: Tensor, inverse: Tensor, pull: Tensor, group: int, norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches `film_columns_kernel` on rows; returns dx, and dscale and dshift [S, D] and dweight [D] in any dtype."""
    (count, width), bank = x.shape, scale.shape[0]
    tile = configs.column_tile(count, width, bank)
    order, starts = slot_segments(slots, bank)
    dx = x.new_empty(x.shape)
    # Nothing is added to the sum of a single split: it is rounded where it is made.
    shape, dtype = (tile.splits, bank, width), x.dtype if tile.splits == 1 else torch.float32
    dscales, dshifts = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
    dweights = x.new_empty(shape, dtype=torch.float32) if norm else dscales
    film_columns_kernel[(bank, triton.cdiv(width, tile.columns), tile.splits)](
        grad, grad_normed, x, residual, scale, shift, weight, inverse, pull, order, starts, dx, dscales, dshifts,
        dweights, bank, width, group, grad.stride(0), grad_normed.stride(0), x.stride(0), residual.stride(0),
        *scale.stride(), *shift.stride(), NORM=norm, SPLITS=tile.splits, ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip
    dscale, dshift = (sums[0] if tile.splits == 1 else sums.sum(0) for sums in (dscales, dshifts))
    return dx, dscale, dshift, dweights.sum((0, 1)) if norm else dshift


def film_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `film` by x, scale and shift: a sort of the slots, one launch, a sum over splits."""
    if not x.numel():
        return x.new_empty(x.shape), scale.new_zeros(scale.shape), scale.new_zeros(scale.shape)
    grads, rows = as_rows(grad), as_rows(x)
    dx, dscale, dshift, _ = _columns(
        grads, grads, rows, rows, scale, shift, slots, scale, grads, grads, rows_per_slot(x, slots), norm=False
    )
    return dx.view(x.shape), dscale.to(x.dtype), dshift.to(x.dtype)


def film_norm_backward(
    grad_hidden: Tensor,
    grad_normed: Tensor,
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    slots: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `film_norm` by x (and residual), scale, shift and weight: `film_backward` and one launch before."""
    if not x.numel():
        return x.new_empty(x.shape), *(t.new_zeros(t.shape) for t in (scale, shift, weight))
    grads, normed_grads, rows, residuals = (as_rows(t) for t in (grad_hidden, grad_normed, x, residual))
    count, width = rows.shape
    group, weight = rows_per_slot(x, slots), weight.contiguous()
    tile = configs.norm_tile(width)
    inverse, pull = x.new_empty(2, count, dtype=torch.float32)
    film_norm_rows_kernel[(count,)](
        normed_grads, rows, residuals, scale, shift, slots.contiguous(), weight, inverse, pull, width, group, eps,
        normed_grads.stride(0), rows.stride(0), residuals.stride(0), *scale.stride(), *shift.stride(),
        BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip
    dx, *sums = _columns(
        grads, normed_grads, rows, residuals, scale, shift, slots, weight, inverse, pull, group, norm=True
    )
    dscale, dshift, dweight = (s.to(x.dtype) for s in sums)
    return dx.view(x.shape), dscale, dshift, dweight
