"""The Triton kernels: on a GPU, or in Triton's interpreter where there is none.

The tests of the ops run them too, on a few shapes; these are the shapes that take every way through the kernels, and
what the kernels alone promise. FSSA_PROOF=1 adds sizes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    columns,
    context_args,
    dtypes,
    film_args,
    film_norm_args,
    lora_args,
    normal,
    planted,
    some_slots,
    unwritten_is_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaving import interleaved
from tolerances import check_parity
from torch import Tensor

from fssa_fast.backends import BackendError, load_backend, use_backend
from fssa_fast.ops.context import context_backward_reference, context_reference, context_rows_reference_
from fssa_fast.ops.film import (
    film_backward_reference,
    film_norm_backward_reference,
    film_norm_reference,
    film_reference,
)
from fssa_fast.ops.lora import lora_backward_reference, lora_reference

triton, reason = load_backend("triton")
if triton is None:
    pytest.skip(f"the Triton backend cannot run here: {reason}", allow_module_level=True)

from fssa_fast.kernels import configs, context, lora  # noqa: E402  (needs triton)

PROOF = os.environ.get("FSSA_PROOF") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the order of a GPU's programs is its own")
DEFINITIONS = {
    "film": film_reference,
    "film_backward": film_backward_reference,
    "film_norm": film_norm_reference,
    "film_norm_backward": film_norm_backward_reference,
    "lora": lora_reference,
    "lora_backward": lora_backward_reference,
    "context": context_reference,
    "context_backward": context_backward_reference,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def here(value: Any) -> Any:
    """The arguments on the device under test, with their strides."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value) if (
            DEVICE == "cuda" and 0 not in value.stride()
        ) else value.to(DEVICE)  # fmt: skip
    return type(value)(map(here, value)) if isinstance(value, (list, tuple)) else value


def run(op: str, *args: Any) -> Any:
    """The op by its kernels."""
    with use_backend("triton"), unwritten_is_nan():
        return getattr(torch.ops.fssa, op)(*args)


def check(op: str, *args: Any) -> None:
    """The op by its kernels is the op by its definition."""
    args = here(args)
    check_parity(run(op, *args), DEFINITIONS[op], args)


# ---------------------------------------------------------------- film

rows_and_slots = pytest.mark.parametrize(("rows", "slots"), [(6, 3), (200, 1)], ids=["few rows", "rows shared out"])
widths = pytest.mark.parametrize("width", [1, 130, 1030, *((17, 111, 576, 989, 3424, 4096) if PROOF else ())])


@dtypes
@widths
def test_film(dtype, width):
    x, scale, shift, slots = film_args(3, width, dtype)
    check("film", x, scale, shift, slots)
    check("film", x[:, None].expand(3, 2, width), scale, shift, slots.long()[:, None].expand(3, 2))


@dtypes
@widths
def test_film_norm(dtype, width):
    check("film_norm", *film_norm_args(3, width, dtype))


@dtypes
@rows_and_slots
def test_film_backward(dtype, rows, slots):
    assert (configs.column_tile(rows, 130, slots).splits > 1) == (rows == 200)
    check("film_backward", normal(rows, 130, dtype=dtype), *film_args(rows, 130, dtype, slots))


@dtypes
@rows_and_slots
def test_film_norm_backward(dtype, rows, slots):
    grads = normal(rows, 130, dtype=dtype), normal(rows, 130, dtype=dtype)
    check("film_norm_backward", *grads, *film_norm_args(rows, 130, dtype, slots))


def test_film_backward_by_row_of_tokens():
    x, scale, shift, slots = film_args(4, 12, torch.float32)
    x = x[:, None] * normal(4, 7, 12)
    check("film_backward", normal(4, 7, 12), x, scale, shift, slots)


def test_film_takes_any_strides():
    check("film", normal(19, 6, 4).transpose(0, 2), normal(5, 1).expand(5, 19), normal(19, 5).T, some_slots(4, 5))


