"""The native CUDA backend: the kernels of csrc/cuda, called by address; forward only, for the latency of decoding.

It is asked for by name (FSSA_BACKEND=cuda): it is chosen automatically only where a committed measurement shows that it
wins, and there is none yet. The values of slots, choices and offsets are not read, since that would wait for the GPU:
they are checked where they are made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fssa_fast.backends import BackendError, gpus
from fssa_fast.backends.addresses import (
    CODES,
    addresses,
    at,
    contiguous,
    encoder_of,
    gamma_of,
    new_like,
    rows_of,
    slots_of,
)

NAME = "cuda"
DEVICES: set[str] = set()  # of no device by itself, see above

_core: Any = None
_reason: str | None = None
try:
    _core = importlib.import_module("fssa_fast._cuda")
except ImportError as error:
    _reason = (
        f"the CUDA module could not be imported ({error}); `pip install --no-build-isolation .` in a checkout builds "
        "it where torch has CUDA and nvcc is on the PATH"
    )


def unavailable() -> str | None:
    """Why no kernel can run here, or None: torch without CUDA, no GPU, GPUs too old, no module, or one that fails."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "no GPU was found"
    return gpus.too_old(gpus.newest()) or _reason or gpus.tried(film)


def refuses(op: str, tensor: Tensor) -> str | None:
    """Why the op cannot take a call with this first tensor, or None."""
    if op not in IMPLEMENTATIONS:
        return "there is no CUDA kernel for it"
    if tensor.dtype not in CODES:
        return f"dtype {tensor.dtype} is not one of {', '.join(str(dtype) for dtype in CODES)}"
    if tensor.device.type != "cuda":
        return f"tensors on {tensor.device} are not taken"
    return gpus.too_old(tensor.device)


def prefers(op: str, args: Sequence[Any]) -> bool:
    """False: no measurement shows yet where these kernels win."""
    return False


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """Makes the tensor's device the current one; its current stream, as a number."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def _workspace(tensor: Tensor) -> Callable[[int], int]:
    """Gives memory on the tensor's device, which lives until the launches that use it are on the stream."""
    kept: list[Tensor] = []

    def take(size: int) -> int:
        kept.append(torch.empty(size, dtype=torch.uint8, device=tensor.device))
        return kept[-1].data_ptr()

    return take


# ---------------------------------------------------------------- film


def film(x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
    y, points, scale, shift, slots = new_like(x), rows_of(x), rows_of(scale), rows_of(shift), slots.contiguous()
    rows, width = points.shape
    with _stream_of(x) as stream:
        _core.film(
            CODES[x.dtype], rows, width, at(points), at(scale), at(shift), slots_of(slots, rows, scale.shape[0]),
            (y.data_ptr(), width), stream,
        )  # fmt: skip
    return y


def film_norm(
    x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, normed, points, residual = new_like(x), new_like(x), rows_of(x), rows_of(residual)
    scale, shift, slots, weight = rows_of(scale), rows_of(shift), slots.contiguous(), weight.contiguous()
    rows, width = points.shape
    with _stream_of(x) as stream:
        _core.film_norm(
            CODES[x.dtype], rows, width, at(points), at(residual), at(scale), at(shift),
            slots_of(slots, rows, scale.shape[0]), weight.data_ptr(), eps, (hidden.data_ptr(), width),
            (normed.data_ptr(), width), stream,
        )  # fmt: skip
    return hidden, normed


# ---------------------------------------------------------------- lora


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
    points, a, slots = rows_of(x), rows_of(a), slots.contiguous()
    gamma, column_stride = gamma_of(gamma)
    beta = None if beta is None else rows_of(beta)
    bs = [rows_of(b) for b in bs]
    parts = [(*b.shape, at(y), at(b), at(out)) for y, b, out in zip(ys, bs, outs, strict=True)]
    rows, width = points.shape
    with _stream_of(x) as stream:
        _core.lora(
            CODES[x.dtype], rows, width, at(points), at(a), at(gamma), (0, 0) if beta is None else at(beta),
            column_stride, slots_of(slots, rows, gamma.shape[0]), scaling, parts, _workspace(x), stream,
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
    outs = [new_like(y) for y in ys]
    _run_lora(x, [rows_of(y) for y in ys], [rows_of(out) for out in outs], a, bs, gamma, beta, slots, scaling)
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
    outs = [rows_of(y) for y in ys]
    _run_lora(x, outs, outs, a, bs, gamma, beta, slots, scaling)
    for y, out in zip(ys, outs, strict=True):
        if y.data_ptr() != out.data_ptr():  # a copy, since y's strides are no matrix's
            y.copy_(out.view(y.shape))


# ---------------------------------------------------------------- context


def context(
    pairs: Tensor,
    choices: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor | None],
    inner: str,
    pooling: str,
    heads: int,
) -> Tensor:
    pairs, choices, weights = pairs.contiguous(), choices.long().contiguous(), contiguous(weights)
    offsets = offsets.to(pairs.device).long().contiguous()
    encoder = encoder_of(pairs, offsets, weights, inner, pooling, heads)
    encoded = pairs.new_empty(encoder[1], encoder[4])
    with _stream_of(pairs) as stream:
        _core.context(
            CODES[pairs.dtype], encoder, pairs.data_ptr(), choices.data_ptr(), offsets.data_ptr(),
            addresses(weights), encoded.data_ptr(), _workspace(pairs), stream,
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
        raise BackendError(f"backend 'cuda' cannot take pairs of dtype {pairs.dtype}")
    pairs, choices, weights = pairs.contiguous(), choices.long().contiguous(), contiguous(weights)
    offsets, slots = offsets.to(pairs.device).long().contiguous(), slots.contiguous()
    modulation, modulation_bias = modulation.contiguous(), modulation_bias.contiguous()
    noise = None if noise is None else noise.contiguous()
    encoder = encoder_of(pairs, offsets, weights, inner, pooling, heads)
    latents = pairs.new_empty(encoder[1], encoder[3])
    table = rows_of(bank)
    with _stream_of(pairs) as stream:
        _core.context_rows(
            CODES[pairs.dtype], encoder, pairs.data_ptr(), choices.data_ptr(), offsets.data_ptr(),
            addresses(weights), CODES[bank.dtype], at(table), table.shape[1],
            slots_of(slots, slots.numel(), table.shape[0]), modulation.data_ptr(), modulation_bias.data_ptr(),
            0 if noise is None else noise.data_ptr(), latents.data_ptr(), _workspace(pairs), stream,
        )  # fmt: skip
    if table.data_ptr() != bank.data_ptr():
        bank.copy_(table)
    return latents


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "film": film,
    "film_norm": film_norm,
    "lora": lora,
    "lora_": lora_,
    "context": context,
    "context_rows_": context_rows_,
}
