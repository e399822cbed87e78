"""The Triton kernels against the definitions: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from fssa_fast import ops  # noqa: E402
from fssa_fast.backends import BackendError, triton, use_backend  # noqa: E402
from fssa_fast.kernels import configs, lora  # noqa: E402
from fssa_fast.kernels.common import INTERPRETED  # noqa: E402

if DEVICE == "cpu" and not INTERPRETED.value:
    raise RuntimeError("triton was imported before TRITON_INTERPRET=1 could be set: set it in the environment")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


def integers(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high)).to(DEVICE, dtype)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """value with every floating-point tensor changed; tensors may share their gradients' names with None and lists."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, ops.ContextWeights):
        return ops.ContextWeights(*(mapped(v, change) for v in value))
    return [mapped(v, change) for v in value] if isinstance(value, list) else value


def evaluated(op: Callable[..., Any], args: list[Any], backend: str, gradients: bool) -> list[Tensor]:
    """The op's results, and the gradients of all its floating-point arguments, in order."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_(gradients))
        return leaves[-1]

    with use_backend(backend):
        results = op(*mapped(args, leaf))
        results = [results] if isinstance(results, Tensor) else list(results)
        if not gradients:
            return results
        upstream = [random(*result.shape, seed=9).to(torch.float16).to(result.dtype) for result in results]
        found = torch.autograd.grad(results, leaves, upstream)
    return [*(result.detach() for result in results), *found]


def assert_close(got: Sequence[Tensor], low: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Each result's error is at most twice that of the definition in the same dtype, and the rounding of the largest."""
    assert len(got) == len(low) == len(exact)
    for i, (g, e, x) in enumerate(zip(got, low, exact, strict=True)):
        assert g.shape == x.shape and g.dtype == e.dtype, i
        if x.numel():
            error, allowed = (g.double() - x).abs().max(), (e.double() - x).abs().max()
            rounding = torch.finfo(g.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
            allowed = 2 * allowed + rounding * x.abs().max()
            assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


def check(op: Callable[..., Any], args: list[Any], dtype: torch.dtype, gradients: bool = True) -> None:
    """The op by the kernels in dtype, against the definition in dtype and in float64, on the same numbers."""
    low = mapped(args, lambda tensor: tensor.to(dtype))
    exact = mapped(low, lambda tensor: tensor.double())
    assert_close(
        evaluated(op, low, "triton", gradients),
        evaluated(op, low, "reference", gradients),
        evaluated(op, exact, "reference", gradients),
    )


def bank_columns(slots: int, width: int, count: int) -> list[Tensor]:
    """`count` modulations [slots, width], columns of one bank, so that rows are strided and not aligned."""
    bank = random(slots, count * width + 3, scale=0.5)
    return [bank[:, 1 + i * width : 1 + (i + 1) * width] for i in range(count)]


# ---------------------------------------------------------------- film

SLOTS = {"row": integers(5, 4), "token": integers(5, 4, 3, dtype=torch.int64)}


@dtypes
@pytest.mark.parametrize("width", [1, 17, 320, 3001])
@pytest.mark.parametrize("per", ["row", "token"])
def test_film(dtype: torch.dtype, width: int, per: str) -> None:
    check(ops.film, [random(4, 3, width), *bank_columns(5, width, 2), SLOTS[per]], dtype)


@dtypes
@pytest.mark.parametrize("width", [1, 17, 320, 3001])
@pytest.mark.parametrize("per", ["row", "token"])
def test_film_norm(dtype: torch.dtype, width: int, per: str) -> None:
    scale, shift = bank_columns(5, width, 2)
    args = [random(4, 3, width), random(4, 3, width, seed=1), scale, shift, SLOTS[per], random(width), 1e-5]
    check(ops.film_norm, args, dtype)


def test_film_backward_shares_rows_out() -> None:
    """Many rows of few slots, summed by several programs."""
    assert configs.column_tile(300, 20, 2).splits > 1
    scale, shift = bank_columns(2, 20, 2)
    x, slots, weight = random(300, 20), integers(2, 300), random(20)
    check(ops.film, [x, scale, shift, slots], torch.float32)
    check(ops.film_norm, [x, random(300, 20, seed=1), scale, shift, slots, weight, 1e-5], torch.bfloat16)


def test_film_of_zeros_is_the_identity() -> None:
    x, slots = random(7, 33).bfloat16(), integers(2, 7)
    zeros = torch.zeros(2, 33, dtype=torch.bfloat16, device=DEVICE)
    with use_backend("triton"):
        assert torch.equal(ops.film(x, zeros, zeros, slots), x)
        hidden, _ = ops.film_norm(x, x, zeros, zeros, slots, zeros[0] + 1, 1e-6)
    assert torch.equal(hidden, x + x)


def test_film_takes_any_strides() -> None:
    x, wide = random(19, 6, 4).transpose(0, 2), random(5, 1).expand(5, 19)
    check(ops.film, [x, wide, random(19, 5).T, integers(5, 4)], torch.float32, gradients=False)


# ---------------------------------------------------------------- lora

LORA_CASES = {
    "one": (67, [3], [33]),
    "rank 1": (16, [1], [1]),
    "three": (1100, [16, 1, 20], [70, 64, 9]),
    "five": (40, [2, 3, 1, 2, 17], [5, 18, 64, 65, 1]),
    "high rank": (130, [130], [48]),
}


def lora_args(case: str, rows: Sequence[int], slots: Tensor) -> list[Any]:
    width, ranks, widths = LORA_CASES[case]
    gamma, beta = bank_columns(5, sum(ranks), 2)
    return [
        random(*rows, width),
        [random(*rows, out) for out in widths],
        random(sum(ranks), width, scale=width**-0.5),
        [random(rank, out, seed=i) for i, (rank, out) in enumerate(zip(ranks, widths, strict=True))],
        gamma,
        beta,
        slots,
        0.7,
    ]


@dtypes
@pytest.mark.parametrize("case", LORA_CASES)
@pytest.mark.parametrize("per", ["row", "token"])
def test_lora(dtype: torch.dtype, case: str, per: str) -> None:
    check(ops.lora, lora_args(case, (4, 3), SLOTS[per]), dtype)


@dtypes
def test_lora_of_one_strength_a_user(dtype: torch.dtype) -> None:
    args = lora_args("three", (9,), integers(5, 9))
    strength = random(5, 1)

    def plain(x: Tensor, ys: list[Tensor], a: Tensor, bs: list[Tensor], gamma: Tensor, slots: Tensor) -> list[Tensor]:
        return ops.lora(x, ys, a, bs, gamma.expand(5, a.shape[0]), None, slots, 1.5)

    check(plain, [*args[:4], strength, args[6]], dtype)


@pytest.mark.parametrize("layout", ["contiguous", "slices", "uneven"])
def test_lora_in_place(layout: str) -> None:
    args = lora_args("three", (6, 4), integers(5, 6))
    widths = [y.shape[-1] for y in args[1]]
    if layout == "slices":
        args[1] = list(random(6, 4, sum(widths)).split(widths, -1))
    elif layout == "uneven":
        args[1] = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in args[1]]
    with use_backend("triton"):
        expected = ops.lora(*args)
        ops.lora_(*args)
    for y, new in zip(args[1], expected, strict=True):
        assert torch.equal(y, new)


