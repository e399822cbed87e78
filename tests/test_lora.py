"""lora and lora_: parity with the definition, gradients, properties, contract, bad input."""

from __future__ import annotations

import pytest
import torch
from cases import (
    backends,
    columns,
    cpu_backends,
    dtypes,
    in_order,
    lora_args,
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
from fssa_fast.ops.lora import lora_backward_reference, lora_reference

lora, lora_ = in_order(ops.lora), in_order(ops.lora_)

# rows, width, then rank and output width of each projection
SHAPES = [
    (1, 1, 1, 1),
    (1, 111, 7, 33),
    (2, 64, 16, 64),
    (5, 111, 1, 111),
    (13, 3424, 16, 111),
    (32, 576, 16, 192, 16, 576, 7, 64),
    (97, 200, 128, 111),
    (257, 48, 7, 50, 1, 3),
    (257, 111, 512, 65),
    (100, 700, 64, 130),
]
FEW = [(3, 33, 7, 20), (5, 40, 16, 33, 1, 8)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def args_of(shape, dtype, **options):
    rows, width, *rest = shape
    return lora_args(rows, width, tuple(zip(rest[::2], rest[1::2], strict=True)), dtype, **options)


@dtypes
@on_backends(SHAPES, FEW)
def test_lora_is_its_definition(backend, shape, dtype):
    args = args_of(shape, dtype)
    with running(backend):
        check_parity(lora(*args), lora_reference, args)


@pytest.mark.parametrize("one_gamma", [False, True], ids=["gamma", "one gamma"])
@pytest.mark.parametrize("beta", [False, True], ids=["no beta", "beta"])
@on_backends(SHAPES[5:7], FEW[:1])
def test_kinds_of_modulation(backend, shape, beta, one_gamma):
    args = args_of(shape, torch.float32, beta=beta, one_gamma=one_gamma)
    with running(backend):
        check_parity(lora(*args), lora_reference, args)


@dtypes
@on_backends(SHAPES[2:6:3], FEW)
def test_in_place_gives_the_same_bits(backend, shape, dtype):
    x, ys, *rest = args_of(shape, dtype)
    before = [y.clone() for y in ys]
    around = [y._base.clone() for y in ys]
    with running(backend):
        new = lora(x, ys, *rest)
        assert all(torch.equal(y, b) for y, b in zip(ys, before, strict=True))
        lora_(x, ys, *rest)
    for y, want, wide in zip(ys, new, around, strict=True):
        assert torch.equal(y, want)
        wide[:, 3 : 3 + y.shape[1]] = want
        assert torch.equal(y._base, wide)  # nothing beside y was written


@dtypes
@on_backends(SHAPES, FEW)
def test_lora_gradients(backend, shape, dtype):
    x, ys, a, bs, gamma, beta, slots, scaling = args_of(shape, dtype)
    grads = [columns(*y.shape, dtype=dtype) for y in ys]
    leaves = [t.detach().requires_grad_() for t in (x, a, gamma, beta, *bs, *ys)]
    count = len(bs)
    with running(backend):
        outputs = lora(leaves[0], leaves[4 + count :], leaves[1], leaves[4 : 4 + count], *leaves[2:4], slots, scaling)
        dx, da, dgamma, dbeta, *rest = torch.autograd.grad(outputs, leaves, grads)
    assert all(torch.equal(dy, grad) for dy, grad in zip(rest[count:], grads, strict=True))
    check_parity(
        [dx, da, rest[:count], dgamma, dbeta],
        lora_backward_reference,
        (grads, x, a, bs, gamma, beta, slots, scaling),
    )


@pytest.mark.parametrize("one_gamma", [False, True], ids=["gamma", "one gamma"])
@on_backends(SHAPES[5:6], FEW[:1])
def test_gradients_without_beta(backend, shape, one_gamma):
    x, ys, a, bs, gamma, _, slots, scaling = args_of(shape, torch.float32, beta=False, one_gamma=one_gamma)
    args = ([torch.randn_like(y) for y in ys], x, a, bs, gamma, None, slots, scaling)
    with running(backend):
        check_parity(torch.ops.fssa.lora_backward(*args), lora_backward_reference, args)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("one_a_token", [False, True], ids=["slot a row", "slot a token"])
def test_three_dimensions(backend, one_a_token):
    _, _, a, bs, gamma, beta, _, scaling = lora_args(1, 21, ((4, 6), (2, 9)), torch.float32)
    x = normal(3, 4, 50)[..., :21]
    ys = [normal(3, 4, 15)[..., :6], normal(4, 3, 9).transpose(0, 1)]  # the second is no matrix with strided rows
    slots = torch.randint(5, (3, 4)) if one_a_token else torch.tensor([4, 0, 4], dtype=torch.int32)
    args = (x, ys, a, bs, gamma, beta, slots, scaling)
    with running(backend):
        new = lora(*args)
        check_parity(new, lora_reference, args)
        lora_(*args)
    assert all(torch.equal(y, want) for y, want in zip(ys, new, strict=True))


@pytest.mark.parametrize("backend", backends())
def test_no_rows(backend):
    x, ys, a, bs, gamma, beta, slots, scaling = lora_args(0, 9, ((2, 3),), torch.float32)
    with running(backend):
        assert lora(x, ys, a, bs, gamma, beta, slots, scaling)[0].shape == (0, 3)
        found = torch.ops.fssa.lora_backward(ys, x, a, bs, gamma, beta, slots, scaling)
    assert not any(g.any() for g in (found[0], found[1], found[2][0], found[3], found[4]))


@dtypes
@pytest.mark.parametrize("backend", backends())
def test_zeros_switch_the_adapter_off(backend, dtype):
    x, ys, a, bs, gamma, beta, slots, scaling = lora_args(9, 37, ((7, 20),), dtype)
    with running(backend):
        (y,) = lora(x, ys, a, bs, torch.zeros_like(gamma), torch.zeros_like(beta), slots, scaling)
    assert torch.equal(y, ys[0])


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 120),
    width=st.integers(8, 300),
    parts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90)), min_size=1, max_size=3),
    beta=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, rows, width, parts, beta, threads, seed):
    torch.manual_seed(seed)
    rows += 64 // min(outputs for _, outputs in parts)  # of few numbers, PyTorch's may all happen to be exact
    args = lora_args(rows, width, tuple(parts), torch.float32, beta=beta)
    torch.set_num_threads(threads)
    try:
        with running(backend):
            check_parity(lora(*args), lora_reference, args)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize(
    ("width", "parts", "mixes"),
    [(111, ((7, 50), (16, 65)), 1000), (700, ((128, 300),), 100)],
    ids=["narrow", "wide"],
)
def test_a_row_does_not_depend_on_its_neighbours(backend, width, parts, mixes):
    x, ys, a, bs, gamma, beta, slots, scaling = lora_args(256, width, parts, torch.float32)
    with running(backend):
        whole = lora(x, ys, a, bs, gamma, beta, slots, scaling)
        try:
            for mix in range(mixes):
                torch.set_num_threads(1 if mixes == 1000 else 1 + mix % 3)
                rows = torch.randperm(256)[: int(torch.randint(1, 257, ()))]
                part = lora(x[rows], [y[rows] for y in ys], a, bs, gamma, beta, slots[rows], scaling)
                assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("backend", one_of_each())
