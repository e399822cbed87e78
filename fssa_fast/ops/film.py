"""film: scale and shift of hidden states by the row of the user they belong to.

`film` is feature-wise linear modulation (arXiv 2412.13998, section 3.2; arXiv 1709.07871), gamma = 1 + scale and
beta = shift, so that a row of zeros is the identity, exactly. `film_norm` joins it with the residual add before it and
the RMSNorm after it, which is how a decoder block meets it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fssa_fast.arguments import check_slot_range, check_slots, check_tensor
from fssa_fast.backends import register_op
from fssa_fast.ops._common import autocast_dtype, cast_to_widest, gather_rows, library, needs_grad

# ---------------------------------------------------------------- definition


def film_reference(x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
    """The definition: `x * (1 + scale[slot]) + shift[slot]`."""
    check_slot_range(slots, scale.shape[0])
    return x * (1 + gather_rows(scale, slots, x)) + gather_rows(shift, slots, x)


def film_norm_reference(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition: hidden = film(residual + x), normed = weight * hidden / sqrt(mean(hidden^2) + eps)."""
    hidden = film_reference(residual + x, scale, shift, slots)
    return hidden, hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight


def film_backward_reference(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `film` by x, scale and shift, by autograd over the definition."""
    x, scale, shift = (t.detach().requires_grad_() for t in (x, scale, shift))
    with torch.enable_grad():
        y = film_reference(x, scale, shift, slots)
    grads = torch.autograd.grad(y, (x, scale, shift), grad)
    return grads[0], grads[1], grads[2]


def film_norm_backward_reference(
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
    """Gradients of `film_norm` by x (residual's is the same), scale, shift and weight, by autograd."""
    inputs = [t.detach().requires_grad_() for t in (x, scale, shift, weight)]
    with torch.enable_grad():
        outputs = film_norm_reference(inputs[0], residual, inputs[1], inputs[2], slots, inputs[3], eps)
    grads = torch.autograd.grad(outputs, inputs, (grad_hidden, grad_normed))
    return grads[0], grads[1], grads[2], grads[3]


# ---------------------------------------------------------------- registration

library.define("film(Tensor x, Tensor scale, Tensor shift, Tensor slots) -> Tensor")
library.define(
    "film_norm(Tensor x, Tensor residual, Tensor scale, Tensor shift, Tensor slots, Tensor weight, float eps)"
    " -> (Tensor, Tensor)"
)
library.define(
    "film_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor slots) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "film_norm_backward(Tensor grad_hidden, Tensor grad_normed, Tensor x, Tensor residual, Tensor scale,"
    " Tensor shift, Tensor slots, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _check_film(x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [rows, ..., D], got {list(x.shape)}")
    check_tensor("x", x, x.shape)
    check_tensor("scale", scale, (None, x.shape[-1]), x)
    check_tensor("shift", shift, scale.shape, x)
    check_slots(slots, x)


def _check_film_norm(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> None:
    _check_film(x, scale, shift, slots)
    check_tensor("residual", residual, x.shape, x)
    check_tensor("weight", weight, x.shape[-1:], x)
    if not eps > 0:
        raise ValueError(f"eps: expected a number > 0, got {eps}")


def _check_film_backward(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> None:
    _check_film(x, scale, shift, slots)
    check_tensor("grad", grad, x.shape, x)


def _check_film_norm_backward(grad_hidden: Tensor, grad_normed: Tensor, x: Tensor, *rest: Any) -> None:
    _check_film_norm(x, *rest)
    check_tensor("grad_hidden", grad_hidden, x.shape, x)
    check_tensor("grad_normed", grad_normed, x.shape, x)


def _new(*likes: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape) for like in likes)


register_op(library, "film", film_reference, _check_film, lambda x, *_: x.new_empty(x.shape))
register_op(library, "film_norm", film_norm_reference, _check_film_norm, lambda x, *_: _new(x, x))
register_op(
    library,
    "film_backward",
    film_backward_reference,
    _check_film_backward,
    lambda grad, x, scale, shift, slots: _new(x, scale, shift),
)
register_op(
    library,
    "film_norm_backward",
    film_norm_backward_reference,
    _check_film_norm_backward,
    lambda grad_hidden, grad_normed, x, residual, scale, shift, slots, weight, eps: _new(x, scale, shift, weight),
)

# ---------------------------------------------------------------- autograd


class _Film(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, shift, slots):
        return torch.ops.fssa.film(x, scale, shift, slots)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return (*torch.ops.fssa.film_backward(grad, *ctx.saved_tensors), None)


class _FilmNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, scale, shift, slots, weight, eps):
        return torch.ops.fssa.film_norm(x, residual, scale, shift, slots, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_hidden, grad_normed):
        dx, dscale, dshift, dweight = torch.ops.fssa.film_norm_backward(
            grad_hidden, grad_normed, *ctx.saved_tensors, ctx.eps
        )
        return dx, dx, dscale, dshift, None, dweight, None


# ---------------------------------------------------------------- public


def film(x: Tensor, *, scale: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
    """Scales and shifts every row by its user's modulation.

    Semantics: `y[b, ..., d] = x[b, ..., d] * (1 + scale[slots[b], d]) + shift[slots[b], d]`

    Args:
        x: hidden states [B, ..., D]; float32, bfloat16, float16 (float64: by the definition).
        scale, shift: modulations [S, D] of x's dtype; columns of a bank of users, so rows may be strided.
        slots: int32 or int64, [B] (one a row) or x.shape[:-1] (one a token), values in [0, S).

    Under autocast the arguments promote to one dtype, as torch's elementwise ops do.

    Returns: a new tensor like x. A row whose scale and shift are zero equals x bit for bit.
    Raises: ValueError, TypeError naming the argument; IndexError for a slot outside [0, S).
    """
    if autocast_dtype(x) is not None:
        x, scale, shift = cast_to_widest(x, scale, shift)
    if needs_grad(x, scale, shift):
        return _Film.apply(x, scale, shift, slots)
    return torch.ops.fssa.film(x, scale, shift, slots)


def film_norm(
    x: Tensor, residual: Tensor, *, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual add, `film`, and the RMSNorm that follows, in one pass over the hidden states.

    Semantics: `hidden = film(residual + x)`,
    `normed = weight * hidden / sqrt(mean(hidden^2, over D) + eps)`

    Args:
        x, residual: [B, ..., D]; the output of a block's last projection, and the stream it is added to.
        scale, shift, slots: as for `film`.
        weight: [D], of x's dtype (for norms that multiply by 1 + w, pass 1 + w).
        eps: added to the mean square, > 0.

    Under autocast as `film`.

    Returns: (hidden, normed), both like x.
    Raises: as `film`.
    """
    if autocast_dtype(x) is not None:
        x, residual, scale, shift, weight = cast_to_widest(x, residual, scale, shift, weight)
    if needs_grad(x, residual, scale, shift, weight):
        return _FilmNorm.apply(x, residual, scale, shift, slots, weight, eps)
    return torch.ops.fssa.film_norm(x, residual, scale, shift, slots, weight, eps)
