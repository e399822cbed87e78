"""film and film_norm: parity with the definition, gradients, properties, contract, bad input."""

from __future__ import annotations

import pytest
import torch
from cases import (
    backends,
    cpu_backends,
    dtypes,
    film_args,
    film_norm_args,
    in_order,
    normal,
    on_backends,
    one_of_each,
    running,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import check_parity

from fssa_fast import ops
from fssa_fast.backends import use_backend
from fssa_fast.ops.film import (
    film_backward_reference,
    film_norm_backward_reference,
    film_norm_reference,
    film_reference,
)

film, film_norm = in_order(ops.film), in_order(ops.film_norm)

SHAPES = [(1, 1), (1, 111), (2, 16), (7, 33), (31, 576), (257, 64), (64, 3424)]
FEW = [(1, 111), (5, 33)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@dtypes
@on_backends(SHAPES, FEW)
def test_film_is_its_definition(backend, shape, dtype):
    args = film_args(*shape, dtype)
    with running(backend):
        check_parity(film(*args), film_reference, args)


@dtypes
@on_backends(SHAPES, FEW)
def test_film_norm_is_its_definition(backend, shape, dtype):
    args = film_norm_args(*shape, dtype)
    with running(backend):
        check_parity(film_norm(*args), film_norm_reference, args)


@dtypes
@on_backends(SHAPES, FEW)
def test_film_gradients(backend, shape, dtype):
    x, scale, shift, slots = film_args(*shape, dtype)
    grad = normal(*shape, dtype=dtype)
    inputs = [t.detach().requires_grad_() for t in (x, scale, shift)]
    with running(backend):
        found = torch.autograd.grad(film(*inputs, slots), inputs, grad)
    check_parity(found, film_backward_reference, (grad, x, scale, shift, slots))


@dtypes
@on_backends(SHAPES, FEW)
def test_film_norm_gradients(backend, shape, dtype):
    x, residual, scale, shift, slots, weight, eps = film_norm_args(*shape, dtype)
    grads = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    inputs = [t.detach().requires_grad_() for t in (x, residual, scale, shift, weight)]
    with running(backend):
        outputs = film_norm(*inputs[:4], slots, inputs[4], eps)
        dx, dresidual, *rest = torch.autograd.grad(outputs, inputs, grads)
    assert torch.equal(dx, dresidual)
    args = (*grads, x, residual, scale, shift, slots, weight, eps)
    check_parity([dx, *rest], film_norm_backward_reference, args)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("one_a_token", [False, True], ids=["slot a row", "slot a token"])
def test_three_dimensions(backend, one_a_token):
    wide = normal(3, 4, 50)
    x, residual = wide[..., :21], normal(4, 3, 21).transpose(0, 1)
    scale, shift, weight = normal(6, 21), normal(6, 21), normal(21)
    slots = torch.tensor([5, 0, 5]) if not one_a_token else torch.randint(6, (4, 3), dtype=torch.int32).T
    with running(backend):
        check_parity(film(x, scale, shift, slots), film_reference, (x, scale, shift, slots))
        args = (x, residual, scale, shift, slots, weight, 1e-6)
        check_parity(film_norm(*args), film_norm_reference, args)


@pytest.mark.parametrize("backend", backends())
def test_no_rows(backend):
    x, scale, shift, slots = film_args(0, 9, torch.float32)
    with running(backend):
        assert film(x, scale, shift, slots).shape == (0, 9)
        inputs = [t.detach().requires_grad_() for t in (x, scale, shift)]
        grads = torch.autograd.grad(film(*inputs, slots).sum(), inputs)
    assert [g.shape for g in grads] == [(0, 9), (5, 9), (5, 9)] and not any(g.any() for g in grads)


@dtypes
@pytest.mark.parametrize("backend", backends())
def test_zeros_are_the_identity(backend, dtype):
    x = normal(9, 37, dtype=dtype)
    zeros = torch.zeros(2, 37, dtype=dtype)
    with running(backend):
        assert torch.equal(film(x, zeros, zeros, torch.ones(9, dtype=torch.int32)), x)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_number_survives(backend, dtype):
    """Reading and rounding, over all bit patterns: infinities, subnormals, NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    zeros = torch.zeros(1, 1024, dtype=dtype)
    with running(backend):
        y = film(x, zeros, zeros, torch.zeros(64, dtype=torch.int64))
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounds_to_nearest_even(backend, dtype):
    """Sums of a 16-bit number and half its distance to the next: every one is a tie or close to it."""
    x = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()][:31744].view(-1, 1024)
    steps = (x.view(torch.int16) + 1).view(dtype).float() - x.float()
    shift = (steps / 2).to(dtype)
    zeros, slots = torch.zeros_like(x), torch.arange(x.shape[0])
    with running(backend):
        y = film(x, zeros, shift, slots)
    assert torch.equal(y, (x.float() + shift.float()).to(dtype))


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(8, 300), slots=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape(backend, rows, width, slots, seed):
    torch.manual_seed(seed)
    args = film_norm_args(rows, width, torch.float32, slots)
    grads = normal(rows, width), normal(rows, width)
    with running(backend):
        check_parity(film_norm(*args), film_norm_reference, args)
        check_parity(torch.ops.fssa.film_norm_backward(*grads, *args), film_norm_backward_reference, (*grads, *args))


@pytest.mark.parametrize("backend", cpu_backends())
def test_a_row_does_not_depend_on_its_neighbours(backend):
    x, residual, scale, shift, slots, weight, eps = film_norm_args(256, 333, torch.bfloat16)
    with running(backend):
        whole = film_norm(x, residual, scale, shift, slots, weight, eps)
        for _ in range(1000):
            rows = torch.randperm(256)[: int(torch.randint(1, 257, ()))]
            part = film_norm(x[rows], residual[rows], scale, shift, slots[rows], weight, eps)
            assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])


@pytest.mark.parametrize("backend", one_of_each())
def test_opcheck(backend):
    x, scale, shift, slots = film_args(3, 10, torch.float32)
    norm = film_norm_args(3, 10, torch.float32)
    grads = normal(3, 10), normal(3, 10)
    with running(backend):
        torch.library.opcheck(torch.ops.fssa.film.default, (x, scale, shift, slots))
        torch.library.opcheck(torch.ops.fssa.film_norm.default, norm)
        if backend != "reference":  # its backwards use autograd, which the checker's own modes keep from recording
            torch.library.opcheck(torch.ops.fssa.film_backward.default, (grads[0], x, scale, shift, slots))
            torch.library.opcheck(torch.ops.fssa.film_norm_backward.default, (*grads, *norm))


def test_compiles_without_a_break():
    x, residual, scale, shift, slots, weight, eps = film_norm_args(4, 12, torch.float32)

    def both(x, residual, scale):
        hidden, normed = film_norm(x, residual, scale, shift, slots, weight, eps)
        return film(normed, scale, shift, slots) + hidden

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual, scale), both(x, residual, scale))
    inputs = [t.clone().requires_grad_() for t in (x, residual, scale)]
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(both(*inputs).square().sum(), inputs)
    torch.testing.assert_close(found, want)


def test_gradcheck():
    x, residual, scale, shift, slots, weight, eps = film_norm_args(4, 5, torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, residual, scale, shift, weight)]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, _, scale, shift, __: film(x, scale, shift, slots), inputs)
        assert torch.autograd.gradcheck(
            lambda x, residual, scale, shift, weight: film_norm(x, residual, scale, shift, slots, weight, eps), inputs
        )


@pytest.mark.parametrize("backend", one_of_each())
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_slot_out_of_range(backend, bad):
    x, residual, scale, shift, slots, weight, eps = film_norm_args(6, 8, torch.float32)
    slots[4] = bad
    with running(backend):
        for call in (
            lambda: film(x, scale, shift, slots),
            lambda: film(x, scale, shift, slots.long()),
            lambda: film_norm(x, residual, scale, shift, slots, weight, eps),
        ):
            with pytest.raises(IndexError, match=rf"slots: expected values in \[0, 5\), got {bad}"):
                call()


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("x", lambda t: t[0], ValueError),
        ("x", lambda t: t.long(), TypeError),
        ("residual", lambda t: t[:, :4], ValueError),
        ("residual", lambda t: t.half(), TypeError),
        ("scale", lambda t: t[:, :4], ValueError),
        ("scale", lambda t: t.bfloat16(), TypeError),
        ("scale", lambda t: t.to("meta"), ValueError),
        ("shift", lambda t: t[:2], ValueError),
        ("slots", lambda t: t.float(), TypeError),
        ("slots", lambda t: t[:3], ValueError),
        ("slots", lambda t: t.to("meta"), ValueError),
        ("weight", lambda t: t[:3], ValueError),
        ("weight", lambda t: t.double(), TypeError),
        ("eps", lambda _: 0.0, ValueError),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(name, change, error):
    names = ("x", "residual", "scale", "shift", "slots", "weight", "eps")
    args = dict(zip(names, film_norm_args(6, 8, torch.float32), strict=True))
    args[name] = change(args[name])
    with pytest.raises(error, match=f"^{name}: expected"):
        ops.film_norm(**args)
    if name in ("x", "scale", "shift", "slots"):
        with pytest.raises(error, match=f"^{name}: expected"):
            ops.film(**{key: args[key] for key in ("x", "scale", "shift", "slots")})
