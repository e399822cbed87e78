"""The ops inside torch.autocast and torch.func's transforms, as somebody's own model calls them."""

from __future__ import annotations

import pytest
import torch
from cases import context_args, normal

from fssa_fast.arguments import ContextWeights
from fssa_fast.backends import use_backend
from fssa_fast.nn import ContextEncoder
from fssa_fast.ops import context, film, film_norm, lora

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
SLOTS = torch.tensor([1, 0, 2])


def adapter() -> dict[str, torch.Tensor]:
    return {"a": normal(4, 8), "b": normal(4, 6), "gamma": normal(3, 4), "beta": normal(3, 4)}


def adapted(x: torch.Tensor, y: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b, gamma, beta = given.values()
    (out,) = lora(x, [y], a=a, bs=[b], gamma=gamma, beta=beta, slots=SLOTS.to(x.device), scaling=0.5)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(device, backend):
    """As torch's own: products in autocast's dtype, elementwise ops in the widest, sums over choices in float32."""
    linear = torch.nn.Linear(8, 6).to(device)
    x, given = normal(3, 8).to(device), {name: t.to(device).requires_grad_() for name, t in adapter().items()}
    scale, shift = normal(3, 6).to(device), normal(3, 6).to(device)
    slots, weight = SLOTS.to(device), torch.ones(6, device=device)
    encoder = ContextEncoder(5, 16).to(device)
    pairs, choices, offsets = (t.to(device) for t in (normal(4, 2, 5), torch.zeros(4).long(), torch.tensor([0, 1, 4])))
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        y = linear(x)
        out = adapted(x, y, given)
        modulated = film(out, scale=scale, shift=shift, slots=slots)
        hidden, normed = film_norm(out, scale, scale=scale, shift=shift, slots=slots, weight=weight, eps=1e-5)
        latents = encoder(pairs.bfloat16(), choices, offsets)
        (out.sum() + modulated.sum() + hidden.sum() + normed.sum() + latents.sum()).backward()
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {t.dtype for t in (modulated, hidden, normed, latents)} == {torch.float32}
    bf16 = {name: t.detach().bfloat16() for name, t in given.items()}
    with use_backend(backend):
        assert torch.equal(out, adapted(x.bfloat16(), y, bf16))
    for t in (*given.values(), linear.weight, *encoder.parameters()):
        assert t.grad is not None and t.grad.dtype == torch.float32


def test_vmap_over_examples_equals_one_by_one():
    given, xs, ys = adapter(), normal(5, 3, 8), normal(5, 3, 6)
    mapped = torch.func.vmap(lambda x, y: adapted(x, y, given))(xs, ys)
    assert torch.equal(mapped, torch.stack([adapted(x, y, given) for x, y in zip(xs, ys, strict=True)]))

    tables = normal(3, 6, 5)  # mapped over their last dimension
    mapped = torch.func.vmap(lambda x, t: film(x, scale=t, shift=t, slots=SLOTS), in_dims=(0, 2))(ys, tables)
    each = [film(y, scale=t, shift=t, slots=SLOTS) for y, t in zip(ys, tables.unbind(2), strict=True)]
    assert torch.equal(mapped, torch.stack(each))

    pairs, choices, offsets, weights, *kind = context_args((3, 0), 6, 8, 2, "mlp", "mean", torch.float32)
    options = dict(zip(("inner", "pooling", "heads"), kind, strict=True))
    many = torch.stack([pairs, pairs + 1])
    mapped = torch.func.vmap(lambda p: context(p, choices, offsets, ContextWeights(*weights), **options))(many)
    assert torch.equal(mapped[1], context(pairs + 1, choices, offsets, ContextWeights(*weights), **options))


def test_gradients_of_every_example():
    """torch.func's recipe: vmap over grad."""
    given, xs, ys = adapter(), normal(5, 3, 8), normal(5, 3, 6)

    def loss(given: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = adapted(x, y, given)
        return film(out, scale=out.detach(), shift=out.detach(), slots=SLOTS).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(given, xs, ys)
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        found = torch.autograd.grad(loss(leaves, x, y), list(leaves.values()))
        for name, gradient in zip(leaves, found, strict=True):
            torch.testing.assert_close(mapped[name][i], gradient)


def test_autocast_in_a_compiled_function():
    given = adapter()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return adapted(x, y, given)

    out = step(normal(3, 8), normal(3, 6))
    assert out.dtype == torch.bfloat16
