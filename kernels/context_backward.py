"""context's backward: the forward again, three kernels for the attention, and torch's matrix products.

Plain gradients of linears are left to torch, as a well-kept library does them better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fssa_fast.kernels import configs
from fssa_fast.kernels.common import accumulate, dot, narrow, store
from fssa_fast.kernels.context import Call, encode
from fssa_fast.kernels.context_linears import Shape
from fssa_fast.kernels.context_many import last_user


@triton.jit
def _span_of_tile(offsets_ptr, users, tile, PAIRS: tl.constexpr):
    """The tile's user, the user's first and last pair (exclusive), and the tile's first pair.

    User u owns the tiles `offsets[u] // PAIRS + u` up to, not including, `offsets[u + 1] // PAIRS + u + 1`, from its
    own first pair on: always enough, and known without reading the offsets on the host.
    """
    user = last_user(offsets_ptr, users, tile, PAIRS)
    first = tl.load(offsets_ptr + user).to(tl.int64)
    last = tl.load(offsets_ptr + user + 1).to(tl.int64)
    begin = first + (tile - user - (first // PAIRS).to(tl.int32)) * PAIRS
    return user, first, last, begin


class Attention(NamedTuple):
    """What the attention's kernels read; the first of them writes norms and means."""

    qkv: Tensor  # [N, 3H]
    weights: Tensor  # float32 [N, heads]: a key's value by the gradient of its user's pooled vector
    offsets: Tensor  # [U + 1]
    norms: Tensor  # float32 [N, heads]: log2 of the softmax's denominator, exponents in base 2
    means: Tensor  # float32 [N, heads]: the softmax's mean of weights