def test_opcheck(backend):
    args = lora_args(3, 10, ((4, 6), (2, 9)), torch.float32)
    grads = [normal(3, 6), normal(3, 9)]
    with running(backend):
        torch.library.opcheck(torch.ops.fssa.lora.default, args)
        torch.library.opcheck(torch.ops.fssa.lora_.default, args)
        if backend != "reference":  # its backward uses autograd, which the checker's own modes keep from recording
            torch.library.opcheck(torch.ops.fssa.lora_backward.default, (grads, args[0], *args[2:]))


def test_compiles_without_a_break():
    x, ys, a, bs, gamma, beta, slots, scaling = lora_args(4, 12, ((3, 6), (2, 9)), torch.float32)

    def added(x, a, gamma, y):
        first, second = lora(x, [y, ys[1]], a, bs, gamma, beta, slots, scaling)
        return first.sum() + second.square().sum()

    compiled = torch.compile(added, fullgraph=True, backend="aot_eager")
    plain = x, a, gamma, ys[0]
    assert torch.equal(compiled(*plain), added(*plain))
    inputs = [t.clone().requires_grad_() for t in plain]
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(added(*inputs), inputs)
    )


def test_in_place_compiles_without_a_break():
    x, ys, *rest = lora_args(4, 12, ((3, 6),), torch.float32)

    def add(x, y):
        y = y * 2
        lora_(x, [y], *rest)
        return y

    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, ys[0]), add(x, ys[0]))


