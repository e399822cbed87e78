"""The forward ops of a native library: makes tensors fit for it, and launches its functions on their addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fssa_fast._native import LoraPart, array
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


class ForwardOps:
    """The ops by one native backend.

    Args:
        backend: its name, for errors.
        launch: `launch(op, tensor, *members)` calls the library's function of that op with these members of its struct;
            tensor says on which device.
        threads: how many threads may work on a call.
    """

    def __init__(self, backend: str, launch: Callable[..., None], threads: Callable[[], int]) -> None:
        self._backend, self._launch, self._threads = backend, launch, threads

    def film(self, x: Tensor, scale: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
        """As the op."""
        y, points, scale, shift, slots = new_like(x), rows_of(x), rows_of(scale), rows_of(shift), slots.contiguous()
        rows, width = points.shape
        self._launch(
            "film", x, CODES[x.dtype], rows, width, at(points), (at(scale), at(shift)),
            slots_of(slots, rows, scale.shape[0]), (y.data_ptr(), width), self._threads(),
        )  # fmt: skip
        return y

    def film_norm(
        self, x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As the op."""
        hidden, normed, points, residual = new_like(x), new_like(x), rows_of(x), rows_of(residual)
        scale, shift, slots, weight = rows_of(scale), rows_of(shift), slots.contiguous(), weight.contiguous()
        rows, width = points.shape
        self._launch(
            "film_norm", x, CODES[x.dtype], rows, width, at(points), at(residual), (at(scale), at(shift)),
            slots_of(slots, rows, scale.shape[0]), (weight.data_ptr(), eps), (hidden.data_ptr(), width),
            (normed.data_ptr(), width), self._threads(),
        )  # fmt: skip
        return hidden, normed

    def _lora(
        self,
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
        gamma = gamma_rows(gamma)
        beta = None if beta is None else rows_of(beta)
        bs = [rows_of(b) for b in bs]
        parts = [(*b.shape, at(y), at(b), at(out)) for y, b, out in zip(ys, bs, outs, strict=True)]
        rows, width = points.shape
        self._launch(
            "lora", x, CODES[x.dtype], rows, width, at(points), at(a), modulation_of(gamma, beta),
            slots_of(slots, rows, gamma.shape[0]), scaling, *array(LoraPart, parts), self._threads(),
        )  # fmt: skip

    def lora(
        self,
        x: Tensor,
        ys: Sequence[Tensor],
        a: Tensor,
        bs: Sequence[Tensor],
        gamma: Tensor,
        beta: Tensor | None,
        slots: Tensor,
        scaling: float,
    ) -> list[Tensor]:
        """As the op."""
        outs = [new_like(y) for y in ys]
        self._lora(x, [rows_of(y) for y in ys], [rows_of(out) for out in outs], a, bs, gamma, beta, slots, scaling)
        return outs

    def lora_(
        self,
        x: Tensor,
        ys: Sequence[Tensor],
        a: Tensor,
        bs: Sequence[Tensor],
        gamma: Tensor,
        beta: Tensor | None,
        slots: Tensor,
        scaling: float,
    ) -> None:
        """As the op, in place of ys."""
        outs = [rows_of(y) for y in ys]
        self._lora(x, outs, outs, a, bs, gamma, beta, slots, scaling)
        for y, out in zip(ys, outs, strict=True):
            if y.data_ptr() != out.data_ptr():  # a copy, since y's strides are no matrix's
                y.copy_(out.view(y.shape))

    def context(
        self,
        pairs: Tensor,
        choices: Tensor,
        offsets: Tensor,
        weights: Sequence[Tensor | None],
        inner: str,
        pooling: str,
        heads: int,
    ) -> Tensor:
        """As the op."""
        given = ContextInput.of(pairs, choices, offsets, weights, inner, pooling, heads)
        encoded = pairs.new_empty(given.users, given.encoder[2])
        self._launch("context", pairs, given.group(self._threads()), encoded.data_ptr())
        return encoded

    def context_rows_(
        self,
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
        """As the op, into the bank's rows."""
        if pairs.dtype not in CODES:
            raise BackendError(f"backend {self._backend!r} cannot take pairs of dtype {pairs.dtype}")
        given = ContextInput.of(pairs, choices, offsets, weights, inner, pooling, heads)
        slots, modulation, modulation_bias = slots.contiguous(), modulation.contiguous(), modulation_bias.contiguous()
        noise = None if noise is None else noise.contiguous()
        latents = pairs.new_empty(given.users, given.encoder[1])
        table = rows_of(bank)
        rows = CODES[bank.dtype], at(table), table.shape[1], slots_of(slots, slots.numel(), table.shape[0])
        self._launch(
            "context_rows", pairs, given.group(self._threads()), *rows,
            *addresses([modulation, modulation_bias, noise, latents]),
        )  # fmt: skip
        if table.data_ptr() != bank.data_ptr():
            bank.copy_(table)
        return latents

    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Every op by its name."""
        return {
            "film": self.film,
            "film_norm": self.film_norm,
            "lora": self.lora,
            "lora_": self.lora_,
            "context": self.context,
            "context_rows_": self.context_rows_,
        }
