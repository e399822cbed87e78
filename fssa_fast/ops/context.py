"""context: from the choices of many users to their latents, and on to their rows of the bank.

The encoder is that of arXiv 2412.13998, section 3.1: every choice is the joined embeddings of what was chosen and what
was rejected; an inner encoder, a permutation-invariant pooling, an outer MLP.
Users are ragged: their pairs are packed one after the other, and `offsets` says where each user begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fssa_fast.arguments import (
    INNER,
    POOLING,
    ContextWeights,
    check_choices,
    check_integers,
    check_offsets,
    check_slot_range,
    check_tensor,
    check_written,
)
from fssa_fast.backends import register_op
from fssa_fast.ops._common import autocast_dtype, cast, library, needs_grad

# ---------------------------------------------------------------- definition


def _encode_user(
    chosen: Tensor, rejected: Tensor, w: ContextWeights, pooling: str, heads: int, dropout: float
) -> Tensor:
    """One user's K choices, chosen [K, E] and rejected [K, E], to the outer encoder's output [Z]."""
    h = F.linear(torch.cat([chosen, rejected], -1), w.inner0, w.inner0_bias)
    if w.inner1 is not None:
        h = F.linear(h.relu(), w.inner1, w.inner1_bias)
    count, width = h.shape
    if count and w.qkv is not None and w.out is not None:
        q, k, v = F.linear(h, w.qkv, w.qkv_bias).view(count, 3, heads, width // heads).permute(1, 2, 0, 3)
        attention = torch.softmax(q @ k.mT * (width // heads) ** -0.5, -1)
        attended = (F.dropout(attention, dropout) @ v).transpose(0, 1).reshape(count, width)
        pooled = F.linear(attended, w.out, w.out_bias).sum(0)
    elif count and pooling == "mean":
        pooled = h.mean(0)
    else:  # the sum of no choices is zero, and so is their mean
        pooled = h.sum(0)
    return F.linear(F.linear(pooled, w.outer0, w.outer0_bias).relu(), w.outer1, w.outer1_bias)


def context_reference(
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
    dropout: float = 0.0,
) -> Tensor:
    """The definition: each user by itself, in plain PyTorch. `dropout` on the attention is for training only."""
    w = ContextWeights(*weights)  # type: ignore[arg-type]
    check_choices(choices)
    which = choices.long().view(-1, 1, 1).expand(-1, 1, pairs.shape[-1])
    chosen, rejected = pairs.gather(1, which).squeeze(1), pairs.gather(1, 1 - which).squeeze(1)
    spans = offsets.tolist()
    check_offsets(spans, pairs.shape[0])
    encoded = [
        _encode_user(chosen[begin:end], rejected[begin:end], w, pooling, heads, dropout)
        for begin, end in zip(spans[:-1], spans[1:], strict=True)
    ]
    return torch.stack(encoded) if encoded else pairs.new_zeros(0, w.outer1.shape[0])


def latent_of(encoded: Tensor, width: int, noise: Tensor | None = None) -> Tensor:
    """The latent [U, H] of an encoder's output [U, Z]: itself, or with Z = 2H mean + softplus(s) * noise."""
    if encoded.shape[-1] == width:
        return encoded
    mean, s = encoded.split(width, -1)
    return mean if noise is None else mean + F.softplus(s) * noise


