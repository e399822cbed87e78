"""The calls of the ops that the GPU kernels are judged by: three decode and two prefill sizes, bfloat16.

Tensors are made on torch's default device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPE = torch.bfloat16


class Case(NamedTuple):
    """A call of an op, and the least it can do."""

    name: str
    op: str
    args: tuple[Any, ...]
    fewest: int  # bytes
    needed: int  # multiply-adds


def size(*tensors: Tensor | None) -> int:
    """Bytes of all of these."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of the dtype judged by."""
    return (scale * torch.randn(*shape)).to(DTYPE)


SIZES = {
    "decode, 1 row": 1,
    "decode, 8 rows": 8,
    "decode, 64 rows": 64,
    "prefill, 256 rows": 256,
    "prefill, 1024 rows": 1024,
}
USERS = 64
LATENT = 256


def users_of(rows: int) -> tuple[int, Tensor]:
    """How many users the rows have, and each row's slot: in decode a user a row, in prefill a few users' tokens."""
    users = min(rows, USERS) if rows <= 64 else 4
    return users, torch.arange(rows, dtype=torch.int32) * users // rows


def film_cases(width: int = 4096) -> Iterator[Case]:
    """film and film_norm; in prefill a few users' tokens, in decode a user a row."""
    for name, rows in SIZES.items():
        users, slots = users_of(rows)
        bank = normal(USERS, 2 * width, scale=0.1)
        x, residual, weight = normal(rows, width), normal(rows, width), normal(width)
        modulation = (bank[:, :width], bank[:, width:], slots)
        rest = 2 * users * width * 2 + size(slots)
        yield Case(f"{name}, D {width}", "film", (x, *modulation), 2 * size(x) + rest, 0)
        normed = (x, residual, *modulation, weight, 1e-5)
        yield Case(f"{name}, D {width}", "film_norm", normed, 4 * size(x) + rest + size(weight), 0)


def lora_cases(width: int = 4096) -> Iterator[Case]:
    """lora_ of q and v projections with grouped heads."""
    ranks, outputs = (16, 16), (width, width // 4)
    for name, rows in SIZES.items():
        users, slots = users_of(rows)
        x, ys = normal(rows, width), [normal(rows, out) for out in outputs]
        a, bs = normal(sum(ranks), width), [normal(r, out) for r, out in zip(ranks, outputs, strict=True)]
        gamma, beta = normal(USERS, sum(ranks)), normal(USERS, sum(ranks))
        fewest = size(x, a, *bs, slots) + 2 * size(*ys) + 2 * users * sum(ranks) * 2
        needed = rows * (width * sum(ranks) + sum(r * out for r, out in zip(ranks, outputs, strict=True)))
        yield Case(f"{name}, D {width}, R 16 + 16", "lora_", (x, ys, a, bs, gamma, beta, slots, 1.0), fewest, needed)


class Encoder(NamedTuple):
    """Users of equally many pairs, and a context encoder of theirs: linear inner encoder, attention."""

    name: str
    data: Tensor  # [N, 2, E]
    choices: Tensor
    offsets: Tensor
    weights: list[Tensor | None]
    latent: int
    needed: int  # multiply-adds


def context_encoders() -> Iterator[Encoder]:
    """Decode sizes: few choices; prefill sizes: many users at once, and one of many choices."""
    for name, users, pairs, embedding, latent in (
        ("1 user of 10", 1, 10, 4096, LATENT),
        ("1 user of 64", 1, 64, 4096, LATENT),
        ("8 users of 10", 8, 10, 1024, LATENT),
        ("8 users of 10, H 1024", 8, 10, 1024, 1024),
        ("64 users of 10", 64, 10, 384, LATENT),
        ("32 users of 64", 32, 64, 384, LATENT),
        ("1 user of 512", 1, 512, 4096, LATENT),
    ):
        shapes = [(latent, 2 * embedding), (3 * latent, latent), (latent, latent), (latent, latent), (latent, latent)]
        first, qkv, out, outer0, outer1 = [(normal(o, i, scale=i**-0.5), normal(o)) for o, i in shapes]
        weights = [*first, None, None, *qkv, *out, *outer0, *outer1]
        data = normal(users * pairs, 2, embedding)
        choices = torch.randint(2, (users * pairs,))
        offsets = torch.arange(users + 1) * pairs
        needed = users * (pairs * latent * 2 * embedding + pairs * 2 * latent * latent + 4 * latent * latent)
        yield Encoder(f"{name}, E {embedding}", data, choices, offsets, weights, latent, needed)


def context_cases(heads: int = 8, columns: int = 8192) -> Iterator[Case]:
    """context_rows_."""
    for name, data, choices, offsets, weights, latent, needed in context_encoders():
        users = len(offsets) - 1
        modulation, bias, bank = normal(columns, latent, scale=0.06), normal(columns), normal(users, columns)
        slots = torch.arange(users, dtype=torch.int32)
        args = (
            bank, slots, data, choices, offsets, weights, modulation, bias, None, "linear", "self-attention", heads
        )  # fmt: skip
        fewest = size(data, choices, offsets, slots, *weights, modulation, bias, bank) + users * latent * 2
        yield Case(f"{name}, M {columns}", "context_rows_", args, fewest, needed + users * columns * latent)


CASES: dict[str, Callable[[], Iterator[Case]]] = {"film": film_cases, "lora": lora_cases, "context": context_cases}
