"""The bank: one preallocated table of rows, written in place, that batches index by slot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BASE_SLOT, PRIOR_SLOT, RESERVED = 0, 1, 2  # PRIOR_SLOT at the beginning: see Bank.prior


class BankFull(RuntimeError):
    """No slot is free."""


class Bank:
    """Rows [S, M] of S = capacity + 2 slots: the base model's (zeros), the empty context's, and the users'.

    The first `modulated` of a row's `width` columns are affine in the latent; the others are plain adapters' strengths.

    A slot that a running generation reads is pinned: it may be let go, but its row stays until the last pin is gone.
    """

    def __init__(
        self, width: int, modulated: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.modulated, self.capacity = modulated, capacity
        try:
            self.rows = torch.zeros(capacity + RESERVED, width, dtype=dtype, device=device)
        except RuntimeError as error:
            gib = (capacity + RESERVED) * width * dtype.itemsize / 2**30
            raise MemoryError(
                f"capacity: expected a bank that fits into the memory of {device}, got {capacity} rows of {gib:.1f} "
                "GiB in all; a smaller one serves as many users from a store"
            ) from error
        self._free = list(range(capacity + RESERVED - 1, RESERVED - 1, -1))
        self._pins: dict[int, int] = {}
        self._released: set[int] = set()
        self._lock = threading.RLock()  # a conversion of the model holds it around the bank's own
        self.prior = PRIOR_SLOT  # where the empty context's row is: it moves when it changes while somebody reads it
        self.evict: Callable[[], bool] | None = None  # releases a slot that is not needed now; False: there is none

    @property
    def modulations(self) -> Tensor:
        """The columns that are affine in the latent: a view [S, modulated]."""
        return self.rows[:, : self.modulated]

    @property
    def used(self) -> int:
        """How many slots are not free."""
        return self.capacity - len(self._free)

    @property
    def strengths(self) -> Tensor:
        """The columns that hold the plain adapters' strengths: a view [S, P]."""
        return self.rows[:, self.modulated :]

    @contextmanager
    def unread(self) -> Iterator[None]:
        """A block in which no generation reads rows: what would begin waits for its end.

        Raises RuntimeError where one is under way: its rows must stay where and what they are.
        """
        with self._lock:
            if self._pins:
                raise RuntimeError(
                    "bank: expected no generation under way while its rows are moved to another dtype or device, got "
                    f"{len(self._pins)} rows that are being read"
                )
            yield

    def convert(self, dtype: torch.dtype, device: torch.device) -> None:
        """Moves the rows to another dtype or device. Raises RuntimeError while a generation reads them."""
        with self.unread():
            self.rows = self.rows.to(device=device, dtype=dtype)

    @contextmanager
    def take(self, count: int = 1) -> Iterator[list[int]]:
        """Reserves slots, and gives them back where the block raises. Raises BankFull where fewer are free."""
        # What one thread evicts another may take before it: there is no room only when nothing is left to evict.
        more = True
        while (slots := self._reserve(count)) is None:
            if not more:
                used = self.capacity - len(self._free)
                raise BankFull(
                    f"users: expected room for {count} in a bank of {self.capacity}, got {used} slots in use; remove "
                    "users, wait for generations to end, or make the policy with a larger capacity"
                )
            more = self.evict is not None and count <= self.capacity and self.evict()
        try:
            yield slots
        except BaseException:
            for slot in slots:
                self.release(slot)
            raise

    def _reserve(self, count: int) -> list[int] | None:
        """So many free slots, or None where there are fewer."""
        with self._lock:
            return [self._free.pop() for _ in range(count)] if len(self._free) >= count else None

    def release(self, slot: int) -> None:
        """Gives a slot back, at once or when its last pin is gone."""
        with self._lock:
            if self._pins.get(slot):
                self._released.add(slot)
            else:
                self._clear(slot)

    def pinned(self, slot: int) -> bool:
        """Whether a generation is reading this slot."""
        with self._lock:
            return bool(self._pins.get(slot))

    @contextmanager
    def pin(self, slots: Sequence[int]) -> Iterator[None]:
        """Keeps the rows of these slots as they are for the block."""
        with self._lock:
            for slot in slots:
                self._pins[slot] = self._pins.get(slot, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                for slot in slots:
                    self._pins[slot] -= 1
                    if not self._pins[slot]:
                        del self._pins[slot]
                        if slot in self._released:
                            self._released.remove(slot)
                            self._clear(slot)

    def _clear(self, slot: int) -> None:
        self.rows[slot] = 0
        self._free.append(slot)
