"""Calls of the ops past the public functions, each with one argument that is wrong: `python malformed_calls.py`.

Every call has to raise. tests/test_malformed_calls.py runs this in a process of its own, which a call that reads or
writes beyond its tensors may end; under AddressSanitizer it does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from cases import context_args, film_args, film_norm_args, lora_args, normal

from fssa_fast.backends import use_backend
from fssa_fast.generation.sampling import Knobs
from fssa_fast.generation.which_draw import which_draw

ROWS, WIDTH = 6, 40
Call = tuple[str, Callable[[], Any]]

LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "another dtype": lambda t: t.to(torch.float16),
    "another device": lambda t: t.to("meta"),
    "a dimension less": lambda t: t[0],
    "a dimension more": lambda t: t[None],
    "too narrow": lambda t: t[..., : t.shape[-1] // 2],
    "too few rows": lambda t: t[: len(t) // 2],
    "sparse": lambda t: t.to_sparse(),
}
SLOTS: dict[str, Callable[[Any], Any]] = {
    "bytes": lambda t: t.to(torch.uint8),
    "floats": lambda t: t.float(),
    "too few": lambda t: t[:-1],
    "none": lambda t: t[:0],
    "negative": lambda t: t - 10**6,
    "beyond": lambda t: t + 2**31 - 10,
    "another device": lambda t: t.to("meta"),
}


def changed(args: tuple[Any, ...], index: int, change: Callable[[Any], Any], element: int | None = None) -> list[Any]:
    """The arguments with one of them, or one element of it, changed."""
    new = list(args)
    if element is None:
        new[index] = change(new[index])
    else:
        new[index] = [change(t) if i == element else t for i, t in enumerate(new[index])]
    return new


def film_calls() -> Iterator[Call]:
    film, norm = film_args(ROWS, WIDTH, torch.float32), film_norm_args(ROWS, WIDTH, torch.float32)
    grads = normal(ROWS, WIDTH), normal(ROWS, WIDTH)
    ops: dict[str, tuple[tuple[Any, ...], dict[str, int], int]] = {
        "film": (film, {"x": 0, "scale": 1, "shift": 2}, 3),
        "film_norm": (norm, {"residual": 1, "scale": 2, "weight": 5}, 4),
        "film_backward": ((grads[0], *film), {"grad": 0, "scale": 2}, 4),
        "film_norm_backward": ((*grads, *norm), {"grad_hidden": 0, "grad_normed": 1, "residual": 3, "weight": 7}, 6),
    }
    for op, (args, tensors, slots) in ops.items():
        yield from _calls(op, args, tensors, slots)
    yield "film_norm eps", lambda: torch.ops.fssa.film_norm(*norm[:-1], -1.0)


def lora_calls() -> Iterator[Call]:
    args = lora_args(ROWS, WIDTH, ((3, 30), (2, 50)), torch.float32)
    x, ys, a, bs, *rest = args
    for op in ("lora", "lora_"):
        yield from _calls(op, args, {"x": 0, "a": 2, "gamma": 4, "beta": 5}, 6, {"ys": 1, "bs": 3})
    yield from _calls("lora_backward", (ys, x, a, bs, *rest), {"a": 2, "gamma": 4}, 6, {"grads": 0, "bs": 3})
    wide = [y[:, :1].expand(-1, y.shape[1]) for y in ys]
    for name, call in {
        "ys of one element": (x, wide, a, bs, *rest),
        "ys that overlap": (x, [ys[0], torch.zeros(99).as_strided((ROWS, 50), (5, 1))], a, bs, *rest),
        "no projections": (x, [], a, [], *rest),
        "fewer bs": (x, ys, a, bs[:1], *rest),
    }.items():
        yield f"lora_ {name}", lambda call=call: torch.ops.fssa.lora_(*call)
    yield "lora_backward no grads", lambda: torch.ops.fssa.lora_backward([], x, a, bs, *rest)


def context_calls() -> Iterator[Call]:
    args = context_args((3, 0, 5), 12, 16, 4, "mlp", "self-attention", torch.float32, 16)
    pairs, choices, offsets, weights, *_ = args
    bank, slots = normal(7, 20), torch.tensor([4, 0, 2])
    modulation, bias, noise = normal(20, 16), normal(20), normal(3, 16)
    rows = (bank, slots, *args[:4], modulation, bias, None, *args[4:])
    grad = normal(3, 16)
    for op, given, first in (("context", args, 0), ("context_rows_", rows, 2), ("context_backward", (grad, *args), 1)):
        call, kind = getattr(torch.ops.fssa, op), len(given) - 3
        wrong: dict[str, list[Any]] = {
            "pairs narrow": changed(given, first, lambda t: t[..., :3]),
            "pairs of one option": changed(given, first, lambda t: t[:, :1]),
            "choices floats": changed(given, first + 1, lambda t: t.float()),
            "choices few": changed(given, first + 1, lambda t: t[:2]),
            "choices beyond": changed(given, first + 1, lambda t: t + 10**9),
            "offsets none": changed(given, first + 2, lambda t: t[:0]),
            "offsets falling": changed(given, first + 2, lambda t: torch.tensor([0, 90, -7, 8])),
            "offsets beyond": changed(given, first + 2, lambda t: t * 1000),
            "weights few": changed(given, first + 3, lambda w: w[:5]),
            "weights missing": changed(given, first + 3, lambda w: None, 2),
            "weights narrow": changed(given, first + 3, lambda w: w[:, :3], 0),
            "weights of another dtype": changed(given, first + 3, lambda w: w.half(), 8),
            "weights of one dimension": changed(given, first + 3, lambda w: w[0], 10),
            "inner": changed(given, kind, lambda _: "deep"),
            "inner without its weights": changed(given, kind, lambda _: "linear"),
            "pooling": changed(given, kind + 1, lambda _: "max"),
            "no heads": changed(given, kind + 2, lambda _: 0),
            "heads": changed(given, kind + 2, lambda _: -3),
        }
        for name, listed in wrong.items():
            yield f"{op} {name}", lambda call=call, listed=listed: call(*listed)
    yield from _calls("context_rows_", rows, {"modulation": 6}, 1)
    for name, index, change in (
        ("bank of integers", 0, lambda t: t.long()),
        ("bank of one row", 0, lambda t: t[:1].expand(7, 20)),
        ("bank narrow", 0, lambda t: t[:, :5]),
        ("bias short", 7, lambda t: t[:3]),
        ("noise where nothing is sampled", 8, lambda _: noise),
        ("noise short", 8, lambda _: noise[:1]),
    ):
        yield f"context_rows_ {name}", lambda i=index, c=change: torch.ops.fssa.context_rows_(*changed(rows, i, c))
    yield "context_backward grad", lambda: torch.ops.fssa.context_backward(grad[:, :3], *args)


def sample_calls() -> Iterator[Call]:
    with use_backend("cpu"):
        draw, knobs = which_draw(torch.device("cpu")), Knobs.new(ROWS, torch.device("cpu"))
    index = torch.arange(ROWS, dtype=torch.int32)
    args = normal(ROWS, WIDTH), knobs, index, index
    valid = ("another dtype", "too narrow")  # for logits
    wrong = {f"logits: {kind}": (0, change) for kind, change in LAYOUTS.items() if kind not in valid}
    wrong |= {f"rows: {kind}": (2, change) for kind, change in SLOTS.items()}
    wrong |= {f"positions: {kind}": (3, SLOTS[kind]) for kind in ("bytes", "floats", "too few", "another device")}
    for field in fields(Knobs):
        for kind, change in {**LAYOUTS, "apart": lambda t: t.repeat(2)[::2]}.items():
            if kind != "too narrow":  # the same as too few rows
                wrong[f"{field.name}: {kind}"] = 1, lambda k, n=field.name, c=change: replace(k, **{n: c(vars(k)[n])})
    wrong["knobs: on another device"] = 1, lambda _: Knobs.new(ROWS, torch.device("meta"))
    for name, (index_, change) in wrong.items():
        yield f"sample {name}", lambda i=index_, c=change: draw(*changed(args, i, c))


def _calls(
    op: str, args: tuple[Any, ...], tensors: dict[str, int], slots: int, lists: dict[str, int] | None = None
) -> Iterator[Call]:
    call = getattr(torch.ops.fssa, op)
    changes = [(name, i, LAYOUTS, None) for name, i in tensors.items()]
    changes += [(name, i, LAYOUTS, 1) for name, i in (lists or {}).items()]
    for name, index, kinds, element in (*changes, ("slots", slots, SLOTS, None)):
        for kind, change in kinds.items():
            yield f"{op} {name}: {kind}", lambda i=index, c=change, e=element: call(*changed(args, i, c, e))


def main() -> int:
    """Runs all calls; returns 1 where one raised nothing."""
    torch.manual_seed(0)
    calls = [*film_calls(), *lora_calls(), *context_calls(), *sample_calls()]
    taken = []
    for name, call in calls:
        print(name, end=" ", flush=True)
        try:
            call()
        except (ValueError, TypeError, IndexError) as error:
            print(f"{type(error).__name__}: {error}")
        else:
            taken.append(name)
            print("raised nothing")
    print(len(calls), "calls; raised nothing:", taken or "none", flush=True)
    return int(bool(taken))


if __name__ == "__main__":
    sys.exit(main())