def test_film_norm_gives_the_norm_of_the_hidden_it_gives():
    """So that a row without a modulation has the bits of the base model's own add and norm."""
    x, residual, scale, shift, slots, weight, eps = here(film_norm_args(9, 40, torch.bfloat16))
    hidden, normed = run("film_norm", x, residual, scale * 0, shift * 0, slots, weight, eps)
    assert torch.equal(hidden, residual + x)
    exact = hidden.double() * torch.rsqrt(hidden.double().square().mean(-1, keepdim=True) + eps) * weight
    assert ((normed - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps).all()


# ---------------------------------------------------------------- lora

PARTS = {
    "rank 1": (16, ((1, 1),)),
    "three": (1100, ((16, 70), (1, 64), (20, 9))),
    "five": (40, ((2, 5), (3, 18), (1, 64), (2, 65), (17, 1))),
    "high rank": (130, ((130, 48),)),
}
if PROOF:
    PARTS |= {
        "two of one width": (576, ((16, 576), (16, 192))),
        "wide": (4096, ((8, 1024),)),
        "odd": (989, ((7, 111), (33, 989))),
        "wide outputs": (111, ((64, 4100),)),
        "rank 512": (64, ((512, 64),)),
        "rank 128": (111, ((128, 111),)),
        "of 3424": (3424, ((7, 33), (1, 3424))),
    }


@dtypes
@pytest.mark.parametrize("case", PARTS)
def test_lora(dtype, case):
    check("lora", *lora_args(5, *PARTS[case], dtype))


@dtypes
@pytest.mark.parametrize("rows", [65, *((257,) if PROOF else ())])
def test_lora_of_many_rows(dtype, rows):
    check("lora", *lora_args(rows, 111, ((7, 33), (16, 111)), dtype))


@dtypes
def test_lora_of_one_strength_a_user(dtype):
    check("lora", *lora_args(5, *PARTS["three"], dtype, beta=False, one_gamma=True))


@dtypes
@pytest.mark.parametrize("case", PARTS)
def test_lora_backward(dtype, case):
    _, ys, *rest = lora_args(5, *PARTS[case], dtype)
    grads = [normal(*y.shape, dtype=dtype) for y in ys]
    check("lora_backward", grads, _, *rest)


@dtypes
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no beta"])
def test_lora_backward_shares_rows_out(dtype, beta):
    assert configs.column_tile(200, 3, 5).splits > 1
    x, _, *rest = lora_args(200, 20, ((3, 7),), dtype, beta=beta, one_gamma=not beta)
    check("lora_backward", [normal(200, 7, dtype=dtype)], x, *rest)


def test_lora_by_row_of_tokens():
    x, ys, *rest, slots, scaling = lora_args(4, 20, ((3, 7), (2, 8)), torch.float32)
    x, ys = x[:, None] * normal(4, 5, 20), [y[:, None] * normal(4, 5, 1) for y in ys]
    check("lora", x, ys, *rest, slots, scaling)
    check("lora_backward", ys, x, *rest, slots, scaling)
    check("lora", x, ys, *rest, torch.randint(5, (4, 5)), scaling)


@pytest.mark.parametrize("layout", ["contiguous", "slices of one", "uneven rows"])
def test_lora_in_place(layout):
    x, ys, *rest, slots, scaling = lora_args(4, *PARTS["three"], torch.float32)
    x = x[:, None].expand(4, 3, -1).contiguous()
    ys = [y[:, None] * normal(4, 3, 1) for y in ys]
    if layout == "slices of one":
        ys = list(torch.cat(ys, -1).split([y.shape[-1] for y in ys], -1))
    elif layout == "uneven rows":
        ys = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in ys]
    x, ys, rest, slots = here((x, ys, rest, slots))
    expected = run("lora", x, ys, *rest, slots, scaling)
    run("lora_", x, ys, *rest, slots, scaling)
    assert all(torch.equal(y, new) for y, new in zip(ys, expected, strict=True))


