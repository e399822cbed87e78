"""The steps of a fused block on a GPU with flash-attn's attention, where that package is installed.

All steps are `triton_ops`', but for attention: one kernel turns queries and keys and writes the cache, and flash-attn
reads it, in pages of 256 positions, as it asks for. A step of few tokens gives it each token by itself, which it
answers by sharing out the positions among the chip; a longer one, with prompts in it, gives it each sequence's tokens
together, so that a tile of them meets the keys once. How it shares out work follows the batch: a row's bits may too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fssa_fast.backends import BackendError
from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings, Step
from fssa_fast.generation.cache import BlockCache
from fssa_fast.generation.triton_ops import TritonOps, check_range
from fssa_fast.kernels import block

PAGE = 256  # flash-attn takes pages of multiples of it
WIDEST = 256  # head it takes


@dataclass(frozen=True)
class FlashFunctions:
    """flash-attn's functions on a cache in pages: for a token a sequence, and for sequences of different lengths."""

    with_kvcache: Callable[..., Any]
    varlen: Callable[..., Any]


def load_flash() -> FlashFunctions:
    """The package's functions. Raises BackendError with the reason where it cannot be imported."""
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except Exception as error:  # a build for another torch fails in its own ways
        raise BackendError(f"flash-attn could not be imported: {error!r}") from error
    return FlashFunctions(flash_attn_with_kvcache, flash_attn_varlen_func)


class _Plan:
    """What the blocks of one step share: room for queries, and the tokens by sequence, found in the first block."""

    def __init__(self, q: Tensor, settings: AttentionSettings, positions: Tensor, sequences: Tensor) -> None:
        self.positions, self.sequences = positions, sequences
        self.turned = q.new_empty(len(q), settings.heads, settings.head_width)

    def find_each(self, cache: BlockCache) -> None:
        """What each token by itself meets."""
        self.lengths, self.table = self.positions + 1, cache.table[self.sequences.clamp(min=0)]

    def find_sequences(self, cache: BlockCache) -> None:
        """Sorts the tokens, without reading from the GPU. Nobody's are those of one sequence more, the last."""
        count = len(cache.table)
        owner = torch.where(self.sequences < 0, count, self.sequences).long()
        positions = self.positions.long()
        self.order = torch.argsort(owner * cache.table.shape[1] * cache.block + positions)
        zeros = positions.new_zeros(count + 1)
        queries = zeros.scatter_add(0, owner, torch.ones_like(positions))
        keys = zeros.scatter_reduce(0, owner, positions + 1, "amax")
        self.queries, self.keys = (functional.pad(counts.cumsum(0), (1, 0)).int() for counts in (queries, keys))
        self.table = functional.pad(cache.table, (0, 0, 0, 1))


class FlashOps(TritonOps):
    """`TritonOps` with flash-attn's attention. A step's tokens of one sequence follow one another in position.

    Args: functions: as `load_flash` finds them.
    Raises: BackendError where the Triton kernels or flash-attn cannot take this dtype or heads of this width.
    """

    cache_block = PAGE

    def __init__(self, device: torch.device, dtype: torch.dtype, head_width: int, functions: FlashFunctions) -> None:
        super().__init__(device, dtype)
        if dtype not in (torch.bfloat16, torch.float16):
            raise BackendError(f"flash-attn takes bfloat16 and float16, got {dtype}")
        if head_width % 8 or head_width > WIDEST:
            raise BackendError(f"flash-attn takes heads of a multiple of 8 up to {WIDEST}, got {head_width}")
        self._functions = functions
        self._plan: _Plan | None = None

    def attention(
        self, settings: AttentionSettings, given: AttentionInputs, cache: BlockCache, layer: int, out: Tensor
    ) -> Step:
        s, n, positions, sequences = settings, len(given.q), given.positions, given.sequences
        first = self._plan is None or self._plan.positions is not positions
        if first:
            self._plan = _Plan(given.q, settings, positions, sequences)
        plan = self._plan
        assert plan is not None
        queries, others = (block.Rotary(s.cos, s.sin, norm, s.eps) for norm in (s.q_norm, s.k_norm))
        keys, values = cache.layer_of_rows(layer)
        options = {
            "softmax_scale": s.scale,
            "causal": True,
            "window_size": (s.window - 1, 0) if s.window else (-1, -1),
            "softcap": s.softcap,
        }
        several = n > len(cache.table)  # some sequence has several tokens

        def each() -> Tensor:
            if first:
                plan.find_each(cache)
            return self._functions.with_kvcache(
                plan.turned[:, None], keys, values, cache_seqlens=plan.lengths, block_table=plan.table,
                **options,
            )  # fmt: skip

        def by_sequence() -> Tensor:
            if first:
                plan.find_sequences(cache)
            found = self._functions.varlen(
                plan.turned[plan.order], keys, values, plan.queries, plan.keys, n, cache.table.shape[1] * cache.block,
                block_table=plan.table, **options,
            )  # fmt: skip
            return torch.empty_like(found).index_copy_(0, plan.order, found)

        def run() -> None:
            if self._reads:
                check_range("sequences", sequences, len(cache.table))
                check_range("positions", positions, min(len(s.cos), cache.table.shape[1] * cache.block))
            block.turn_(
                given.q, given.k, given.v, queries, others, positions, sequences, cache.table, plan.turned, keys, values
            )
            out.copy_((by_sequence() if several else each()).view(n, -1))

        return run
