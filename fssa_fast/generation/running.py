"""Requests that run: each has a row, and blocks of the cache for its tokens. Who is served by a step, and with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fssa_fast.generation.attached import AttachedCache
from fssa_fast.generation.blocks import BlockPool, prefix_keys
from fssa_fast.generation.cache import BlockCache
from fssa_fast.generation.requests import Request


@dataclass(frozen=True)
class Batch:
    """What a step computes: n tokens, first those of the rows that decode, then pieces of prompts."""

    tokens: tuple[Tensor, Tensor, Tensor, Tensor]  # ids, slots, rows and positions, each [n]
    decoding: np.ndarray  # rows
    pieces: list[tuple[Request, int]]  # requests with so many tokens of their prompts
    asked: np.ndarray  # the rows [m] whose next token is drawn, their last tokens' positions and indices among the n
    positions: np.ndarray
    indices: Tensor | None  # None: all n


class Running:
    """Rows, blocks, and what a step needs of every row, side by side: a step looks at rows, not at requests.

    Args:
        put_back: takes a request that had to leave for want of memory. fail: takes one that cannot be served, and why.
    """

    def __init__(
        self,
        cache: BlockCache | AttachedCache,
        rows: int,
        step_tokens: int,
        device: torch.device,
        put_back: Callable[[Request], None],
        fail: Callable[[Request, Exception], None],
    ) -> None:
        self.pool = BlockPool(cache.blocks)
        self.requests: list[Request | None] = [None] * rows
        self.preempted = 0  # how often a request was put back
        self._cache, self._block, self._device = cache, cache.block, device
        self._step_tokens, self._put_back, self._fail = step_tokens, put_back, fail
        self._free = list(range(rows - 1, -1, -1))
        # Of the rows that decode: the token that is computed next, its slot, row and position.
        self._next = np.zeros((4, rows), dtype=np.int32)
        self._next[2] = np.arange(rows)
        self.next_ids, self._slots, _, self._positions = self._next
        self._decoding: dict[int, Request] = {}
        self._decoding_rows: np.ndarray | None = None
        self._prompts: dict[Request, None] = {}
        self._promised: set[bytes] = set()  # keys of blocks that are being computed
        self._turns: dict[tuple[str, ...], int] = {}  # when a user's prompt was computed last
        self._steps = 0
        self._full: list[int] = []  # rows whose next token begins a block
        self._buffer = torch.zeros(4, step_tokens, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._staged = self._buffer.numpy()
        self._on_device = self._buffer.to(device)  # the same memory on the CPU
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # after a step's copies to the device
        self._last: Batch | None = None  # served again as long as the same rows decode, and nothing else comes

    def __len__(self) -> int:
        return len(self.requests) - len(self._free)

    def __iter__(self) -> Iterator[Request]:
        return iter([request for request in self.requests if request is not None])

    # ------------------------------------------------------------ coming and going

    @property
    def full(self) -> bool:
        """Whether all rows are taken."""
        return not self._free

    def admit(self, request: Request) -> Literal["joined", "no room", "later"]:
        """Lets a request join, where there are a row and blocks for its prompt and one token more.

        "later": another's prompt begins as this one does, and is being computed; then it need not be done twice.
        """
        whole: list[bytes] = []
        if self._cache.shares_prefixes:
            request.keys = prefix_keys(request.root, request.tokens, self._block, request.keys)
            # One token at least is computed, for its logits.
            whole = request.keys[: (len(request.tokens) - 1) // self._block]
        found = self.pool.find(whole)
        missing = whole[len(found) :]
        later = bool(missing) and missing[0] in self._promised
        if later or -(-(len(request.tokens) + 1) // self._block) - len(found) > self.pool.available:
            self.pool.give_back(found)
            return "later" if later else "no room"
        request.row, request.blocks, request.computed = self._free.pop(), found, len(found) * self._block
        if request.cached is None:
            request.cached = request.computed
        request.promised = set(missing)
        self._promised |= request.promised
        self.requests[request.row] = request
        self._prompts[request] = None
        return "joined"

    def leave(self, request: Request) -> None:
        """Takes a running request's row and blocks."""
        row = request.row
        self._prompts.pop(request, None)
        if self._decoding.pop(row, None) is not None:
            self._decoding_rows = None
        self._promised -= request.promised
        self.pool.give_back(request.blocks)
        self._cache.release(row)
        self.requests[row] = None
        self._free.append(row)
        request.row, request.blocks, request.computed, request.promised = -1, [], 0, set()
        if not self._prompts:
            self._turns.clear()

    # ------------------------------------------------------------ a step

    def plan(self) -> Batch:
        """The next step, with the blocks that it needs: all that decode, and prompts, whose users take turns."""
        if self._sent is not None:
            self._sent.synchronize()  # the last step's copies may yet read what this one writes, where nobody waited
        for row in self._full:
            if row in self._decoding:  # if it has not just been put back
                self._extend(self._decoding[row], self._positions[row] // self._block + 1)
        pieces: list[tuple[Request, int]] = []
        left = self._step_tokens - len(self._decoding)
        self._steps += 1
        if not self._prompts:
            return self._stage(pieces)
        for request in sorted(self._prompts, key=lambda r: (self._turns.get(r.user, 0), r.order)):
            count = min(left, len(request.tokens) - request.computed)
            if count == 0:
                break
            if request.row >= 0 and self._extend(request, -(-(request.computed + count) // self._block)):
                pieces.append((request, count))
                self._turns[request.user] = self._steps
                left -= count
        return self._stage([(request, count) for request, count in pieces if request.row >= 0])

    def computed(self, batch: Batch) -> None:
        """Makes the blocks known that a step has filled; prompts that are complete decode from now on."""
        rows, block = batch.decoding, self._block
        positions = self._positions[rows] + 1
        self._positions[rows] = positions
        self._full = rows[positions % block == 0].tolist()
        for row in self._full:
            self._learn(self._decoding[row], self._positions[row] // block - 1, self._positions[row] // block)
        for request, count in batch.pieces:
            first = request.computed // block
            request.computed += count
            self._learn(request, first, request.computed // block)
            if request.computed == len(request.tokens):
                del self._prompts[request]
                self._decoding[request.row] = request
                self._decoding_rows = None
                self._slots[request.row], self._positions[request.row] = request.slot, request.computed
                if request.computed % block == 0:
                    self._full.append(request.row)

    def _rows(self) -> np.ndarray:
        if self._decoding_rows is None:
            self._decoding_rows = np.fromiter(self._decoding, dtype=np.int32, count=len(self._decoding))
        return self._decoding_rows

    def _extend(self, request: Request, blocks: int) -> bool:
        """Gives a request as many blocks, putting back the youngest of all until there are; False: itself."""
        try:
            while blocks - len(request.blocks) > self.pool.available:
                youngest = max(self, key=lambda r: r.order)
                self.leave(youngest)
                self.preempted += 1
                self._put_back(youngest)
                if youngest is request:
                    return False
            missing = blocks - len(request.blocks)
            if missing > 0:
                request.blocks += [self.pool.take() for _ in range(missing)]
                self._cache.assign(request.row, request.blocks)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(request, error)
            return False
        return True

    def _learn(self, request: Request, first: int, end: int) -> None:
        if not self._cache.shares_prefixes:
            return
        if end > first:
            request.keys = prefix_keys(request.root, request.tokens, self._block, request.keys)
        for index in range(first, end):
            key = request.keys[index]
            self.pool.learn(request.blocks[index], key)
            self._promised.discard(key)
            request.promised.discard(key)

    def _stage(self, pieces: list[tuple[Request, int]]) -> Batch:
        rows = self._rows()
        n = len(rows)
        np.take(self._next, rows, axis=1, out=self._staged[:, :n], mode="clip")
        if not pieces:
            if self._last is None or self._last.decoding is not rows:
                self._last = Batch(self._tokens(n), rows, pieces, rows, self._staged[3, :n], None)
            self._send(n)
            return self._last
        ids, slots, sequences, positions = self._staged
        last = list(range(n))
        for request, count in pieces:
            start = request.computed
            ids[n : n + count] = request.tokens[start : start + count]
            slots[n : n + count], sequences[n : n + count] = request.slot, request.row
            positions[n : n + count] = np.arange(start, start + count)
            n += count
            if start + count == len(request.tokens):
                last.append(n - 1)
        self._send(n)
        return Batch(
            self._tokens(n),
            rows,
            pieces,
            sequences[last],
            positions[last],
            torch.tensor(last, dtype=torch.int64, device=self._device) if len(last) < n else None,
        )

    def _tokens(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, slots, sequences, positions = self._on_device[:, :n].unbind()
        return ids, slots, sequences, positions

    def _send(self, n: int) -> None:
        if self._on_device is not self._buffer:
            self._on_device[:, :n].copy_(self._buffer[:, :n], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
