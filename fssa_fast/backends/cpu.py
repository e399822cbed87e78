"""The native CPU backend: the ops of csrc/cpu, called by address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_fast._native import Core, LoraBackwardPart, array, load_native
from fssa_fast.backends import BackendError
from fssa_fast.backends.addresses import (
    CODES,
    ContextInput,
    addresses,
    at,
    gamma_rows,
    modulation_of,
    new_like,
    rows_of,
    slots_of,
)
from fssa_fast.backends.native_ops import ForwardOps

NAME = "cpu"
DEVICES = {"cpu"}

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")

_core, _reason = load_native()


def unavailable() -> str | None:
    """Why the native core is not there, or None."""
    return _reason


def refuses(op: str, tensor: Tensor) -> str | None:
    """Why the op cannot take a call with this first tensor, or None."""
    if tensor.dtype not in CODES:
        return f"dtype {tensor.dtype} is not one of {', '.join(str(dtype) for dtype in CODES)}"
    if tensor.device.type != "cpu":
        return f"tensors on {tensor.device} are not taken"
    return None


def prefers(op: str, args: Sequence[Any]) -> bool:
    """False where the definition has to run: for pairs of a dtype that is not taken, in a bank of one that is."""
    return op != "context_rows_" or args[2].dtype in CODES


def isa() -> str:
    """The instruction set in use: one of ISAS. The best of the machine, or the one that FSSA_CPU_ISA names."""
    return core().isa()


def set_isa(name: str) -> None:
    """Uses this instruction set from now on, in all threads; ValueError or RuntimeError where the machine cannot."""
    core().set_isa(name)


def supported_isas() -> list[str]:
    """The instruction sets that this machine has."""
    return [name for name in ISAS if _has(name)]


def core() -> Core:
    """The native core; raises BackendError where there is none."""
    if _core is None:
        raise BackendError(f"backend 'cpu': {_reason}")
    return _core


def _has(name: str) -> bool:
    try:
        return core().has_isa(name)
    except ValueError:  # not an instruction set of this architecture
        return False


# ---------------------------------------------------------------- forward


def _launch(op: str, _: Tensor, *members: Any) -> None:
    core().run(op, *members)


_forward = ForwardOps(NAME, _launch, torch.get_num_threads)
film, lora = _forward.film, _forward.lora


# ---------------------------------------------------------------- backward


def film_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dshift = new_like(x), new_like(scale), new_like(shift)
    grad, points, scale, slots = rows_of(grad), rows_of(x), rows_of(scale), slots.contiguous()
    rows, width = points.shape
    core().run(
        "film_backward", CODES[x.dtype], rows, width, at(grad), at(points), at(scale),
        slots_of(slots, rows, scale.shape[0]), *((to.data_ptr(), width) for to in (dx, dscale, dshift)),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dscale, dshift


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
    dx, dscale, dshift, dweight = new_like(x), new_like(scale), new_like(shift), new_like(weight)
    grad_hidden, grad_normed = rows_of(grad_hidden), rows_of(grad_normed)
    points, residual = rows_of(x), rows_of(residual)
    scale, shift, slots, weight = rows_of(scale), rows_of(shift), slots.contiguous(), weight.contiguous()
    rows, width = points.shape
    core().run(
        "film_norm_backward", CODES[x.dtype], rows, width, at(grad_hidden), at(grad_normed), at(points), at(residual),
        (at(scale), at(shift)), slots_of(slots, rows, scale.shape[0]), (weight.data_ptr(), eps),
        (*((to.data_ptr(), width) for to in (dx, dscale, dshift)), dweight.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dscale, dshift, dweight


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
    dx, da, dbs, dgamma, dbeta = new_like(x), new_like(a), [new_like(b) for b in bs], new_like(gamma), new_like(gamma)
    points, a, slots = rows_of(x), rows_of(a), slots.contiguous()
    gamma = gamma_rows(gamma)
    beta = None if beta is None else rows_of(beta)
    grads, bs = [rows_of(grad) for grad in grads], [rows_of(b) for b in bs]
    parts = [(*b.shape, at(grad), at(b), at(db)) for grad, b, db in zip(grads, bs, dbs, strict=True)]
    rows, width = points.shape
    core().run(
        "lora_backward", CODES[x.dtype], rows, width, at(points), at(a), modulation_of(gamma, beta),
        slots_of(slots, rows, gamma.shape[0]), scaling, *array(LoraBackwardPart, parts),
        ((dx.data_ptr(), width), at(da), at(dgamma), at(dbeta)), torch.get_num_threads(),
    )  # fmt: skip
    return dx, da, dbs, dgamma, dbeta


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
    grad = grad.contiguous()
    given = ContextInput.of(pairs, choices, offsets, weights, inner, pooling, heads)
    dpairs, gradients = new_like(pairs), [None if w is None else new_like(w) for w in weights]
    core().run(
        "context_backward", given.group(torch.get_num_threads()), grad.data_ptr(), dpairs.data_ptr(),
        addresses(gradients),
    )  # fmt: skip
    return dpairs, [gradient for gradient in gradients if gradient is not None]


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = _forward.implementations() | {
    "film_backward": film_backward,
    "film_norm_backward": film_norm_backward,
    "lora_backward": lora_backward,
    "context_backward": context_backward,
}
