"""The steps of a fused block by the native core, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_fast._native import AdaptPart, Core, array
from fssa_fast.backends.addresses import CODES, addresses, at, modulation_of, slots_of
from fssa_fast.generation.block_ops import (
    ACTIVATIONS,
    AttentionInputs,
    AttentionSettings,
    Expansion,
    FilmNorm,
    Packed,
    Step,
)
from fssa_fast.generation.cache import BLOCK, BlockCache

PANEL = 32  # outputs that lie side by side in a packed weight


class NativeOps:
    """The steps by the native core, on the CPU."""

    capturable = False
    cache_block = BLOCK

    def __init__(self, core: Core) -> None:
        self._core = core

    def pack(self, weight: Tensor) -> Packed:
        # In panels; of bfloat16 with two elements of a row side by side: csrc/cpu/panels.h says why.
        outputs, width = weight.shape
        together = 2 if weight.dtype == torch.bfloat16 else 1
        panels, steps = -(-outputs // PANEL), -(-width // together)
        data = weight.new_zeros(panels * PANEL, steps * together)
        data[:outputs, :width] = weight.detach()
        data = data.view(panels, PANEL, steps, together).transpose(1, 2).contiguous()
        return Packed(data, outputs, width)

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor) -> Step:
        args = (
            CODES[x.dtype], len(x), weight.width, weight.outputs, at(x), weight.data.data_ptr(),
            0 if bias is None else bias.data_ptr(), at(y), torch.get_num_threads(),
        )  # fmt: skip
        return self._call("linear", args, x, weight, bias, y)

    def adapt(self, parts: Sequence[Expansion], slots: Tensor) -> Step:
        listed = [
            (
                part.b.width, part.b.outputs, at(part.hidden), modulation_of(part.gamma, part.beta),
                part.b.data.data_ptr(), at(part.y),
            )
            for part in parts
        ]  # fmt: skip
        code, rows = CODES[parts[0].y.dtype], len(parts[0].y)
        where = slots_of(slots, len(slots), len(parts[0].gamma))
        args = code, rows, where, *array(AdaptPart, listed), torch.get_num_threads()
        return self._call("adapt", args, parts, slots)

    def gate(self, activation: str, gate: Tensor, up: Tensor, y: Tensor) -> Step:
        args = (
            CODES[y.dtype], ACTIVATIONS.index(activation), *y.shape, at(gate), at(up), at(y), torch.get_num_threads(),
        )  # fmt: skip
        return self._call("gate", args, gate, up, y)

    def film_norm(self, given: FilmNorm) -> Step:
        x, scale, slots = given.x, given.scale, given.slots
        args = (
            CODES[x.dtype], *x.shape, at(x), at(given.residual), (at(scale), at(given.shift)),
            slots_of(slots, len(slots), len(scale)), (given.weight.data_ptr(), given.eps), at(given.hidden),
            at(given.normed), torch.get_num_threads(),
        )  # fmt: skip
        return self._call("film_norm", args, given)

    def attention(
        self, settings: AttentionSettings, given: AttentionInputs, cache: BlockCache, layer: int, out: Tensor
    ) -> Step:
        s, positions, sequences, table = settings, given.positions, given.sequences, cache.table
        keys, values = cache.layer(layer)
        heads = s.heads, s.kv_heads, s.head_width
        matrices = at(given.q), at(given.k), at(given.v)
        tokens = len(given.q), *matrices, positions.data_ptr(), sequences.data_ptr()
        rotary = *addresses([s.q_norm, s.k_norm]), s.eps, s.cos.data_ptr(), s.sin.data_ptr(), len(s.cos)
        blocks = keys.data_ptr(), values.data_ptr(), len(keys), table.data_ptr(), *table.shape
        scores = s.scale, s.softcap, s.window
        args = CODES[out.dtype], heads, tokens, rotary, blocks, scores, at(out), torch.get_num_threads()
        return self._call("attention", args, s, given, cache, out)

    def _call(self, op: str, members: tuple[Any, ...], *tensors: Any) -> Step:
        # The core gets addresses: what lies there lives as long as the step.
        call = self._core.prepare(op, *members)

        def run(tensors: tuple[Any, ...] = tensors) -> None:
            call()

        return run
