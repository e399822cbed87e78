"""Who has which block of the cache, and which blocks hold a known prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def prefix_keys(root: bytes, tokens: Sequence[int], size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for every full block of `size` tokens: it stands for the root and all tokens up to the block's end.

    known: the keys of the first blocks, where they have been computed before.
    """
    keys = list(known)
    for start in range(len(keys) * size, len(tokens) - size + 1, size):
        before = keys[-1] if keys else root
        block = array("q", tokens[start : start + size]).tobytes()
        keys.append(hashlib.blake2b(before + block, digest_size=16).digest())
    return keys


class BlockPool:
    """Blocks 1 .. count - 1 of a cache: free, in use by sequences, or kept for a prefix until the room is needed."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, 0, -1))
        self._uses: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused blocks with a known prefix, the oldest first

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self._free) + len(self._kept)

    def take(self) -> int:
        """A block of one's own. The caller has seen that one is available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._by_key[self._key_of.pop(block)]
        self._uses[block] = 1
        return block

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix, now also the caller's."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._uses[block] = self._uses.get(block, 0) + 1
            blocks.append(block)
        return blocks

    def learn(self, block: int, key: bytes) -> None:
        """Makes a full block known by its prefix, unless another one is."""
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key] = block
            self._key_of[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Ends the caller's use of these blocks."""
        for block in reversed(blocks):  # the end of a prefix is of less use than its beginning
            self._uses[block] -= 1
            if not self._uses[block]:
                del self._uses[block]
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._free.append(block)
