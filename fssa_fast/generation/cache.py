"""The static cache of keys and values: blocks of positions, handed to sequences as they grow."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # positions of a block


class BlockCache:
    """Keys and values of up to S sequences of different lengths, in N blocks of 32 positions, allocated once.

    `table` [S, P] says in which block positions 32 p .. 32 p + 31 of a sequence lie. Blocks are handed out and taken
    back by their owner; this class only holds them. Block 0 belongs to nobody: rows of the table that are not in use
    name it.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_width: int,
        *,
        sequences: int,
        max_length: int,
        blocks: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        across = -(-max_length // BLOCK)
        self.max_length = max_length
        self.blocks = 1 + (sequences * across if blocks is None else blocks)
        size = kv_heads * head_width * BLOCK

        def new() -> Tensor:
            # The native steps read up to 31 elements past the last block's end.
            return torch.zeros(layers, self.blocks * size + BLOCK, dtype=dtype, device=device)

        self._keys, self._values = new(), new()
        self._shape = self.blocks, kv_heads, head_width
        self._size = self.blocks * size
        self.table = torch.zeros(sequences, across, dtype=torch.int32, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """A block's keys [N, kv_heads, head_width, 32] and values [N, kv_heads, 32, head_width]."""
        blocks, heads, width = self._shape
        keys = self._keys[index, : self._size].view(blocks, heads, width, BLOCK)
        values = self._values[index, : self._size].view(blocks, heads, BLOCK, width)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return self._keys.nbytes + self._values.nbytes

    def assign(self, sequence: int, blocks: list[int]) -> None:
        """Lets a sequence have these blocks, in the order of its positions; the rest of its row names block 0."""
        row = blocks + [0] * (self.table.shape[1] - len(blocks))
        self.table[sequence] = torch.tensor(row, dtype=torch.int32)
