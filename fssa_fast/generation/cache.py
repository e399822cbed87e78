"""The static cache of keys and values: blocks of positions, handed to sequences as they grow."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # positions of a block, but where the steps ask for other ones


class BlockCache:
    """Keys and values of up to S sequences of different lengths, in N blocks of B positions, allocated once.

    `table` [S, P] says in which block positions B p .. B p + B - 1 of a sequence lie. Blocks are handed out and taken
    back by their owner; this class only holds them. Block 0 belongs to nobody: what of the table was never handed out
    names it.
    """

    shares_prefixes = True  # a block may be in the rows of several sequences that begin alike

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_width: int,
        *,
        sequences: int,
        max_length: int,
        blocks: int | None = None,
        block: int = BLOCK,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        across = -(-max_length // block)
        self.max_length, self.block = max_length, block
        self.blocks = 1 + (sequences * across if blocks is None else blocks)
        size = kv_heads * head_width * block

        def new() -> Tensor:
            # The native steps read up to 62 elements past the last block's end.
            return torch.zeros(layers, self.blocks * size + 2 * block, dtype=dtype, device=device)

        self._keys, self._values = new(), new()
        self._shape = self.blocks, kv_heads, head_width
        self._size = self.blocks * size
        self._rows = torch.zeros(sequences, across, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.table = self._rows.to(device)  # the same memory on the CPU

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """A model block's keys [N, kv_heads, head_width, B] and values [N, kv_heads, B, head_width]."""
        blocks, heads, width = self._shape
        keys = self._keys[index, : self._size].view(blocks, heads, width, self.block)
        values = self._values[index, : self._size].view(blocks, heads, self.block, width)
        return keys, values

    def layer_of_rows(self, index: int) -> tuple[Tensor, Tensor]:
        """The same memory for steps that keep a position's heads side by side: both [N, B, kv_heads, head_width]."""
        blocks, heads, width = self._shape
        keys, values = (held[index, : self._size] for held in (self._keys, self._values))
        return keys.view(blocks, self.block, heads, width), values.view(blocks, self.block, heads, width)

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return self._keys.nbytes + self._values.nbytes

    def assign(self, sequence: int, blocks: list[int]) -> None:
        """Lets a sequence have these blocks, in the order of its positions; the rest of its row names block 0."""
        row = self._rows[sequence]
        row.numpy()[: len(blocks)] = blocks
        row.numpy()[len(blocks) :] = 0
        if self.table is not self._rows:
            self.table[sequence].copy_(row, non_blocking=True)

    def release(self, sequence: int) -> None:
        """Nothing: the row of a sequence that has ended stays until another one's is written."""