@dtypes
def test_lora_splits_joined_or_apart_give_the_same_bits(dtype):
    """Many rows sum the splits of D in one program, few in several: no row may tell the difference."""
    x, a = here((columns(40, 1100, dtype), columns(20, 1100, dtype)))
    apart = lora._shrink(x, a)
    joined = lora._shrink(x, a, torch.empty(40, 20, device=DEVICE))
    assert apart.shape[0] == 2 and joined.shape[0] == 1
    assert torch.equal(apart[0] + apart[1], joined[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_rows_do_not_depend_on_their_batch(dtype):
    """Across the heights of tiles, too."""
    x, ys, *shared, slots, scaling = here(lora_args(70, *PARTS["three"], dtype))
    heights = {configs.expand_tile(rows, 70, 20, dtype).rows for rows in (1, 70)}
    heights |= {configs.shrink_tile(rows, 1100, 37, dtype).rows for rows in (1, 70)}
    assert len(heights) > 1
    together = run("lora", x, ys, *shared, slots, scaling)
    for rows in (slice(0, 1), slice(5, 22), slice(69, 70)):
        alone = run("lora", x[rows], [y[rows] for y in ys], *shared, slots[rows], scaling)
        assert all(torch.equal(a, t[rows]) for a, t in zip(alone, together, strict=True))


# ---------------------------------------------------------------- context

# pairs of each user; E, H, heads, inner, pooling, Z. Up to 64 pairs are few
CONTEXTS = {
    "few": ((3, 0, 1, 20, 5), 7, 24, 3, "linear", "self-attention", 24),
    "long": ((66, 0, 64, 65), 20, 40, 2, "mlp", "self-attention", 80),
    "one deep head": ((5, 3), 33, 100, 1, "linear", "self-attention", 100),
    "mean": ((3, 0, 70), 9, 18, 1, "mlp", "mean", 18),
    "sum": ((0, 2, 70), 5, 33, 1, "linear", "sum", 66),
    "no pairs": ((0, 0), 4, 16, 4, "mlp", "self-attention", 16),
}
if PROOF:
    CONTEXTS |= {
        "minilm": ((10, 1, 7), 384, 256, 8, "linear", "self-attention", 256),
        "sampled": ((17, 0, 33), 111, 64, 8, "mlp", "self-attention", 128),
        "wide": ((3, 70), 9, 300, 3, "mlp", "self-attention", 300),
        "longer": ((130, 3), 17, 48, 3, "linear", "self-attention", 48),
        "one wide head": ((4, 2), 24, 130, 1, "mlp", "self-attention", 130),
        "mean, linear": ((1, 65), 33, 17, 1, "linear", "mean", 34),
        "of 3424": ((2, 1), 3424, 24, 2, "linear", "self-attention", 24),
    }
contexts = pytest.mark.parametrize("case", CONTEXTS)


def arguments(case: str, dtype: torch.dtype) -> tuple[Any, ...]:
    *shape, encoded = CONTEXTS[case]
    return context_args(*shape, dtype, encoded)


@dtypes
@contexts
def test_context(dtype, case):
    check("context", *arguments(case, dtype))


@dtypes
@contexts
def test_context_backward(dtype, case):
    args = arguments(case, dtype)
    check("context_backward", normal(len(args[2]) - 1, CONTEXTS[case][-1], dtype=dtype), *args)


def test_context_of_nobody():
    args = here(context_args((), 4, 16, 4, "mlp", "self-attention", torch.float32))
    assert run("context", *args).shape == (0, 16)
    dpairs, gradients = run("context_backward", torch.empty(0, 16, device=DEVICE), *args)
    assert dpairs.shape == (0, 2, 4) and not any(gradient.any() for gradient in gradients)


@dtypes
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16], ids=["float32 bank", "bfloat16 bank"])
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "noise"])
def test_context_rows(dtype, bank_dtype, noisy):
    *encoder, inner, pooling, heads = arguments("sum", dtype)
    noise = normal(3, 33, dtype=dtype, scale=8.0) if noisy else None
    modulation = columns(37, 33, dtype, 33**-0.5), normal(37, dtype=dtype)
    slots, encoder, modulation, noise = here((torch.tensor([4, 1, 2]), encoder, modulation, noise))

    def rows(op: Any, *args: Any) -> list[Tensor]:
        exact = args[0].dtype == torch.float64
        bank = torch.full((5, 43), 3.0, dtype=torch.float64 if exact else bank_dtype, device=DEVICE)
        latents = op(bank[:, 2:39], slots, *args, inner, pooling, heads)
        assert (bank[:, :2] == 3).all() and (bank[:, 39:] == 3).all() and (bank[[0, 3]] == 3).all()
        return [bank, latents]

    args = (*encoder, *modulation, noise)
    with use_backend("triton"), unwritten_is_nan():
        got = rows(torch.ops.fssa.context_rows_, *args)
    check_parity(got, lambda *args: rows(context_rows_reference_, *args), args)


def test_noise_reaches_every_latent():
    """Of a width that takes more than one stretch of a vector."""
    *encoder, inner, pooling, heads = context_args((2, 66), 5, 300, 1, "linear", "mean", torch.float32, 600)
    args = here((*encoder, columns(9, 300, torch.float32), normal(9), normal(2, 300, scale=8.0)))
    bank, slots = here((torch.zeros(3, 9), torch.tensor([2, 0])))

    def latents(op: Any, *args: Any) -> list[Tensor]:
        return [op(bank.to(args[0].dtype), slots, *args, inner, pooling, heads)]

    with use_backend("triton"), unwritten_is_nan():
        got = latents(torch.ops.fssa.context_rows_, *args)
    check_parity(got, lambda *args: latents(context_rows_reference_, *args), args)


