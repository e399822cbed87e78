"""The linears of context's inner encoder, for a tile of pairs whose rows lie in memory.

Between two products of one program the rows go through memory behind a barrier, so that no width has to fit in
registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fssa_fast.kernels.common import accumulate, store


@triton.jit
def linear_rows(
    x_rows, x_mask, depth, w_ptr, w_stride, bias_ptr, y_rows, width,
    RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr = None,
):  # fmt: skip
    """y = relu?(x) w^T + bias, all columns; w [width, depth]."""
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        w_rows = w_ptr + n.to(tl.int64) * w_stride
        total = accumulate(total, x_rows, w_rows, x_mask, n < width, depth, RELU, STEP, STAGES)
        total += tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        store(y_rows[:, None] + n[None, :], total, x_mask[:, None] & (n < width)[None, :])


@triton.jit
def encode_rows(
    m, met, pairs_ptr, choices_ptr, inner0_ptr, inner0_bias_ptr, inner1_ptr, inner1_bias_ptr, qkv_w_ptr, qkv_bias_ptr,
    first_ptr, h_ptr, qkv_ptr, embedding, width, pair_stride, option_stride,
    MLP: tl.constexpr, ATTENTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Of the pairs m: first = inner0 [chosen ; rejected]; h = inner1 relu(first) or first itself; qkv of h."""
    choice = tl.load(choices_ptr + m, mask=met, other=0).to(tl.int64)
    chosen = pairs_ptr + m * pair_stride + choice * option_stride
    rejected = pairs_ptr + m * pair_stride + (1 - choice) * option_stride
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        inside = n < width
        w_rows = inner0_ptr + n.to(tl.int64) * (2 * embedding)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        total = accumulate(total, chosen, w_rows, met, inside, embedding, False, STEP, STAGES)
        total = accumulate(total, rejected, w_rows + embedding, met, inside, embedding, False, STEP, STAGES)
        total += tl.load(inner0_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        store(first_ptr + m[:, None] * width + n[None, :], total, met[:, None] & inside[None, :])
    if MLP:
        tl.debug_barrier()
        linear_rows(
            first_ptr + m * width, met, width, inner1_ptr, width, inner1_bias_ptr, h_ptr + m * width, width,
            True, ROWS, COLUMNS, STEP, STAGES,
        )  # fmt: skip
    if ATTENTION:
        tl.debug_barrier()
        linear_rows(
            h_ptr + m * width, met, width, qkv_w_ptr, width, qkv_bias_ptr, qkv_ptr + m * (3 * width), 3 * width,
            False, ROWS, COLUMNS, STEP, STAGES,
        )  # fmt: skip