@triton.jit(do_not_specialize=["users"])
def context_statistics_kernel(
    given, users, shape, PAIRS: tl.constexpr, DEPTH: tl.constexpr
):
    """Program (tile of queries, head): norms and means."""
    width, heads, depth = shape.width, shape.heads, shape.depth
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(given.offsets, users, tl.program_id(0), PAIRS)
    if begin < last:
        query = begin + tl.arange(0, PAIRS)
        q_rows = given.qkv + query * (3 * width) + head * depth
        high = tl.full([PAIRS], float("-inf"), tl.float32)
        total = tl.zeros([PAIRS], tl.float32)
        mean = tl.zeros([PAIRS], tl.float32)
        for start in range(first, last, PAIRS):
            key = start + tl.arange(0, PAIRS)
            k_rows = given.qkv + key * (3 * width) + width + head * depth
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            score = accumulate(score, q_rows, k_rows, query < last, key < last, depth, False, DEPTH) * shape.exponent
            score = tl.where((key < last)[None, :], score, float("-inf"))
            higher = tl.maximum(high, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
            total = total * tl.exp2(high - higher) + tl.sum(p, 1)
            weight = tl.load(given.weights + key * heads + head, mask=key < last, other=0.0)
            mean = mean * tl.exp2(high - higher) + tl.sum(p * weight[None, :], 1)  # in the same pass: no p is kept
            high = higher
        store(given.norms + query * heads + head, high + tl.log2(total), query < last)
        store(given.means + query * heads + head, mean / total, query < last)


@triton.jit(do_not_specialize=["users"])
def context_queries_kernel(
    given, dqkv_ptr, users, shape, scale, PAIRS: tl.constexpr, DEPTH: tl.constexpr
):
    """Program (tile of queries, head, stretch of its depth): dq_i = scale sum_j p_ij (w_j - mean_i) k_j."""
    width, heads, depth = shape.width, shape.heads, shape.depth
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(given.offsets, users, tl.program_id(0), PAIRS)
    if begin < last:
        query = begin + tl.arange(0, PAIRS)
        d = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
        q_rows = given.qkv + query * (3 * width) + head * depth
        norm = tl.load(given.norms + query * heads + head, mask=query < last, other=0.0)
        mean = tl.load(given.means + query * heads + head, mask=query < last, other=0.0)
        total = tl.zeros([PAIRS, DEPTH], tl.float32)
        for start in range(first, last, PAIRS):
            key = start + tl.arange(0, PAIRS)
            k_rows = given.qkv + key * (3 * width) + width + head * depth
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            score = accumulate(score, q_rows, k_rows, query < last, key < last, depth, False, DEPTH) * shape.exponent
            p = tl.where((key < last)[None, :], tl.exp2(score - norm[:, None]), 0.0)
            weight = tl.load(given.weights + key * heads + head, mask=key < last, other=0.0)
            # Pooling sums over queries, so that all have one gradient: the softmax's Jacobian needs two numbers a row.
            dscore = p * (weight[None, :] - mean[:, None])
            k_mask = (key < last)[:, None] & (d < depth)[None, :]
            k = tl.load(k_rows[:, None] + d[None, :], mask=k_mask, other=0.0)
            total = dot(narrow(dscore, k.dtype), k, total)
        at = dqkv_ptr + query[:, None] * (3 * width) + head * depth + d[None, :]
        store(at, total * scale, (query < last)[:, None] & (d < depth)[None, :])


@triton.jit(do_not_specialize=["users"])
def context_keys_kernel(
    given, dpooled_ptr, dqkv_ptr, users, shape, scale, PAIRS: tl.constexpr, DEPTH: tl.constexpr
):
    """Program (tile of keys, head, stretch of its depth).

    dk_j = scale sum_i p_ij (w_j - mean_i) q_i, and dv_j = (sum_i p_ij) dpooled.
    """
    width, heads, depth = shape.width, shape.heads, shape.depth
    head = tl.program_id(1)
    user, first, last, begin = _span_of_tile(given.offsets, users, tl.program_id(0), PAIRS)
    if begin < last:
        key = begin + tl.arange(0, PAIRS)
        d = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
        k_rows = given.qkv + key * (3 * width) + width + head * depth
        weight = tl.load(given.weights + key * heads + head, mask=key < last, other=0.0)
        total = tl.zeros([PAIRS, DEPTH], tl.float32)
        column = tl.zeros([PAIRS], tl.float32)
        for start in range(first, last, PAIRS):
            query = start + tl.arange(0, PAIRS)
            q_rows = given.qkv + query * (3 * width) + head * depth
            norm = tl.load(given.norms + query * heads + head, mask=query < last, other=0.0)
            mean = tl.load(given.means + query * heads + head, mask=query < last, other=0.0)
            score = tl.zeros([PAIRS, PAIRS], tl.float32)
            # Keys by queries: what belongs to a key is then summed along a row, by one program, without atomics.
            score = accumulate(score, k_rows, q_rows, key < last, query < last, depth, False, DEPTH) * shape.exponent
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
    """Gradients of `context` by pairs and by the weights that are not None, in order; the same bits at every call."""
    call = Call.of(pairs, choices, offsets, weights, pooling, heads)
    w = call.weights
    _, vectors = encode(call, len(w.outer1), None)
    pooled, joined, outer = vectors[:, :3].to(grad.dtype).unbind(1)
    order = torch.stack([call.choices, 1 - call.choices], 1).long()[:, :, None].expand(pairs.shape)
    options = pairs.gather(1, order).flatten(1)
    h = first = F.linear(options, w.inner0, w.inner0_bias)
    if w.inner1 is not None:
        h = F.linear(first.relu(), w.inner1, w.inner1_bias)
    counts = call.offsets.diff()
    users = torch.repeat_interleave(counts, output_size=len(pairs))

    dw: dict[str, Tensor] = {}
    douter, dw["outer1"], dw["outer1_bias"] = _linear_backward(grad, outer, w.outer1)
    dpooled, dw["outer0"], dw["outer0_bias"] = _linear_backward(
        douter * (outer > 0), pooled if w.out is None else joined, w.outer0
    )
    if w.out is not None and w.qkv is not None:
        dw["out_bias"] = (counts[:, None] * dpooled).sum(0).to(grad.dtype)
        dpooled, dw["out"], _ = _linear_backward(dpooled, pooled, w.out)
        dqkv = _attention_backward(F.linear(h, w.qkv, w.qkv_bias), call, dpooled, users)
        dh, dw["qkv"], dw["qkv_bias"] = _linear_backward(dqkv, h, w.qkv)
    else:
        share = counts.clamp(min=1)[:, None] if pooling == "mean" else 1
        dh = (dpooled / share)[users]
    if w.inner1 is not None:
        dh, dw["inner1"], dw["inner1_bias"] = _linear_backward(dh, first.relu(), w.inner1)
        dh = dh * (first > 0)
    dx, dw["inner0"], dw["inner0_bias"] = _linear_backward(dh, options, w.inner0)
    dpairs = torch.empty_like(options.view(pairs.shape)).scatter_(1, order, dx.view(pairs.shape))
    return dpairs, [dw[name] for name, weight in w._asdict().items() if weight is not None]


def _attention_backward(qkv: Tensor, call: Call, dpooled: Tensor, users: Tensor) -> Tensor:
    """The gradient of qkv [N, 3H], from that of pooled [U, H]; users [N] says whose a pair is."""
    count, width = len(qkv), dpooled.shape[1]
    depth = width // call.heads
    dqkv = torch.empty_like(qkv)
    if count:
        dpooled = dpooled.contiguous()
        value = qkv[:, 2 * width :].float() * dpooled[users]
        weights = value.view(count, call.heads, depth).sum(-1)
        norms, means = weights.new_empty(2, count, call.heads)
        tile = configs.attention_tile(depth, qkv.dtype)
        shape = len(dpooled), Shape(width, call.heads, depth, configs.LOG2E * depth**-0.5)
        block = {"PAIRS": tile.pairs, "DEPTH": tile.depth, "num_warps": tile.warps}
        grid = (count // tile.pairs + len(dpooled), call.heads, triton.cdiv(depth, tile.depth))
        given = Attention(qkv, weights, call.offsets, norms, means)
        context_statistics_kernel[grid[:2]](given, *shape, **block)
        context_queries_kernel[grid](given, dqkv, *shape, depth**-0.5, **block)
        context_keys_kernel[grid](given, dpooled, dqkv, *shape, depth**-0.5, **block)
    return dqkv