@pytest.mark.parametrize("case", ["few", "long"])
def test_context_of_a_user_does_not_depend_on_the_others(case):
    pairs, choices, offsets, *rest = here(arguments(case, torch.float32))
    together = run("context", pairs, choices, offsets, *rest)
    bounds = offsets.tolist()
    for user, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own = torch.tensor([0, end - begin], device=DEVICE)
        alone = run("context", pairs[begin:end], choices[begin:end], own, *rest)
        assert torch.equal(alone[0], together[user])


@settings(max_examples=60 if PROOF else 15, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 16, 17, 31, 63, 64, 65, 66, 96, 129, 193]), min_size=1, max_size=6),
    st.sampled_from(["self-attention", "sum"]),
)
def test_every_pair_counts_once(sizes, pooling):
    """Wherever users begin and end in the windows of the packed order."""
    check("context", *context_args(tuple(sizes), 3, 8, 2, "linear", pooling, torch.bfloat16))


def test_context_takes_any_integers():
    pairs, choices, offsets, *rest = here(arguments("few", torch.float32))
    expected = run("context", pairs, choices, offsets, *rest)
    for dtype in (torch.bool, torch.uint8, torch.int32):
        assert torch.equal(run("context", pairs, choices.to(dtype), offsets.int(), *rest), expected)


# ---------------------------------------------------------------- what is planted is found

FAULTS = {
    "a column short": ("film", "inside = d < width\n", "inside = d < width - 1\n", "film"),
    "a sum begun anew": ("film", "dscale += tl.sum(grad * x, 0)", "dscale = tl.sum(grad * x, 0)", "film_backward"),
    "a split of the wrong columns": ("lora", "start = split * chunk", "start = 0 * chunk", "lora"),
    "padding of few pairs that takes part": (
        "context_few", "tl.where(met[:, None], p / tl.sum(p, 1)[:, None], 0.0)", "p / tl.sum(p, 1)[:, None]", "context",
    ),
    "padding of many pairs that takes part": (
        "context_many", "tl.where(asks[:, None], mixed / total[:, None], 0.0)", "mixed / total[:, None]", "context",
    ),
    "padding of queries that takes part": (
        "context_backward", "tl.where((query < last)[None, :], tl.exp2(score - norm[None, :]), 0.0)",
        "tl.exp2(score - norm[None, :])", "context_backward",
    ),
}  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, old: str, new: str) -> Any:
    """The kernels' module of that name with `old` replaced; where context uses parts of it, it uses these."""
    faulty = planted(folder, Path(configs.__file__).with_name(f"{name}.py"), old, new)
    for part in {"pool_few", "take_turn"} & faulty.__dict__.keys():
        monkeypatch.setattr(context, part, getattr(faulty, part))
    return faulty


@pytest.mark.proof
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(tmp_path, monkeypatch, fault):
    """The same calls pass as the kernels are, and fail with the fault."""
    name, old, new, op = FAULTS[fault]
    long = arguments("long", torch.float32)
    args = {
        "film": lambda: film_args(3, 130, torch.float32),
        "film_backward": lambda: (normal(40, 17), *film_args(40, 17, torch.float32, 1)),
        "lora": lambda: lora_args(5, *PARTS["three"], torch.float32),
        "context": lambda: arguments("few", torch.float32) if name == "context_few" else long,
        "context_backward": lambda: (normal(len(long[2]) - 1, CONTEXTS["long"][-1]), *long),
    }[op]()
    check(op, *args)
    faulty = plant(monkeypatch, tmp_path, name, old, new)
    with unwritten_is_nan(), pytest.raises(AssertionError, match="allowed"):
        check_parity(getattr(faulty, op, context.context)(*here(args)), DEFINITIONS[op], here(args))


# ---------------------------------------------------------------- programs that wait for each other

RACES = {
    "a turn that does not wait": ("_wait(arrived, tl.cdiv(count, MANY.rows))", "pass"),
    "a turn that waits for too few": ("_wait(arrived, tl.cdiv(count, MANY.rows))", "_wait(arrived, 1)"),
    "parts that are not waited for": ("== tl.cdiv(count, MANY.pairs) * attending - 1", "== 0"),
}


