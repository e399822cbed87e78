"""The native CPU backend: the ops of csrc/cpu, called by address.

Views are taken as they are where the elements of a row are neighbours, and copied where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fssa_fast._native import load_native
from fssa_fast.backends import BackendError
from fssa_fast.ops.context import INNER, POOLING

NAME = "cpu"
DEVICES = {"cpu"}

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = ("scalar", "avx2", "avx512")

_core, _reason = load_native()


def unavailable() -> str | None:
    """Why the native module is not there, or None."""
    return _reason


def refuses(op: str, tensor: Tensor) -> str | None:
    """Why the op cannot take a call with this first tensor, or None."""
    if tensor.dtype not in CODES:
        return f"dtype {tensor.dtype} is not one of {', '.join(str(dtype) for dtype in CODES)}"
    if tensor.device.type != "cpu":
        return f"tensors on {tensor.device} are not taken"
    return None


_WIDE_RANK, _DECODE_ROWS = 64, 64


def prefers(op: str, args: Sequence[Any]) -> bool:
    """False where the definition has to run (pairs of a dtype that is not taken), or was measured to be faster.

    That is lora in bfloat16 at high ranks on processors that multiply bfloat16, which PyTorch's products use and ours
    do not (bench/results/ops.json). At the row counts of decoding ours runs all the same: its rows do not depend on
    their batch.
    """
    if op in ("lora", "lora_"):
        x, _, a = args[:3]
        wide = a.shape[0] >= _WIDE_RANK and x.numel() > _DECODE_ROWS * x.shape[-1]
        return not (wide and x.dtype == torch.bfloat16 and _multiplies_bfloat16())
    return op != "context_rows_" or args[2].dtype in CODES


@cache
def _multiplies_bfloat16() -> bool:
    found = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported() for supported in found if supported is not None)


def isa() -> str:
    """The instruction set in use: one of ISAS. The best of the machine, or the one that FSSA_CPU_ISA names."""
    return core().cpu_isa()


def set_isa(name: str) -> None:
    """Uses this instruction set from now on, in all threads; ValueError or RuntimeError where the machine cannot."""
    core().set_cpu_isa(name)


def supported_isas() -> list[str]:
    """The instruction sets that this machine has."""
    return [name for name in ISAS if _has(name)]


def core() -> Any:
    """The native module; raises BackendError where there is none."""
    if _core is None:
        raise BackendError(f"backend 'cpu': {_reason}")
    return _core


def _has(name: str) -> bool:
    try:
        return core().cpu_isa_supported(name)
    except ValueError:  # not an instruction set of this architecture
        return False


# ---------------------------------------------------------------- tensors to addresses


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as [rows, width], the elements of a row adjacent: a view where its strides allow."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _at(rows: Tensor) -> tuple[int, int]:
    """Where a matrix begins and how far apart its rows are, in elements."""
    return rows.data_ptr(), rows.stride(0)


def _slots(slots: Tensor, rows: int, limit: int) -> tuple[int, bool, int, int, int]:
    """The slots, contiguous, as the core takes them."""
    count = slots.numel()
    return slots.data_ptr(), slots.dtype == torch.int64, count, rows // count if count else 1, limit


def _new(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- film


def film(x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
    y, points, scale, shift, slots = _new(x), _rows(x), _rows(scale), _rows(shift), slots.contiguous()
    rows, width = points.shape
    core().cpu_film(
        CODES[x.dtype], rows, width, _at(points), _at(scale), _at(shift),
        _slots(slots, rows, scale.shape[0]), (y.data_ptr(), width), torch.get_num_threads(),
    )  # fmt: skip
    return y


def film_norm(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, normed, points, residual = _new(x), _new(x), _rows(x), _rows(residual)
    scale, shift, slots, weight = _rows(scale), _rows(shift), slots.contiguous(), weight.contiguous()
    rows, width = points.shape
    core().cpu_film_norm(
        CODES[x.dtype], rows, width, _at(points), _at(residual), _at(scale), _at(shift),
        _slots(slots, rows, scale.shape[0]), weight.data_ptr(), eps,
        (hidden.data_ptr(), width), (normed.data_ptr(), width), torch.get_num_threads(),
    )  # fmt: skip
    return hidden, normed


def film_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dshift = _new(x), _new(scale), _new(shift)
    grad, points, scale, slots = _rows(grad), _rows(x), _rows(scale), slots.contiguous()
    rows, width = points.shape
    core().cpu_film_backward(
        CODES[x.dtype], rows, width, _at(grad), _at(points), _at(scale), _slots(slots, rows, scale.shape[0]),
        (dx.data_ptr(), width), (dscale.data_ptr(), width), (dshift.data_ptr(), width), torch.get_num_threads(),
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
    dx, dscale, dshift, dweight = _new(x), _new(scale), _new(shift), _new(weight)
    grad_hidden, grad_normed, points, residual = _rows(grad_hidden), _rows(grad_normed), _rows(x), _rows(residual)
    scale, shift, slots, weight = _rows(scale), _rows(shift), slots.contiguous(), weight.contiguous()
    rows, width = points.shape
    core().cpu_film_norm_backward(
        CODES[x.dtype], rows, width, _at(grad_hidden), _at(grad_normed), _at(points), _at(residual), _at(scale),
        _at(shift), _slots(slots, rows, scale.shape[0]), weight.data_ptr(), eps, (dx.data_ptr(), width),
        (dscale.data_ptr(), width), (dshift.data_ptr(), width), dweight.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dscale, dshift, dweight


# ---------------------------------------------------------------- lora


def _gamma(gamma: Tensor) -> tuple[Tensor, int]:
    """gamma, and the distance of its columns: 0 where a row is one number, expanded."""
    if gamma.stride(1) == 0:
        return gamma, 0
    return _rows(gamma), 1


def _run_lora(
    x: Tensor,
    ys: Sequence[Tensor],
    outs: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    scaling: float,
) -> None:
    """lora from ys into outs, matrices with adjacent columns."""
    points, a, slots = _rows(x), _rows(a), slots.contiguous()
    gamma, column_stride = _gamma(gamma)
    beta = None if beta is None else _rows(beta)
    bs = [_rows(b) for b in bs]
    parts = [(*b.shape, _at(y), _at(b), _at(out)) for y, b, out in zip(ys, bs, outs, strict=True)]
    rows, width = points.shape
    core().cpu_lora(
        CODES[x.dtype], rows, width, _at(points), _at(a), _at(gamma), (0, 0) if beta is None else _at(beta),
        column_stride, _slots(slots, rows, gamma.shape[0]), scaling, parts, torch.get_num_threads(),
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
    outs = [_new(y) for y in ys]
    _run_lora(x, [_rows(y) for y in ys], [_rows(out) for out in outs], a, bs, gamma, beta, slots, scaling)
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
    outs = [_rows(y) for y in ys]
    _run_lora(x, outs, outs, a, bs, gamma, beta, slots, scaling)
    for y, out in zip(ys, outs, strict=True):
        if y.data_ptr() != out.data_ptr():  # a copy, since y's strides are no matrix's
            y.copy_(out.view(y.shape))


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
    dx, da, dbs, dgamma, dbeta = _new(x), _new(a), [_new(b) for b in bs], _new(gamma), _new(gamma)
    points, a, slots = _rows(x), _rows(a), slots.contiguous()
    gamma, column_stride = _gamma(gamma)
    beta = None if beta is None else _rows(beta)
    grads, bs = [_rows(grad) for grad in grads], [_rows(b) for b in bs]
    parts = [(*b.shape, _at(grad), _at(b), _at(db)) for grad, b, db in zip(grads, bs, dbs, strict=True)]
    rows, width = points.shape
    core().cpu_lora_backward(
        CODES[x.dtype], rows, width, _at(points), _at(a), _at(gamma), (0, 0) if beta is None else _at(beta),
        column_stride, _slots(slots, rows, gamma.shape[0]), scaling, parts, (dx.data_ptr(), width), _at(da),
        _at(dgamma), _at(dbeta), torch.get_num_threads(),
    )  # fmt: skip
    return dx, da, dbs, dgamma, dbeta


# ---------------------------------------------------------------- context


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _encoder(
    pairs: Tensor, offsets: Tensor, weights: Sequence[Tensor | None], inner: str, pooling: str, heads: int
) -> tuple[int, ...]:
    """Sizes and kind of an encoder: (N, U, E, H, Z, heads, inner, pooling)."""
    first, last = weights[0], weights[-2]
    assert first is not None and last is not None
    return (
        pairs.shape[0], offsets.shape[0] - 1, pairs.shape[2], first.shape[0], last.shape[0], heads,
        INNER.index(inner), POOLING.index(pooling),
    )  # fmt: skip


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def context(
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
) -> Tensor:
    pairs, choices, offsets, weights = pairs.contiguous(), choices.long(), offsets.long(), _contiguous(weights)
    choices, offsets = choices.contiguous(), offsets.contiguous()
    encoder = _encoder(pairs, offsets, weights, inner, pooling, heads)
    encoded = pairs.new_empty(encoder[1], encoder[4])
    core().cpu_context(
        CODES[pairs.dtype], encoder, pairs.data_ptr(), choices.data_ptr(), offsets.data_ptr(), _addresses(weights),
        encoded.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return encoded


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
    if pairs.dtype not in CODES:
        raise BackendError(f"backend 'cpu' cannot take pairs of dtype {pairs.dtype}")
    pairs, choices, offsets, weights = pairs.contiguous(), choices.long(), offsets.long(), _contiguous(weights)
    choices, offsets, slots = choices.contiguous(), offsets.contiguous(), slots.contiguous()
    modulation, modulation_bias = modulation.contiguous(), modulation_bias.contiguous()
    noise = None if noise is None else noise.contiguous()
    encoder = _encoder(pairs, offsets, weights, inner, pooling, heads)
    latents = pairs.new_empty(encoder[1], encoder[3])
    table = _rows(bank)
    core().cpu_context_rows(
        CODES[pairs.dtype], encoder, pairs.data_ptr(), choices.data_ptr(), offsets.data_ptr(), _addresses(weights),
        CODES[bank.dtype], _at(table), table.shape[1], _slots(slots, slots.numel(), table.shape[0]),
        modulation.data_ptr(), modulation_bias.data_ptr(), 0 if noise is None else noise.data_ptr(),
        latents.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if table.data_ptr() != bank.data_ptr():
        bank.copy_(table)
    return latents


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
    grad, pairs, choices, offsets = grad.contiguous(), pairs.contiguous(), choices.long(), offsets.long()
    choices, offsets, weights = choices.contiguous(), offsets.contiguous(), _contiguous(weights)
    encoder = _encoder(pairs, offsets, weights, inner, pooling, heads)
    dpairs, gradients = _new(pairs), [None if w is None else _new(w) for w in weights]
    core().cpu_context_backward(
        CODES[pairs.dtype], encoder, pairs.data_ptr(), choices.data_ptr(), offsets.data_ptr(), _addresses(weights),
        grad.data_ptr(), dpairs.data_ptr(), _addresses(gradients), torch.get_num_threads(),
    )  # fmt: skip
    return dpairs, [gradient for gradient in gradients if gradient is not None]


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "film": film,
    "film_norm": film_norm,
    "film_backward": film_backward,
    "film_norm_backward": film_norm_backward,
    "lora": lora,
    "lora_": lora_,
    "lora_backward": lora_backward,
    "context": context,
    "context_rows_": context_rows_,
    "context_backward": context_backward,
}