def test_lora_backward_shares_rows_out() -> None:
    assert configs.column_tile(300, 3, 5).splits > 1
    check(ops.lora, lora_args("one", (300,), integers(5, 300)), torch.float32)


def test_lora_joins_splits_with_the_same_bits() -> None:
    """Many rows sum the splits of D in one program, few in several: no row may tell the difference."""
    x, a = random(70, 1100).bfloat16(), random(20, 1100).bfloat16()
    apart = lora._shrink(x, a)
    joined = lora._shrink(x, a, torch.empty(70, 20, device=DEVICE))
    assert apart.shape[0] == 2 and joined.shape[0] == 1
    assert torch.equal((0 + apart[0]) + apart[1], joined[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    args = mapped(lora_args("three", (70,), integers(5, 70)), lambda tensor: tensor.to(dtype))
    with use_backend("triton"):
        together = ops.lora(*args)
        for rows in (slice(0, 1), slice(5, 22), slice(69, 70)):
            x, ys, *shared, slots, scaling = args
            alone = ops.lora(x[rows], [y[rows] for y in ys], *shared, slots[rows], scaling)
            for a, t in zip(alone, together, strict=True):
                assert torch.equal(a, t[rows])


# ---------------------------------------------------------------- context

CONTEXT_CASES = {  # inner, pooling, E, H, heads, Z, pairs of each user
    "few": ("linear", "self-attention", 7, 24, 3, 24, [3, 0, 1, 20, 5]),
    "long": ("mlp", "self-attention", 20, 40, 2, 80, [130, 0, 64, 65]),
    "one head": ("linear", "self-attention", 33, 100, 1, 100, [5, 66]),
    "mean": ("mlp", "mean", 9, 18, 1, 18, [3, 0, 80]),
    "sum": ("linear", "sum", 5, 33, 1, 66, [0, 2, 130]),
    "nobody": ("linear", "self-attention", 4, 16, 4, 16, []),
    "no pairs": ("mlp", "self-attention", 4, 16, 4, 16, [0, 0]),
}


def context_args(case: str) -> tuple[list[Any], dict[str, Any]]:
    inner, pooling, embedding, width, heads, encoded, counts = CONTEXT_CASES[case]

    def linear(out: int, depth: int, used: bool = True) -> list[Tensor | None]:
        return [random(out, depth, scale=depth**-0.5), random(out)] if used else [None, None]

    attention = pooling == "self-attention"
    weights = ops.ContextWeights(
        *linear(width, 2 * embedding), *linear(width, width, inner == "mlp"), *linear(3 * width, width, attention),
        *linear(width, width, attention), *linear(width, width), *linear(encoded, width),
    )  # fmt: skip
    offsets = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    pairs, choices = random(sum(counts), 2, embedding), integers(2, sum(counts), dtype=torch.int64)
    return [pairs, choices, offsets, weights], {"inner": inner, "pooling": pooling, "heads": heads}


@dtypes
@pytest.mark.parametrize("case", CONTEXT_CASES)
def test_context(dtype: torch.dtype, case: str) -> None:
    args, kind = context_args(case)
    users = len(args[2]) - 1  # with none, the definition has nothing to differentiate
    check(lambda *args: ops.context(*args, **kind), args, dtype, gradients=users > 0)


@dtypes
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16], ids=["float32 bank", "bfloat16 bank"])
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "noise"])
@pytest.mark.parametrize("case", ["few", "sum"])
def test_context_rows(dtype: torch.dtype, bank_dtype: torch.dtype, noisy: bool, case: str) -> None:
    args, kind = context_args(case)
    width, users = args[3].inner0.shape[0], len(args[2]) - 1
    modulation, bias = random(37, width, scale=width**-0.5), random(37)
    noise = random(users, width) if noisy else None
    slots = torch.arange(users, device=DEVICE).flip(0) + 1

    def rows(*args: Any) -> list[Tensor]:
        exact = args[0].dtype == torch.float64
        bank = torch.full((users + 2, 43), 3.0, dtype=torch.float64 if exact else bank_dtype, device=DEVICE)
        latents = ops.context_rows_(bank[:, 2:39], slots, *args, **kind)
        assert (bank[:, :2] == 3).all() and (bank[:, 39:] == 3).all() and (bank[0] == 3).all()
        return [bank, latents]

    check(rows, [*args, modulation, bias, noise], dtype, gradients=False)


