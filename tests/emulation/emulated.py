"""Runs the CUDA backend on the CPU: python -m emulation.emulated MODULE CASE... (in build.environment()).

MODULE is what build.build gave, or "device": then the cases run on the GPU. Every case is run with the threads of a
block, and the blocks, in several orders, and held against the definition in float64. A line of JSON a case: its name,
and what was wrong or null.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import columns, context_args, film_args, film_norm_args, lora_args, normal, some_slots, unwritten_is_nan
from tolerances import check_parity
from torch import Tensor

from fssa_fast._native import Cuda
from fssa_fast.backends import cuda
from fssa_fast.ops.context import context_reference, context_rows_reference_
from fssa_fast.ops.film import film_norm_reference, film_reference
from fssa_fast.ops.lora import lora_reference

SEEDS = (0, 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Emulation:
    """The emulation that the module was built with."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.fssa_emulation_counts.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Draws the order of threads and blocks from this seed."""
        self.library.fssa_emulation_seed(ctypes.c_uint64(seed))

    @contextmanager
    def counting(self) -> Iterator[dict[str, list[int]]]:
        """Afterwards: kernel -> launches, bytes read and written, bytes of sectors read and written, products."""
        found: dict[str, list[int]] = {}
        self.library.fssa_emulation_count(1)
        yield found
        self.library.fssa_emulation_count(0)
        for line in self.library.fssa_emulation_counts().decode().splitlines():
            name, *numbers = line.split("\t")
            found[name] = [int(number) for number in numbers]


class Device:
    """A GPU in the emulation's place: it orders its threads itself."""

    def __init__(self) -> None:
        torch.set_default_device("cuda")

    def seed(self, seed: int) -> None:
        pass


def load(path: str) -> Emulation:
    """Puts the library in the backend's place, where it takes CPU tensors."""

    @contextmanager
    def no_stream(tensor: Tensor) -> Iterator[int]:
        yield 0

    cuda._core, cuda._stream_of = Cuda(Path(path)), no_stream
    return Emulation(path)


Machine = Emulation | Device
Run = Callable[[torch.dtype, Machine], None]


def _parity(implementation: Any, definition: Any, args: tuple[Any, ...], emulation: Machine) -> None:
    found = []
    for seed in SEEDS:
        emulation.seed(seed)
        with unwritten_is_nan():
            found.append(implementation(*args))
        check_parity(found[-1], definition, args)
    for one, other in zip(_flat(found[0]), _flat(found[-1]), strict=True):
        assert torch.equal(one, other), "the bits depend on the order of threads"


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _film(rows: int, width: int, dense: bool = False) -> Run:
    def run(dtype: torch.dtype, emulation: Machine) -> None:
        args = film_args(rows, width, dtype)
        args = tuple(a.contiguous() for a in args) if dense else args
        _parity(cuda.film, film_reference, args, emulation)

    return run


def _film_tokens(dtype: torch.dtype, emulation: Machine) -> None:
    x, scale, shift, slots = film_args(3, 20, dtype)
    args = x[:, None].expand(3, 4, 20).contiguous(), scale, shift, slots.long()
    _parity(cuda.film, film_reference, args, emulation)


def _film_norm(rows: int, width: int, dense: bool = False) -> Run:
    def run(dtype: torch.dtype, emulation: Machine) -> None:
        *args, eps = film_norm_args(rows, width, dtype)
        args = [a.contiguous() for a in args] if dense else args
        _parity(cuda.film_norm, film_norm_reference, (*args, eps), emulation)

    return run


def _lora(rows: int, width: int, parts: tuple[tuple[int, int], ...], dense: bool = False, **kind: bool) -> Run:
    def run(dtype: torch.dtype, emulation: Machine) -> None:
        x, ys, a, bs, *rest = lora_args(rows, width, parts, dtype, **kind)
        if dense:
            x, a, ys, bs = x.contiguous(), a.contiguous(), [y.contiguous() for y in ys], [b.contiguous() for b in bs]
        args = (x, ys, a, bs, *rest)
        _parity(cuda.lora, lora_reference, args, emulation)
        copies = [y.clone() for y in ys]
        cuda.lora_(x, copies, a, bs, *rest)
        for new, copy in zip(cuda.lora(*args), copies, strict=True):
            assert torch.equal(new, copy), "in place differs"

    return run