def context_rows_reference_(
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
    """The definition of `context_rows_`."""
    check_slot_range(slots, bank.shape[0])
    encoded = context_reference(pairs, choices, offsets, weights, inner, pooling, heads)
    latents = latent_of(encoded, modulation.shape[1], noise)
    bank[slots.long()] = F.linear(latents, modulation, modulation_bias).to(bank.dtype)
    return latents


def context_backward_reference(
    grad: Tensor,
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `context` by pairs and by the weights that are not None, in order, by autograd."""
    leaves = [w if w is None else w.detach().requires_grad_() for w in weights]
    points = pairs.detach().requires_grad_()
    with torch.enable_grad():
        encoded = context_reference(points, choices, offsets, leaves, inner, pooling, heads)
    inputs = [points, *(w for w in leaves if w is not None)]
    found = torch.autograd.grad(encoded, inputs, grad, allow_unused=True)
    grads = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]
    return grads[0], grads[1:]


# ---------------------------------------------------------------- registration

_CONTEXT = "Tensor pairs, Tensor choices, Tensor offsets, Tensor?[] weights"
_KIND = "str inner, str pooling, int heads"
library.define(f"context({_CONTEXT}, {_KIND}) -> Tensor")
library.define(
    f"context_rows_(Tensor(a!) bank, Tensor slots, {_CONTEXT}, Tensor modulation, Tensor modulation_bias,"
    f" Tensor? noise, {_KIND}) -> Tensor"
)
library.define(f"context_backward(Tensor grad, {_CONTEXT}, {_KIND}) -> (Tensor, Tensor[])")


def check_context(
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
) -> None:
    """Raises ValueError or TypeError, naming the argument, for what `context` does not take. Reads no values."""
    if inner not in INNER:
        raise ValueError(f"inner: expected one of {INNER}, got {inner!r}")
    if pooling not in POOLING:
        raise ValueError(f"pooling: expected one of {POOLING}, got {pooling!r}")
    check_tensor("pairs", pairs, (None, 2, None))
    integers = not choices.is_floating_point() and not choices.is_complex()
    if choices.shape != pairs.shape[:1] or choices.device != pairs.device or not integers:
        raise ValueError(
            f"choices: expected integers of shape {list(pairs.shape[:1])} on {pairs.device}, got "
            f"{choices.dtype} {list(choices.shape)} on {choices.device}"
        )
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets: expected int32 or int64 [U + 1], got {offsets.dtype} {list(offsets.shape)}")
    if offsets.device != pairs.device and offsets.device.type != "cpu":
        raise ValueError(f"offsets: expected device {pairs.device} or cpu, got {offsets.device}")
    if len(weights) != len(ContextWeights._fields):
        raise ValueError(f"weights: expected {len(ContextWeights._fields)} of ContextWeights, got {len(weights)}")
    has = {"inner1": inner == "mlp", "qkv": pooling == "self-attention", "out": pooling == "self-attention"}
    for name, weight in zip(ContextWeights._fields, weights, strict=True):
        wanted = has.get(name.removesuffix("_bias"), True)
        if (weight is not None) != wanted:
            raise ValueError(f"weights.{name}: expected {'a tensor' if wanted else 'None'} for {inner}, {pooling}")
    w = ContextWeights(*weights)  # type: ignore[arg-type]
    check_tensor("weights.inner0", w.inner0, (None, 2 * pairs.shape[2]), pairs)
    check_tensor("weights.outer1", w.outer1, (None, None), pairs)
    width = w.inner0.shape[0]
    if pooling == "self-attention" and (heads < 1 or width % heads):
        raise ValueError(f"heads: expected a divisor of H = {width}, got {heads}")
    square, vector = (width, width), (width,)
    shapes = (w.inner0.shape, vector, square, vector, (3 * width, width), (3 * width,), square, vector, square, vector,
              (w.outer1.shape[0], width), w.outer1.shape[:1])  # fmt: skip
    for name, weight, shape in zip(ContextWeights._fields, weights, shapes, strict=True):
        if weight is not None:
            check_tensor(f"weights.{name}", weight, shape, pairs)


def _check_context_rows_(
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
) -> None:
    check_context(pairs, choices, offsets, weights, inner, pooling, heads)
    w, users = ContextWeights(*weights), offsets.shape[0] - 1  # type: ignore[arg-type]
    width = w.inner0.shape[0]
    if w.outer1.shape[0] not in (width, 2 * width):
        raise ValueError(f"weights.outer1: expected H = {width} rows or 2H, got {w.outer1.shape[0]}")
    check_tensor("bank", bank, (None, None))
    if bank.device != pairs.device:
        raise ValueError(f"bank: expected device {pairs.device}, got {bank.device}")
    check_written("bank", bank)
    check_tensor("modulation", modulation, (bank.shape[1], width), pairs)
    check_tensor("modulation_bias", modulation_bias, bank.shape[1:], pairs)
    check_integers("slots", slots, ((users,),), pairs.device)
    if noise is not None:
        check_tensor("noise", noise, (users, width), pairs)
        if w.outer1.shape[0] != 2 * width:
            raise ValueError(f"noise: expected None where latents are not sampled (Z = H = {width}), got a tensor")


def _check_context_backward(
    grad: Tensor, pairs: Tensor, choices: Tensor, offsets: Tensor, weights: Sequence[Tensor | None], *kind: Any
) -> None:
    check_context(pairs, choices, offsets, weights, *kind)
    outer1 = weights[-2]
    assert outer1 is not None  # was checked
    check_tensor("grad", grad, (offsets.shape[0] - 1, outer1.shape[0]), pairs)


def _context_fake(pairs, choices, offsets, weights, inner, pooling, heads):
    return pairs.new_empty(offsets.shape[0] - 1, weights[-2].shape[0])


def _context_rows_fake_(bank, slots, pairs, choices, offsets, weights, modulation, *_):
    return pairs.new_empty(offsets.shape[0] - 1, modulation.shape[1])


def _context_backward_fake(grad, pairs, choices, offsets, weights, inner, pooling, heads):
    return pairs.new_empty(pairs.shape), [w.new_empty(w.shape) for w in weights if w is not None]


register_op(library, "context", context_reference, check_context, _context_fake)
register_op(library, "context_rows_", context_rows_reference_, _check_context_rows_, _context_rows_fake_)
register_op(library, "context_backward", context_backward_reference, _check_context_backward, _context_backward_fake)

# ---------------------------------------------------------------- autograd


class _Context(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pairs, choices, offsets, inner, pooling, heads, *weights):
        return torch.ops.fssa.context(pairs, choices, offsets, list(weights), inner, pooling, heads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pairs, choices, offsets, *kind = inputs[:6]
        ctx.save_for_backward(pairs, choices, offsets, *inputs[6:])
        ctx.kind = tuple(kind)

    @staticmethod
    def backward(ctx, grad):
        pairs, choices, offsets, *weights = ctx.saved_tensors
        dpairs, found = torch.ops.fssa.context_backward(grad, pairs, choices, offsets, weights, *ctx.kind)
        remaining = iter(found)
        return dpairs, None, None, None, None, None, *(None if w is None else next(remaining) for w in weights)


# ---------------------------------------------------------------- public


def context(
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: ContextWeights,
    *,
    inner: str = "linear",
    pooling: str = "self-attention",
    heads: int = 8,
) -> Tensor:
    """Encodes the choices of U users, each by itself, whatever their number.

    Semantics, for user u with pairs k in offsets[u] .. offsets[u + 1]:
        x_k = [pairs[k, choices[k]] ; pairs[k, 1 - choices[k]]]       # chosen, rejected
        h_k = inner(x_k)                                              # Linear, or Linear ReLU Linear
        pooled = pool(h)                                              # zero where the user has no pair
        encoded[u] = outer(pooled)                                    # Linear ReLU Linear

    Args:
        pairs: embeddings of the two options of each choice, [N, 2, E], users one after the other.
        choices: integers [N], 0 where the first option was chosen, 1 where the second.
        offsets: int32 or int64 [U + 1], from 0 to N; on the pairs' device, or on the CPU, so that kernels can be
            fitted to them without waiting for a GPU.
        weights: of pairs' dtype and device.
        inner: "linear" or "mlp". pooling: "self-attention" (summed over the pairs), "mean" or "sum".
        heads: of the attention; divides H.

    Under autocast it runs in float32, as torch's softmax and sums do.

    Returns: [U, Z]; Z = H, or 2H (mean and s of the latent, deviation softplus(s)).
    Raises: ValueError, TypeError naming the argument.
    """
    if autocast_dtype(pairs) is not None:
        pairs, *cast_weights = cast(torch.float32, pairs, *weights)
        weights = ContextWeights(*cast_weights)
    if needs_grad(pairs, *weights):
        return _Context.apply(pairs, choices, offsets, inner, pooling, heads, *weights)
    return torch.ops.fssa.context(pairs, choices, offsets, list(weights), inner, pooling, heads)


def context_rows_(
    bank: Tensor,
    slots: Tensor,
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: ContextWeights,
    *,
    modulation: Tensor,
    modulation_bias: Tensor,
    noise: Tensor | None = None,
    inner: str = "linear",
    pooling: str = "self-attention",
    heads: int = 8,
) -> Tensor:
    """`context` and the modulator in one call: writes the users' rows of the bank, in place.

    Semantics: `bank[slots[u]] = modulation @ latent[u] + modulation_bias`, where latent is `context`'s result or, with
    Z = 2H, `mean + softplus(s) * noise` (the mean where noise is None).

    Args:
        bank: [S, M], float32, bfloat16 or float16; rows may be strided.
        slots: int32 or int64 [U], values in [0, S), all different.
        modulation, modulation_bias: [M, H] and [M], of pairs' dtype.
        noise: [U, H] or None.
        the others: as for `context`.

    Returns: the latents [U, H]. For inference: raises RuntimeError where autograd would have to record it.
    Raises: as `context`, before anything is written; IndexError for a slot outside [0, S).
    """
    if needs_grad(bank, pairs, modulation, modulation_bias, *weights):
        raise RuntimeError("context_rows_: writes in place and is not differentiable; use context, or torch.no_grad()")
    if autocast_dtype(pairs) is not None:
        pairs, modulation, modulation_bias, noise, *cast_weights = cast(
            torch.float32, pairs, modulation, modulation_bias, noise, *weights
        )
        weights = ContextWeights(*cast_weights)
    return torch.ops.fssa.context_rows_(
        bank, slots, pairs, choices, offsets, list(weights), modulation, modulation_bias, noise, inner, pooling, heads
    )