def test_context_of_a_user_does_not_depend_on_the_others() -> None:
    for case in ("few", "long"):
        (pairs, choices, offsets, weights), kind = context_args(case)
        with use_backend("triton"):
            together = ops.context(pairs, choices, offsets, weights, **kind)
            for u, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
                own = torch.tensor([0, end - begin], device=DEVICE)
                alone = ops.context(pairs[begin:end], choices[begin:end], own, weights, **kind)
                assert torch.equal(alone[0], together[u])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32], ids=str)
def test_context_takes_any_integers_as_choices(dtype: torch.dtype) -> None:
    (pairs, choices, offsets, weights), kind = context_args("few")
    with use_backend("triton"):
        expected = ops.context(pairs, choices, offsets, weights, **kind)
        assert torch.equal(ops.context(pairs, choices.to(dtype), offsets, weights, **kind), expected)


# ---------------------------------------------------------------- the backend


def test_every_op_is_implemented() -> None:
    names = {"film", "film_norm", "lora", "context"}
    assert set(triton.IMPLEMENTATIONS) == names | {f"{n}_backward" for n in names} | {"lora_", "context_rows_"}


def test_no_rows() -> None:
    x, slots = random(0, 12), integers(5, 0)
    scale, shift = bank_columns(5, 12, 2)
    check(ops.film, [x, scale, shift, slots], torch.float32)
    check(ops.film_norm, [x, x, scale, shift, slots, random(12), 1e-5], torch.float32)
    check(ops.lora, lora_args("one", (0,), slots), torch.float32)


def test_float64_is_refused_by_name_and_left_to_the_definition() -> None:
    x, slots = random(2, 8).double(), integers(1, 2)
    zeros = torch.zeros(1, 8, dtype=torch.float64, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendError, match="float64"):
        ops.film(x, zeros, zeros, slots)
    assert torch.equal(ops.film(x, zeros, zeros, slots), x)

    args, kind = context_args("few")
    args = mapped(args, lambda tensor: tensor.double())
    width, users = args[3].inner0.shape[0], len(args[2]) - 1
    modulation = [random(8, width).double(), random(8).double()]
    bank, slots = torch.zeros(users, 8, device=DEVICE), torch.arange(users, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendError, match="float64"):
        ops.context_rows_(bank, slots, *args, *modulation, **kind)
    assert not bank.any()
    ops.context_rows_(bank, slots, *args, *modulation, **kind)
    assert bank.any()


def test_a_norm_too_wide_is_refused() -> None:
    x = torch.empty(1, configs.WIDEST_NORM + 1, device=DEVICE)
    assert "wider" in str(triton.refuses("film_norm", x))
    assert triton.refuses("film", x) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's values are not read")
def test_interpreted_values_are_checked() -> None:
    scale, shift = bank_columns(5, 8, 2)
    lora_arguments = lora_args("one", (3,), torch.tensor([0, 5, 1]))
    (pairs, choices, offsets, weights), kind = context_args("few")
    with use_backend("triton"):
        with pytest.raises(IndexError, match="slots"):
            ops.film(random(2, 8), scale, shift, torch.tensor([0, -1]))
        with pytest.raises(IndexError, match="slots"):
            ops.lora(*lora_arguments)
        with pytest.raises(ValueError, match="choices"):
            ops.context(pairs, choices + 1, offsets, weights, **kind)
        with pytest.raises(ValueError, match="offsets"):
            ops.context(pairs, choices, offsets + 1, weights, **kind)