def _lora_alone(dtype: torch.dtype, emulation: Machine) -> None:
    """A row's bits are the same in a batch of many, for which other tiles are taken."""
    x, ys, *shared, slots, scaling = lora_args(70, 530, ((16, 70), (20, 9)), dtype)
    together = cuda.lora(x, ys, *shared, slots, scaling)
    for rows in (slice(0, 1), slice(5, 22), slice(69, 70)):
        alone = cuda.lora(x[rows], [y[rows] for y in ys], *shared, slots[rows], scaling)
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one, all_[rows]), "the bits of a row depend on the batch"


# Pairs of each user; E, H, heads, inner, pooling, Z.
CONTEXTS: dict[str, tuple[Any, ...]] = {
    "few": ((3, 0, 1, 20, 5), 7, 24, 3, "linear", "self-attention", 24),
    "sampled": ((17, 16, 2), 24, 40, 5, "mlp", "self-attention", 80),
    "full": ((64, 33), 136, 72, 4, "linear", "self-attention", 72),
    "one head": ((5, 3), 33, 100, 1, "linear", "self-attention", 100),
    "long": ((70,), 8, 32, 2, "mlp", "self-attention", 32),
    "wide": ((4,), 1100, 64, 8, "linear", "self-attention", 64),
    "of 111": ((7, 1), 111, 111, 3, "linear", "self-attention", 111),
    "of 3424": ((3,), 3424, 24, 2, "linear", "self-attention", 24),
    "mean": ((3, 0, 35), 9, 18, 1, "mlp", "mean", 18),
    "sum": ((0, 2, 20), 5, 33, 1, "linear", "sum", 66),
    "no pairs": ((0, 0), 4, 16, 4, "mlp", "self-attention", 16),
    "many": ((0, 17, 66, *range(1, 15)), 33, 40, 2, "mlp", "self-attention", 40),
    "on the chip in part": ((64, 20), 8, 256, 8, "mlp", "self-attention", 256),  # in float32
    "too wide for the chip": ((5, 3), 8, 512, 64, "linear", "self-attention", 512),
}


def _context(case: str) -> Run:
    def run(dtype: torch.dtype, emulation: Machine) -> None:
        *shape, encoded = CONTEXTS[case]
        _parity(cuda.context, context_reference, context_args(*shape, dtype, encoded), emulation)

    return run


def _context_rows(case: str, width: int, bank_dtype: torch.dtype | None = None, noisy: bool = False) -> Run:
    def run(dtype: torch.dtype, emulation: Machine) -> None:
        *shape, encoded = CONTEXTS[case]
        latent, users = shape[2], len(shape[0])
        *encoder, inner, pooling, heads = context_args(*shape, dtype, encoded)
        noise = normal(users, latent, dtype=dtype, scale=8.0) if noisy else None
        slots = torch.randperm(users + 2)[:users]

        def rows(op: Any, *args: Any) -> list[Tensor]:
            exact = args[0].dtype == torch.float64
            bank = torch.full((users + 2, width + 6), 3.0, dtype=torch.float64 if exact else bank_dtype or dtype)
            latents = op(bank[:, 2 : width + 2], slots, *args, inner, pooling, heads)
            assert (bank[:, :2] == 3).all() and (bank[:, width + 2 :] == 3).all(), "columns of others were written"
            return [bank, latents]

        args = (*encoder, columns(width, latent, dtype, latent**-0.5), normal(width, dtype=dtype), noise)
        _parity(
            lambda *args: rows(cuda.context_rows_, *args), lambda *args: rows(context_rows_reference_, *args), args,
            emulation,
        )  # fmt: skip

    return run


def _context_alone(dtype: torch.dtype, emulation: Machine) -> None:
    """A user's bits do not depend on the other users, nor on where its pairs lie, nor on how many blocks share it."""
    counts = (3, 20, 0, 33, 66, *(1,) * 12)  # so many users that a block takes all of one
    pairs, choices, offsets, *rest = context_args(counts, 40, 24, 3, "mlp", "self-attention", dtype)
    together = cuda.context(pairs, choices, offsets, *rest)
    bounds = offsets.tolist()
    for user, (begin, end) in enumerate(zip(bounds[:5], bounds[1:6], strict=True)):
        alone = cuda.context(pairs[begin:end], choices[begin:end], torch.tensor([0, end - begin]), *rest)
        assert torch.equal(alone[0], together[user]), "a user's bits depend on the others"


def _nothing(dtype: torch.dtype, emulation: Machine) -> None:
    cuda.film(*film_args(0, 12, dtype))
    cuda.film_norm(*film_norm_args(0, 12, dtype))
    cuda.lora(*lora_args(0, 12, ((3, 7),), dtype))
    assert cuda.context(*context_args((), 4, 16, 4, "mlp", "self-attention", dtype)).shape == (0, 16)


