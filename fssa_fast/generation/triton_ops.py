"""The steps of a fused block on a GPU: PyTorch's matrix products, and a launch of a Triton kernel for all between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fssa_fast.arguments import check_slot_range
from fssa_fast.backends import BackendError, load_backend
from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings, Expansion, FilmNorm, Packed, Step
from fssa_fast.generation.cache import BLOCK, BlockCache
from fssa_fast.kernels import block


class TritonOps:
    """The steps by the Triton kernels, which never wait for the GPU nor read from it.

    On CPU tensors the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 was set before triton was imported.
    There slots, sequences and positions are checked; on a GPU they are taken as they are. Bits of a row do not depend
    on the other rows, but for the matrix products: which kernel PyTorch takes for them follows the number of rows.

    Raises: BackendError where the kernels cannot take tensors of this dtype on this device.
    """

    capturable = True
    cache_block = BLOCK

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        module, reason = load_backend("triton")
        if module is not None:
            reason = module.refuses("film", torch.empty(0, dtype=dtype, device=device))
        if reason is not None:
            raise BackendError(reason)
        self._reads = device.type == "cpu"

    def pack(self, weight: Tensor) -> Packed:
        return Packed(weight.detach().clone(memory_format=torch.contiguous_format), *weight.shape)

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor) -> Step:
        transposed = weight.data.T

        def run() -> None:
            if bias is None:
                torch.mm(x, transposed, out=y)
            else:
                torch.addmm(bias, x, transposed, out=y)

        return run

    def adapt(self, parts: Sequence[Expansion], slots: Tensor) -> Step:
        listed = [block.Part(part.hidden, part.gamma, part.beta, part.b.data, part.y) for part in parts]

        def run() -> None:
            if self._reads:
                check_slot_range(slots, len(listed[0].gamma))
            block.adapt_(listed, slots)

        return run

    def gate(self, activation: str, gate: Tensor, up: Tensor, y: Tensor) -> Step:
        return lambda: block.gate_(gate, up, y, activation == "silu")

    def film_norm(self, given: FilmNorm) -> Step:
        assert given.hidden.is_contiguous() and given.normed.is_contiguous()

        def run() -> None:
            if self._reads:
                check_slot_range(given.slots, len(given.scale))
            block.film_norm_(*vars(given).values())

        return run

    def attention(
        self, settings: AttentionSettings, given: AttentionInputs, cache: BlockCache, layer: int, out: Tensor
    ) -> Step:
        s, positions, sequences = settings, given.positions, given.sequences
        queries, others = (block.Rotary(s.cos, s.sin, norm, s.eps) for norm in (s.q_norm, s.k_norm))
        where = positions, sequences, cache.table, *cache.layer(layer)

        def run() -> None:
            if self._reads:
                check_range("sequences", sequences, len(cache.table))
                check_range("positions", positions, min(len(s.cos), cache.table.shape[1] * cache.block))
            block.remember_(given.k, given.v, others, *where)
            block.attend_(given.q, queries, *where, s.scale, s.softcap, s.window, out)

        return run


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raises IndexError for a value of `limit` or more."""
    if values.numel() and int(values.max()) >= limit:
        raise IndexError(f"{name}: expected numbers below {limit}, got {int(values.max())}")