@pytest.mark.proof
@interpreted
@pytest.mark.parametrize("case", ["long", "mean", "sum"])
@pytest.mark.parametrize("resident", [1, 3, 1000])
def test_programs_may_run_in_any_order(case, resident):
    """However few of them fit the chip at once, and wherever they are held up: the same bits."""
    args = arguments(case, torch.float32)
    expected = run("context", *args)
    for seed in range(3):
        with interleaved(seed, resident):
            assert torch.equal(run("context", *args), expected)


@pytest.mark.proof
@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what was read too soon
@pytest.mark.parametrize("race", RACES)
def test_a_planted_race_is_caught(tmp_path, monkeypatch, race):
    args = arguments("long", torch.float32)
    expected = run("context", *args)
    plant(monkeypatch, tmp_path, "context_many", *RACES[race])
    got = []
    for seed in range(3):
        with interleaved(seed, 1000):
            got.append(run("context", *args))
    assert not any(torch.equal(found, expected) for found in got)


# ---------------------------------------------------------------- the backend


def test_every_op_is_implemented():
    assert set(triton.IMPLEMENTATIONS) == {*DEFINITIONS, "lora_", "context_rows_"}


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        (None, "triton could not be imported"),
        ("3.5.1", "expected version 3.6 or newer, got 3.5.1"),
        ("9.0.0", "triton 9.0.0 does not take the kernels, which were tested with 3.6 to 3"),
    ],
    ids=["missing", "too old", "too new"],
)
def test_a_triton_that_is_missing_or_unfit_is_explained(version, complaint):
    """In a process where it seems to be another: the registry tells, and runs the next backend."""
    program = (
        "import sys, types, torch\n"
        "fake = types.ModuleType('triton')\n"
        f"fake.__version__ = {version!r}\n"
        f"sys.modules['triton'] = fake if {version!r} else None\n"
        "from fssa_fast.backends import load_backend\n"
        "from fssa_fast.ops import film\n"
        "x = torch.zeros(1, 4)\n"
        "film(x, scale=x, shift=x, slots=torch.zeros(1, dtype=torch.int32))\n"
        "print(load_backend('triton')[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert complaint in done.stdout


def test_no_rows():
    x, scale, shift, slots = film_args(0, 12, torch.float32)
    check("film", x, scale, shift, slots)
    check("film_backward", x, x, scale, shift, slots)
    check("film_norm", x, x, scale, shift, slots, normal(12), 1e-5)
    check("film_norm_backward", x, x, x, x, scale, shift, slots, normal(12), 1e-5)
    x, ys, *rest = lora_args(0, 12, ((3, 7),), torch.float32)
    check("lora", x, ys, *rest)
    check("lora_backward", ys, x, *rest)


def test_float64_is_refused_by_name_and_left_to_the_definition():
    args = here(film_args(3, 8, torch.float64))
    with pytest.raises(BackendError, match="float64"):
        run("film", *args)
    *encoder, inner, pooling, heads = arguments("few", torch.float64)
    modulation = columns(8, 24, torch.float64), normal(8, dtype=torch.float64)
    bank, slots, encoder, modulation = here((torch.zeros(5, 8), torch.arange(5), encoder, modulation))
    args = (bank, slots, *encoder, *modulation, None, inner, pooling, heads)
    with pytest.raises(BackendError, match="float64"):
        run("context_rows_", *args)
    assert not bank.any()
    assert not triton.prefers("context_rows_", args)


def test_a_norm_too_wide_is_refused():
    x = torch.empty(1, configs.WIDEST_NORM + 1, device=DEVICE)
    assert "wider" in triton.refuses("film_norm", x)
    assert triton.refuses("film", x) is None


@pytest.mark.skipif(DEVICE == "cuda", reason="the values on a GPU are not read")
def test_values_are_checked_where_that_is_free():
    x, scale, shift, _ = film_args(2, 8, torch.float32)
    with pytest.raises(IndexError, match="slots"):
        run("film", x, scale, shift, torch.tensor([0, -1]))
    *args, _, scaling = lora_args(2, 8, ((2, 3),), torch.float32)
    with pytest.raises(IndexError, match="slots"):
        run("lora", *args, torch.tensor([0, 5]), scaling)
    pairs, choices, offsets, *rest = arguments("few", torch.float32)
    with pytest.raises(ValueError, match="choices"):
        run("context", pairs, choices + 1, offsets, *rest)
    with pytest.raises(ValueError, match="offsets"):
        run("context", pairs, choices, offsets + 1, *rest)