def _slots(dtype: torch.dtype, emulation: Machine) -> None:
    args = normal(19, 6, 4, dtype=dtype).transpose(0, 2), normal(5, 1, dtype=dtype).expand(5, 19)
    _parity(cuda.film, film_reference, (*args, normal(19, 5, dtype=dtype).T, some_slots(4, 5)), emulation)


MANY = tuple((1 + i, 5 + 9 * i) for i in range(9))
# The first take every way through every kernel once; from "film strides" on they are sizes.
RUNS: dict[str, Run] = {
    "film 1": _film(3, 1),
    "film 1030": _film(2, 1030),
    "film 512 dense": _film(2, 512, dense=True),
    "film tokens": _film_tokens,
    "film_norm 130": _film_norm(3, 130),
    "film_norm 520 dense": _film_norm(2, 520, dense=True),
    "film_norm beyond shared memory": _film_norm(1, 24704, dense=True),
    "lora rank 1": _lora(5, 16, ((1, 1),)),
    "lora three": _lora(5, 600, ((16, 70), (1, 64), (20, 9))),
    "lora dense": _lora(17, 576, ((16, 128),), dense=True),
    "lora many rows": _lora(66, 130, ((33, 72),)),
    "lora one gamma": _lora(3, 40, ((4, 24),), beta=False, one_gamma=True),
    "lora alone": _lora_alone,
    "context few": _context("few"),
    "context sampled": _context("sampled"),
    "context mean": _context("mean"),
    "context no pairs": _context("no pairs"),
    "context many": _context("many"),
    "context alone": _context_alone,
    "context_rows sum": _context_rows("sum", 37, torch.bfloat16, noisy=True),
    "context_rows few": _context_rows("few", 72, torch.float16),
    "nothing": _nothing,
    "film strides": _slots,
    "film 111": _film(3, 111),
    "film 3424": _film(2, 3424, dense=True),
    "film 4096": _film(1, 4096, dense=True),
    "film_norm 1": _film_norm(1, 1),
    "film_norm 1030": _film_norm(2, 1030),
    "film_norm 111": _film_norm(3, 111),
    "film_norm 3424": _film_norm(2, 3424),
    "film_norm 4096": _film_norm(1, 4096, dense=True),
    "film_norm beyond, strided": _film_norm(1, 24703),
    "lora five": _lora(2, 40, ((2, 5), (3, 18), (1, 64), (2, 65), (17, 1))),
    "lora nine": _lora(3, 40, MANY),
    "lora high rank": _lora(4, 130, ((130, 48),)),
    "lora of 111": _lora(3, 111, ((7, 33), (16, 111))),
    "lora of 3424": _lora(2, 3424, ((7, 3424),)),
    "lora rank 128": _lora(3, 111, ((128, 111),)),
    "lora rank 512": _lora(2, 64, ((512, 16),), dense=True),
    "lora of 4096": _lora(4, 4096, ((16, 64),), dense=True),
    "lora 257 rows": _lora(257, 111, ((7, 40),)),
    "lora many rows, many ranks": _lora(130, 600, ((48, 130), (3, 8)), dense=True),
    "context full": _context("full"),
    "context one head": _context("one head"),
    "context long": _context("long"),
    "context wide": _context("wide"),
    "context of 111": _context("of 111"),
    "context of 3424": _context("of 3424"),
    "context sum": _context("sum"),
    "context on the chip in part": _context("on the chip in part"),
    "context too wide for the chip": _context("too wide for the chip"),
    "context_rows full": _context_rows("full", 200, torch.float32),
    "context_rows sampled": _context_rows("sampled", 90, noisy=True),
    "context_rows without noise": _context_rows("sampled", 90),
}
CASES = {
    f"{name} {dtype}": (run, DTYPES[dtype]) for name, run in RUNS.items() for dtype in DTYPES
}  # fmt: skip


def main() -> int:
    """The command line; returns 1 where a case failed."""
    emulation: Machine = Device() if sys.argv[1] == "device" else load(sys.argv[1])
    torch.set_num_threads(1)
    failed = 0
    for name in sys.argv[2:]:
        run, dtype = CASES[name]
        torch.manual_seed(0)
        try:
            run(dtype, emulation)
            error = None
        except Exception as exception:
            error = f"{exception!r}\n{traceback.format_exc()}"
            failed += 1
        print(json.dumps([name, error]), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
