"""lora: a low-rank adapter shared by all users, modulated in its rank space by the row of each user.

    y = y + scaling * B (gamma * (A x) + beta)

A and B are shared, gamma and beta are a user's R (or 2R) numbers: rows of different users share two plain matrix
products, and nothing is sorted or gathered but those numbers. B is held as [R, O], so that both products read memory in
order. A gamma of ones is plain LoRA (arXiv 2106.09685); a row of zeros in gamma and beta switches the adapter off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_fast.arguments import check_slot_range, check_slots, check_tensor, check_written
from fssa_fast.backends import register_op
from fssa_fast.ops._common import autocast_dtype, cast, gather_rows, library, needs_grad

# ---------------------------------------------------------------- definition


def lora_reference(
    x: Tensor,
    ys: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> list[Tensor]:
    """The definition: `y_i + scaling * (gamma[slot] * (x A^T) + beta[slot])_i B_i`."""
    check_slot_range(slots, gamma.shape[0])
    hidden = gather_rows(gamma, slots, x) * (x @ a.T)
    if beta is not None:
        hidden = hidden + gather_rows(beta, slots, x)
    parts = hidden.split([b.shape[0] for b in bs], dim=-1)
    return [y + scaling * (part @ b) for y, part, b in zip(ys, parts, bs, strict=True)]


def lora_reference_(
    x: Tensor,
    ys: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> None:
    """The definition, in place into ys."""
    for y, new in zip(ys, lora_reference(x, ys, a, bs, gamma, beta, slots, scaling), strict=True):
        y.copy_(new)


def lora_backward_reference(
    grads: Sequence[Tensor],
    x: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients by x, a, bs, gamma and beta (zeros like gamma where beta is None), by autograd over the definition."""
    inputs = [t.detach().requires_grad_() for t in (x, a, *bs, gamma)]
    shift = (torch.zeros_like(gamma) if beta is None else beta).detach().requires_grad_()
    with torch.enable_grad():
        outputs = lora_reference(
            inputs[0], [torch.zeros_like(g) for g in grads], inputs[1], inputs[2:-1], inputs[-1], shift, slots, scaling
        )
    found = torch.autograd.grad(outputs, [*inputs, shift], list(grads))
    return found[0], found[1], list(found[2:-2]), found[-2], found[-1]


# ---------------------------------------------------------------- registration

_ARGUMENTS = "Tensor a, Tensor[] bs, Tensor gamma, Tensor? beta, Tensor slots, float scaling"
library.define(f"lora(Tensor x, Tensor[] ys, {_ARGUMENTS}) -> Tensor[]")
library.define(f"lora_(Tensor x, Tensor(a!)[] ys, {_ARGUMENTS}) -> ()")
library.define(f"lora_backward(Tensor[] grads, Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor[], Tensor, Tensor)")


def _check(
    name: str,
    ys: Sequence[Tensor],
    x: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
) -> None:
    """Of the op and its gradient: ys, by this name, is of every projection what is added to, or its gradient."""
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [rows, ..., D], got {list(x.shape)}")
    check_tensor("x", x, x.shape)
    check_tensor("a", a, (None, x.shape[-1]), x)
    if len(ys) != len(bs) or not bs:
        raise ValueError(
            f"{name}, bs: expected as many of one as of the other and at least one, got {len(ys)}, {len(bs)}"
        )
    for i, (y, b) in enumerate(zip(ys, bs, strict=True)):
        check_tensor(f"bs[{i}]", b, (None, None), x)
        check_tensor(f"{name}[{i}]", y, (*x.shape[:-1], b.shape[1]), x)
    rank = sum(b.shape[0] for b in bs)
    if rank != a.shape[0]:
        raise ValueError(f"bs: expected ranks that add up to a's {a.shape[0]} rows, got {[b.shape[0] for b in bs]}")
    check_tensor("gamma", gamma, (None, rank), x)
    if beta is not None:
        check_tensor("beta", beta, gamma.shape, x)
    check_slots(slots, x)


def _check_lora(x: Tensor, ys: Sequence[Tensor], *rest: Any) -> None:
    _check("ys", ys, x, *rest[:-1])


