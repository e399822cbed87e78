"""context and context_rows_: parity with the definition, gradients, properties, contract, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import backends, context_args, cpu_backends, dtypes, normal, on_backends, one_of_each, running
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import check_parity, flat

from fssa_fast.backends import use_backend
from fssa_fast.ops import ContextWeights, context, context_rows_
from fssa_fast.ops.context import (
    INNER,
    POOLING,
    context_backward_reference,
    context_reference,
    context_rows_reference_,
)

KINDS = list(itertools.product(INNER, POOLING))
kinds = pytest.mark.parametrize(("inner", "pooling"), KINDS, ids=["-".join(kind) for kind in KINDS])

# pairs of each user; E, H, heads, Z
SHAPES = [
    ((1,), 1, 8, 8, 8),
    ((0, 3, 1, 0, 17), 33, 40, 5, 80),
    ((10,) * 8, 48, 64, 8, 64),
    ((2, 70), 111, 24, 3, 48),
    ((5, 1), 700, 16, 1, 16),
]
FEW = [((0, 3, 1), 12, 16, 2, 32)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def args_of(shape, inner, pooling, dtype):
    counts, embedding, latent, heads, encoded = shape
    return context_args(counts, embedding, latent, heads, inner, pooling, dtype, encoded)


def encode(args):
    pairs, choices, offsets, weights, inner, pooling, heads = args
    return context(pairs, choices, offsets, ContextWeights(*weights), inner=inner, pooling=pooling, heads=heads)


def rows_args(args, bank_dtype=None, noise=True, width=29):
    """bank, slots, modulation, bias and noise for a call of context."""
    pairs, _, offsets, weights, *_ = args
    users, latent, dtype = offsets.shape[0] - 1, weights[0].shape[0], pairs.dtype
    bank = normal(users + 4, width + 6, dtype=bank_dtype or dtype)[:, 2 : 2 + width]
    slots = torch.randperm(users + 4)[:users].int()
    modulation, bias = normal(width, latent, dtype=dtype, scale=latent**-0.5), normal(width, dtype=dtype)
    return bank, slots, modulation, bias, normal(users, latent, dtype=dtype) if noise else None


def write_rows(bank, slots, args, modulation, bias, noise):
    pairs, choices, offsets, weights, inner, pooling, heads = args
    return context_rows_(
        bank, slots, pairs, choices, offsets, ContextWeights(*weights), modulation=modulation, modulation_bias=bias,
        noise=noise, inner=inner, pooling=pooling, heads=heads,
    )  # fmt: skip


@dtypes
@kinds
@on_backends(SHAPES, FEW)
def test_context_is_its_definition(backend, shape, inner, pooling, dtype):
    args = args_of(shape, inner, pooling, dtype)
    with running(backend):
        check_parity(encode(args), context_reference, args)


@dtypes
@kinds
@on_backends(SHAPES, FEW)
def test_context_gradients(backend, shape, inner, pooling, dtype):
    args = args_of(shape, inner, pooling, dtype)
    pairs, choices, offsets, weights, *kind = args
    grad = normal(offsets.shape[0] - 1, weights[-2].shape[0], dtype=dtype)
    leaves = [w if w is None else w.detach().requires_grad_() for w in (pairs, *weights)]
    inputs = [leaf for leaf in leaves if leaf is not None]
    with running(backend):
        found = torch.autograd.grad(encode((leaves[0], choices, offsets, leaves[1:], *kind)), inputs, grad)
    check_parity(found, context_backward_reference, (grad, *args))


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
@on_backends(SHAPES[1:2], FEW)
def test_rows_are_their_definition(backend, shape, inner, pooling, bank_dtype):
    args = args_of(shape, inner, pooling, torch.float32)
    bank, slots, modulation, bias, noise = rows_args(args, bank_dtype)
    for given_noise in (noise, None):
        if args[3][-2].shape[0] == modulation.shape[1]:
            given_noise = None

        def definition(bank, *rest):
            table = bank.clone()
            return [context_rows_reference_(table, *rest), table]

        pairs, choices, offsets, weights, *kind = args
        call = (slots, pairs, choices, offsets, weights, modulation, bias, given_noise, *kind)
        table = bank._base.clone()[:, 2 : 2 + bank.shape[1]]
        with running(backend):
            latents = write_rows(table, slots, args, modulation, bias, given_noise)
        check_parity([latents, table], definition, (bank, *call))
        untouched = torch.ones(bank.shape[0], dtype=torch.bool)
        untouched[slots.long()] = False
        assert torch.equal(table[untouched], bank[untouched])
        assert torch.equal(table._base[:, :2], bank._base[:, :2])


@pytest.mark.parametrize("backend", backends())
def test_no_users_and_no_pairs(backend):
    pairs, choices, offsets, weights, *kind = context_args((0, 0), 6, 8, 2, "mlp", "self-attention", torch.float32)
    with running(backend):
        assert encode((pairs, choices, offsets[:1], weights, *kind)).shape == (0, 8)
        empty = encode((pairs, choices, offsets, weights, *kind))
    w = ContextWeights(*weights)
    prior = torch.nn.functional.linear(w.outer0_bias.relu(), w.outer1, w.outer1_bias)
    torch.testing.assert_close(empty, prior.expand(2, -1))


@pytest.mark.parametrize("integers", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", backends())
def test_integers_of_any_kind(backend, integers):
    args = args_of(FEW[0], "linear", "self-attention", torch.float32)
    pairs, choices, offsets, weights, *kind = args
    with running(backend):
        want = encode(args)
        assert torch.equal(encode((pairs, choices.to(integers), offsets.int(), weights, *kind)), want)


@pytest.mark.parametrize("backend", cpu_backends())
def test_strided_inputs(backend):
    args = args_of(SHAPES[2], "mlp", "self-attention", torch.float32)
    pairs, choices, offsets, weights, *kind = args
    wide = torch.stack([pairs, pairs], -1)[..., 0]
    strided = [w if w is None else torch.stack([w, w], -1)[..., 0] for w in weights]
    with running(backend):
        want = encode(args)
        assert torch.equal(encode((wide, choices.repeat_interleave(2)[::2], offsets, strided, *kind)), want)


@kinds
@pytest.mark.parametrize("backend", backends())
def test_order_of_the_pairs_does_not_matter(backend, inner, pooling):
    args = context_args((6,), 12, 16, 2, inner, pooling, torch.float32)
    pairs, choices, *rest = args
    order = torch.randperm(6)
    with running(backend):
        torch.testing.assert_close(encode((pairs[order], choices[order], *rest)), encode(args))


@kinds
@pytest.mark.parametrize("backend", backends())
def test_order_of_the_options_does_not_matter(backend, inner, pooling):
    args = context_args((3, 4), 12, 16, 2, inner, pooling, torch.float32)
    pairs, choices, *rest = args
    with running(backend):
        assert torch.equal(encode((pairs.flip(1), 1 - choices, *rest)), encode(args))


@kinds
@pytest.mark.parametrize("backend", cpu_backends())
def test_a_user_does_not_depend_on_the_others(backend, inner, pooling):
    counts = tuple(int(n) for n in torch.randint(0, 9, (64,)))
    args = context_args(counts, 40, 48, 4, inner, pooling, torch.float32)
    pairs, choices, offsets, *rest = args
    spans = [torch.arange(int(a), int(b)) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    with running(backend):
        whole = encode(args)
        try:
            for mix in range(1000 // len(KINDS) + 1):
                torch.set_num_threads(1 + mix % 10 // 9)
                users = torch.randperm(64)[: int(torch.randint(1, 65, ()))].tolist()
                rows = torch.cat([spans[user] for user in users])
                ends = torch.tensor([0, *(len(spans[user]) for user in users)]).cumsum(0)
                assert torch.equal(encode((pairs[rows], choices[rows], ends, *rest)), whole[users])
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("kind", [("mlp", "self-attention"), ("linear", "mean")], ids="-".join)
@pytest.mark.parametrize("backend", cpu_backends())
def test_many_users_are_taken_some_at_a_time(backend, kind):
    """More pairs than are held at once, a user of more than that, and more users than are held at once."""
    args = context_args((700,) * 5 + (2500, 0, 3) + (1,) * 600, 5, 16, 2, *kind, torch.float32)
    pairs, choices, offsets, *rest = args
    with running(backend):
        whole = encode(args)
        for user in (0, 4, 5, 6, 7, 300, 607):
            begin, end = offsets[user : user + 2].tolist()
            alone = encode((pairs[begin:end], choices[begin:end], torch.tensor([0, end - begin]), *rest))
            assert torch.equal(alone[0], whole[user])
    check_parity(whole, context_reference, args)


@pytest.mark.parametrize("backend", cpu_backends())
@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    embedding=st.integers(1, 70),
    heads=st.integers(1, 5),
    width=st.integers(8, 24),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, counts, embedding, heads, width, kind, seed):
    torch.manual_seed(seed)
    counts = [*counts, *[7] * 8]  # of few numbers, PyTorch's may all happen to be exact
    args = context_args(tuple(counts), embedding, heads * width, heads, *kind, torch.float32)
    with running(backend):
        check_parity(encode(args), context_reference, args)


@pytest.mark.parametrize("backend", one_of_each())
def test_opcheck(backend):
    args = args_of(FEW[0], "mlp", "self-attention", torch.float32)
    bank, slots, modulation, bias, noise = rows_args(args)
    pairs, choices, offsets, weights, *kind = args
    with running(backend):
        torch.library.opcheck(torch.ops.fssa.context.default, args)
        if backend != "reference":  # its backward uses autograd, which the checker's own modes keep from recording
            torch.library.opcheck(torch.ops.fssa.context_backward.default, (normal(3, 32), *args))
        torch.library.opcheck(
            torch.ops.fssa.context_rows_.default,
            (bank, slots, pairs, choices, offsets, weights, modulation, bias, noise, *kind),
        )


def test_compiles_without_a_break():
    args = args_of(FEW[0], "mlp", "self-attention", torch.float32)
    pairs, choices, offsets, weights, *kind = args

    def encoded(pairs, first):
        return encode((pairs, choices, offsets, [first, *weights[1:]], *kind)).square()

    compiled = torch.compile(encoded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pairs, weights[0]), encoded(pairs, weights[0]))
    inputs = [pairs.clone().requires_grad_(), weights[0].clone().requires_grad_()]
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(encoded(*inputs).sum(), inputs))


@kinds
def test_gradcheck(inner, pooling):
    pairs, choices, offsets, weights, *kind = context_args((2, 0, 3), 3, 4, 2, inner, pooling, torch.float64)
    present = [w is not None for w in weights]
    inputs = [t.clone().requires_grad_() for t in (pairs, *(w for w in weights if w is not None))]

    def call(pairs, *given):
        rest = iter(given)
        return encode((pairs, choices, offsets, [next(rest) if there else None for there in present], *kind))

    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs)


def test_rows_refuse_to_be_differentiated():
    args = args_of(FEW[0], "linear", "sum", torch.float32)
    bank, slots, modulation, bias, noise = rows_args(args)
    with pytest.raises(RuntimeError, match="^context_rows_: .*not differentiable"):
        write_rows(bank, slots, args, modulation.requires_grad_(), bias, noise)


@pytest.mark.parametrize("backend", cpu_backends())
def test_a_nan_among_scores_overflows_no_exponent(backend):
    """The largest score is lost at a NaN, and those before it then exceed it: UndefinedBehaviorSanitizer watches."""
    pairs, *rest = context_args((100,), 8, 16, 2, "linear", "self-attention", torch.float32)
    pairs = pairs * torch.linspace(1000, 1, 100)[:, None, None]
    pairs[50] = torch.nan
    with running(backend):
        assert encode((pairs, *rest)).isnan().all()


@pytest.mark.parametrize("backend", one_of_each())
def test_bad_values_are_named_and_change_nothing(backend):
    args = args_of(FEW[0], "linear", "self-attention", torch.float32)
    pairs, choices, offsets, *rest = args
    bank, slots, modulation, bias, noise = rows_args(args)
    before = bank.clone()
    wrong = choices.clone()
    wrong[2] = 2
    cases = [
        (ValueError, "choices: expected 0 or 1, got 2", wrong, offsets, slots),
        (ValueError, "choices: expected 0 or 1, got -1", torch.full_like(choices, -1), offsets, slots),
        (ValueError, "offsets: expected to rise", choices, torch.tensor([0, 3, 1, 4]), slots),
        (ValueError, "offsets: expected to rise", choices, torch.tensor([0, 1, 2, 3]), slots),
        (ValueError, "offsets: expected to rise", choices, torch.tensor([1, 1, 2, 4]), slots),
    ]
    with running(backend):
        for error, message, bad_choices, bad_offsets, _ in cases:
            with pytest.raises(error, match=message):
                encode((pairs, bad_choices, bad_offsets, *rest))
        for bad in (-1, bank.shape[0]):
            bad_slots = slots.clone()
            bad_slots[1] = bad
            cases.append((IndexError, rf"slots: expected values in \[0, 7\), got {bad}", choices, offsets, bad_slots))
        for error, message, bad_choices, bad_offsets, bad_slots in cases:
            with pytest.raises(error, match=message):
                write_rows(bank, bad_slots, (pairs, bad_choices, bad_offsets, *rest), modulation, bias, noise)
    assert torch.equal(bank, before)


def swapped(index, change):
    def apply(weights):
        return [change(w) if i == index else w for i, w in enumerate(weights)]

    return apply


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("pairs", lambda t: t[:, 0], ValueError, "pairs"),
        ("pairs", lambda t: t.long(), TypeError, "pairs"),
        ("choices", lambda t: t.float(), ValueError, "choices"),
        ("choices", lambda t: t[:2], ValueError, "choices"),
        ("offsets", lambda t: t.float(), ValueError, "offsets"),
        ("offsets", lambda t: t[:0], ValueError, "offsets"),
        ("weights", swapped(0, lambda w: w[:, 1:]), ValueError, "weights.inner0"),
        ("weights", swapped(1, lambda w: w.half()), TypeError, "weights.inner0_bias"),
        ("weights", swapped(2, lambda w: None), ValueError, "weights.inner1"),
        ("weights", swapped(6, lambda w: w.T[:3]), ValueError, "weights.out"),
        ("weights", swapped(10, lambda w: w.to("meta")), ValueError, "weights.outer1"),
        ("inner", lambda _: "deep", ValueError, "inner"),
        ("pooling", lambda _: "max", ValueError, "pooling"),
        ("heads", lambda _: 3, ValueError, "heads"),
        ("heads", lambda _: 0, ValueError, "heads"),
    ],
)
def test_bad_input_is_named(name, change, error, said):
    names = ("pairs", "choices", "offsets", "weights", "inner", "pooling", "heads")
    args = dict(zip(names, args_of(FEW[0], "mlp", "self-attention", torch.float32), strict=True))
    args[name] = change(args[name])
    with pytest.raises(error, match=f"^{said}: expected"):
        encode(args.values())


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("bank", lambda t: t[0], ValueError),
        ("bank", lambda t: t.int(), TypeError),
        ("slots", lambda t: t[1:], ValueError),
        ("slots", lambda t: t.float(), TypeError),
        ("modulation", lambda t: t[1:], ValueError),
        ("modulation", lambda t: t.double(), TypeError),
        ("modulation_bias", lambda t: t[1:], ValueError),
        ("noise", lambda t: t[1:], ValueError),
    ],
)
def test_bad_rows_input_is_named(name, change, error):
    args = args_of(FEW[0], "linear", "sum", torch.float32)
    rest = dict(zip(("bank", "slots", "modulation", "modulation_bias", "noise"), rows_args(args), strict=True))
    rest[name] = change(rest[name])
    with pytest.raises(error, match=f"^({name}|bank): expected|^modulation"):
        write_rows(rest.pop("bank"), rest.pop("slots"), args, *rest.values())


def test_flat_finds_every_tensor():
    a, b = torch.ones(1), torch.ones(2)
    assert [t.shape for t in flat([a, (b, [a]), None])] == [(1,), (2,), (1,)]