def test_gradcheck():
    x, ys, a, bs, gamma, beta, slots, scaling = lora_args(4, 5, ((2, 3), (1, 4)), torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, *ys, a, *bs, gamma, beta)]

    def call(x, y0, y1, a, b0, b1, gamma, beta):
        return tuple(lora(x, [y0, y1], a, [b0, b1], gamma, beta, slots, scaling))

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs)


def test_in_place_refuses_to_be_differentiated():
    x, ys, *rest = lora_args(4, 5, ((2, 3),), torch.float32)
    with pytest.raises(RuntimeError, match="^lora_: .*not differentiable"):
        lora_(x.requires_grad_(), ys, *rest)


@pytest.mark.parametrize("op", [ops.lora, ops.lora_], ids=["lora", "lora_"])
def test_long_argument_lists_go_by_keyword(op):
    with pytest.raises(TypeError, match="positional"):
        op(*lora_args(4, 5, ((2, 3),), torch.float32))


@pytest.mark.parametrize("backend", one_of_each())
@pytest.mark.parametrize("bad", [-1, 5])
def test_slot_out_of_range_changes_nothing(backend, bad):
    x, ys, a, bs, gamma, beta, slots, scaling = lora_args(6, 8, ((2, 3),), torch.float32)
    slots[5] = bad
    before = ys[0].clone()
    with running(backend):
        for op in (lora, lora_):
            with pytest.raises(IndexError, match=rf"slots: expected values in \[0, 5\), got {bad}"):
                op(x, ys, a, bs, gamma, beta, slots, scaling)
    assert torch.equal(ys[0], before)


NAMES = ("x", "ys", "a", "bs", "gamma", "beta", "slots", "scaling")


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("x", lambda t: t[0], ValueError, "x"),
        ("x", lambda t: t.int(), TypeError, "x"),
        ("ys", lambda t: t[:1], ValueError, "ys, bs"),
        ("ys", lambda t: [t[0], t[1][:2]], ValueError, r"ys\[1\]"),
        ("ys", lambda t: [t[0].half(), t[1]], TypeError, r"ys\[0\]"),
        ("a", lambda t: t[:, 1:], ValueError, "a"),
        ("a", lambda t: t[1:], ValueError, "bs"),
        ("a", lambda t: t.to("meta"), ValueError, "a"),
        ("bs", lambda t: [], ValueError, "ys, bs"),
        ("bs", lambda t: [t[0], t[1][0]], ValueError, r"bs\[1\]"),
        ("bs", lambda t: [t[0].double(), t[1]], TypeError, r"bs\[0\]"),
        ("gamma", lambda t: t[:, 1:], ValueError, "gamma"),
        ("beta", lambda t: t[1:], ValueError, "beta"),
        ("beta", lambda t: t.bfloat16(), TypeError, "beta"),
        ("slots", lambda t: t.bool(), TypeError, "slots"),
        ("slots", lambda t: t[None], ValueError, "slots"),
    ],
)
@pytest.mark.parametrize("op", [ops.lora, ops.lora_], ids=["lora", "lora_"])
def test_bad_input_is_named(op, name, change, error, said):
    args = dict(zip(NAMES, lora_args(6, 8, ((2, 3), (1, 4)), torch.float32), strict=True))
    args[name] = change(args[name])
    with pytest.raises(error, match=f"^{said}: expected"):
        op(**args)