def _check_lora_(x: Tensor, ys: Sequence[Tensor], *rest: Any) -> None:
    _check_lora(x, ys, *rest)
    for i, y in enumerate(ys):
        check_written(f"ys[{i}]", y)


def _check_lora_backward(grads: Sequence[Tensor], x: Tensor, *rest: Any) -> None:
    _check("grads", grads, x, *rest[:-1])


def _lora_backward_fake(grads, x, a, bs, gamma, beta, slots, scaling):
    def new(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    return new(x), new(a), [new(b) for b in bs], new(gamma), new(gamma)


register_op(library, "lora", lora_reference, _check_lora, lambda x, ys, *_: [y.new_empty(y.shape) for y in ys])
register_op(library, "lora_", lora_reference_, _check_lora_, lambda *_: None)
register_op(library, "lora_backward", lora_backward_reference, _check_lora_backward, _lora_backward_fake)

# ---------------------------------------------------------------- autograd


class _Lora(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, a, gamma, beta, slots, scaling, count, *tensors):
        ys, bs = tensors[:count], tensors[count:]
        return tuple(torch.ops.fssa.lora(x, list(ys), a, list(bs), gamma, beta, slots, scaling))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, gamma, beta, slots, ctx.scaling, count, *tensors = inputs
        ctx.save_for_backward(x, a, gamma, beta, slots, *tensors[count:])

    @staticmethod
    def backward(ctx, *grads):
        x, a, gamma, beta, slots, *bs = ctx.saved_tensors
        dx, da, dbs, dgamma, dbeta = torch.ops.fssa.lora_backward(
            list(grads), x, a, bs, gamma, beta, slots, ctx.scaling
        )
        return dx, da, dgamma, None if beta is None else dbeta, None, None, None, *grads, *dbs


# ---------------------------------------------------------------- public


def lora(
    x: Tensor,
    ys: Sequence[Tensor],
    *,
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> list[Tensor]:
    """Adds the adapter of several projections of one input, modulated per row, to the projections' outputs.

    Semantics, for every row (or token) n with slot s = slots[n]:
        hidden = gamma[s] * (a @ x[n]) + beta[s]                      # the ranks of all projections, joined
        out_i[n] = ys_i[n] + scaling * hidden[ranks of i] @ bs_i

    Args:
        x: the projections' input [B, ..., D]; float32, bfloat16, float16 (float64: by the definition).
        ys: each projection's output [B, ..., O_i].
        a: the A matrices, joined by rows: [sum R_i, D].
        bs: each projection's B matrix, transposed: [R_i, O_i].
        gamma, beta: modulations [S, sum R_i], columns of a bank of users (rows may be strided, and gamma may be one
            column expanded: plain LoRA with a strength a user); beta None means zeros.
        slots: int32 or int64, [B] (one a row) or x.shape[:-1] (one a token), values in [0, S).
        scaling: alpha / R.

    Under autocast all of them are cast to its dtype, as for torch's Linear.

    Returns: new tensors like ys. Products accumulate in float32. A row whose gamma and beta are zero equals ys.
    Raises: ValueError, TypeError naming the argument; IndexError for a slot outside [0, S).
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, a, gamma, beta = cast(dtype, x, a, gamma, beta)
        ys, bs = cast(dtype, *ys), cast(dtype, *bs)
    if needs_grad(x, a, gamma, beta, *ys, *bs):
        return list(_Lora.apply(x, a, gamma, beta, slots, scaling, len(ys), *ys, *bs))
    return torch.ops.fssa.lora(x, list(ys), a, list(bs), gamma, beta, slots, scaling)


def lora_(
    x: Tensor,
    ys: Sequence[Tensor],
    *,
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> None:
    """`lora`, in place into ys; for inference: raises RuntimeError where autograd would have to record it."""
    if needs_grad(x, a, gamma, beta, *ys, *bs):
        raise RuntimeError("lora_: works in place and is not differentiable; use lora, or torch.no_grad()")
    if autocast_dtype(x) is not None and ys:  # what is written keeps its dtype
        x, a, gamma, beta, *bs = cast(ys[0].dtype, x, a, gamma, beta, *bs)
    torch.ops.fssa.lora_(x, list(ys), a, list(bs), gamma, beta, slots, scaling)
