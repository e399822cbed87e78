"""Arguments of the ops for tests, and the backends that the tests run on."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fssa_fast.backends import load_backend, use_backend
from fssa_fast.ops import ContextWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def cpu_backends() -> list[str]:
    """The native CPU backend, an entry for each instruction set of this machine."""
    cpu, _ = load_backend("cpu")
    return [] if cpu is None else [f"cpu-{isa}" for isa in cpu.supported_isas()]


def backends() -> list[str]:
    """Every backend that runs here on CPU tensors: those of the CPU, and Triton where it interprets its kernels."""
    triton, _ = load_backend("triton")
    return cpu_backends() + (["triton"] if triton is not None and not torch.cuda.is_available() else [])


def one_of_each() -> list[str]:
    """The definitions and the backends, each once: for what does not depend on the instruction set."""
    return ["reference", *cpu_backends()[-1:], *(name for name in backends() if not name.startswith("cpu"))]


def planted(folder: Path, source: Path, old: str, new: str) -> ModuleType:
    """A module like the one in `source`, with `old` replaced; its text is kept in the folder."""
    text = source.read_text()
    assert old in text
    (folder / "planted.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", folder / "planted.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """New memory is full of NaN: what an op leaves unwritten is found, and is never an earlier result of it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # whose `fill_uninitialized_memory` does it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Runs the ops of this block on one of `backends()`, or on the definitions ("reference")."""
    name, _, isa = backend.partition("-")
    cpu, _ = load_backend("cpu")
    before = cpu.isa() if isa else None
    try:
        if isa:
            cpu.set_isa(isa)
        with use_backend(name), unwritten_is_nan():
            yield
    finally:
        if isa:
            cpu.set_isa(before)


def on_backends(many: Iterable[Any], few: Iterable[Any], name: str = "shape") -> pytest.MarkDecorator:
    """Parametrises `backend` and `name`: all cases for native backends, `few` for the interpreter, which is slow."""
    rows = []
    for backend in backends():
        for case in few if backend == "triton" else many:
            label = "x".join(map(str, case)) if isinstance(case, tuple) else str(case)
            rows.append(pytest.param(backend, case, id=f"{backend}-{label}"))
    return pytest.mark.parametrize(("backend", name), rows)


def in_order(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op by arguments in the order of its definition, as the tuples below hold them: most of them go by keyword."""
    names = tuple(inspect.signature(op).parameters)
    return lambda *args: op(**dict(zip(names, args, strict=True)))


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random numbers that do not depend on the dtype but for its rounding."""
    return (scale * torch.randn(*shape)).to(dtype)


def columns(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A matrix whose rows are strided: columns of a wider one, as a bank's are."""
    return normal(rows, width + 5, dtype=dtype, scale=scale)[:, 3 : 3 + width]


def some_slots(rows: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Slots for rows, repeated and out of order."""
    return torch.randint(count, (rows,), dtype=dtype)


def film_args(rows: int, width: int, dtype: torch.dtype, slots: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, scale, shift and slots of film, all strided."""
    x = columns(rows, width, dtype)
    return x, columns(slots, width, dtype), columns(slots, width, dtype), some_slots(rows, slots)


def film_norm_args(rows: int, width: int, dtype: torch.dtype, slots: int = 5) -> tuple[Any, ...]:
    """The arguments of film_norm."""
    x, scale, shift, which = film_args(rows, width, dtype, slots)
    return x, columns(rows, width, dtype), scale, shift, which, normal(width, dtype=dtype), 1e-5


def lora_args(
    rows: int,
    width: int,
    parts: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    slots: int = 5,
    beta: bool = True,
    one_gamma: bool = False,
) -> tuple[Any, ...]:
    """The arguments of lora; parts are (rank, output width) of each projection."""
    rank = sum(r for r, _ in parts)
    gamma = columns(slots, 1, dtype).expand(-1, rank) if one_gamma else columns(slots, rank, dtype)
    return (
        columns(rows, width, dtype),
        [columns(rows, out, dtype) for _, out in parts],
        columns(rank, width, dtype, width**-0.5),
        [columns(r, out, dtype, r**-0.5) for r, out in parts],
        gamma,
        columns(slots, rank, dtype) if beta else None,
        some_slots(rows, slots, torch.int64),
        0.5,
    )


def encoder_weights(
    embedding: int, latent: int, encoded: int, inner: str, pooling: str, dtype: torch.dtype
) -> ContextWeights:
    """Random weights of a context encoder."""

    def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
        return normal(out, width, dtype=dtype, scale=width**-0.5), normal(out, dtype=dtype, scale=0.3)

    nothing = (None, None)
    return ContextWeights(
        *linear(latent, 2 * embedding),
        *(linear(latent, latent) if inner == "mlp" else nothing),
        *(linear(3 * latent, latent) if pooling == "self-attention" else nothing),
        *(linear(latent, latent) if pooling == "self-attention" else nothing),
        *linear(latent, latent),
        *linear(encoded, latent),
    )


def context_args(
    counts: tuple[int, ...],
    embedding: int,
    latent: int,
    heads: int,
    inner: str,
    pooling: str,
    dtype: torch.dtype,
    encoded: int | None = None,
) -> tuple[Any, ...]:
    """The arguments of torch.ops.fssa.context, for users with so many pairs each."""
    weights = encoder_weights(embedding, latent, encoded or latent, inner, pooling, dtype)
    total = sum(counts)
    offsets = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
    pairs, choices = normal(total, 2, embedding, dtype=dtype), torch.randint(2, (total,))
    return pairs, choices, offsets, list(weights), inner, pooling, heads
