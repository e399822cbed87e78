"""What users cost, at rest and when they change: python -m bench.users

An encoder of 256-wide latents from 384-wide embeddings, and rows as wide as SmolLM2-135M's with film on every block and
rank-16 adapters on q and v. Measured: adding a user; adding a choice, exactly and incrementally, against encoding all
of them again; bytes a user at rest, where options are shared and where every user has options of their own; and how
long it takes to fetch a user, from the store alone and into the bank.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import compare, machine, pretty
from fssa_fast import Choice, TextEmbedder
from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.users import SqliteStore, StoredUsers
from fssa_fast.users.bank import Bank
from fssa_fast.users.growing import GrowingContext
from fssa_fast.users.store import Change, Option, StoredUser
from fssa_fast.users.stored_users import encoder_fingerprint

EMBEDDING, LATENT, WIDTH = 384, 256, 30 * (2 * 576 + 4 * 16)


class Steering:
    """What users need of a policy, without the model."""

    embedder: TextEmbedder | None = None

    def __init__(self, capacity: int) -> None:
        torch.manual_seed(0)
        self.encoder = ContextEncoder(EMBEDDING, LATENT).eval()
        self.modulator = Modulator(LATENT, WIDTH, std=0.05)
        self.bank = Bank(WIDTH, WIDTH, capacity, torch.float32, torch.device("cpu"))


def choices_of(count: int, seed: int) -> list[Choice]:
    """Choices between random embeddings."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Choice(torch.randn(EMBEDDING, generator=draw), torch.randn(EMBEDDING, generator=draw)) for _ in range(count)
    ]


def pairs_of(choices: list[Choice]) -> Tensor:
    """Their embeddings [K, 2, E]."""
    return torch.stack([torch.stack([torch.as_tensor(c.chosen), torch.as_tensor(c.rejected)]) for c in choices])


@torch.no_grad()
def additions(count: int, rounds: int) -> dict[str, Any]:
    """One choice more for a user of `count`: incrementally, and by encoding all again; latents alone."""
    encoder = Steering(1).encoder
    pairs = pairs_of(choices_of(count + 1, 1))
    sides, offsets = torch.zeros(count + 1, dtype=torch.long), torch.tensor([0, count + 1])
    growing = GrowingContext(encoder)
    growing.append(pairs[:count])
    growing.append(pairs[count:])
    difference = (growing.latent() - encoder.latents(pairs, sides, offsets)[0]).abs().max().item()
    scale = growing.latent().abs().max().item()
    new = pairs[count:]

    def grow() -> Tensor:
        growing.count = count  # an addition to as many choices every time
        growing.append(new)
        return growing.latent()

    timings = compare({"add": grow, "encode": lambda: encoder.latents(pairs, sides, offsets)}, rounds=rounds)
    return {
        "measure": "add_choice",
        "choices": count,
        "ms_incremental": 1e3 * timings["add"].median,
        "ms_encode_again": 1e3 * timings["encode"].median,
        "times_cheaper": timings["encode"].median / timings["add"].median,
        "largest_difference": difference,
        "largest_latent": scale,
    }


def changes(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Adding users and choices as callers do it: encoding, row, and a transaction on disk."""
    steering = Steering(64)
    users = StoredUsers(steering, SqliteStore(folder / "changes.db"))
    numbers = iter(range(10**9))
    own, one = choices_of(10, 2), choices_of(1, 3)
    users.add("grown", choices_of(1000, 4))
    users.add_choices("grown", one)
    sides: dict[str, Callable[[], Any]] = {
        "add a user of 10 choices": lambda: users.add(f"user{next(numbers)}", own),
        "add a choice to one of 1,000": lambda: users.add_choices("grown", one),
    }
    for name, timing in compare(sides, rounds=rounds, seconds=5).items():
        yield {"measure": name, "ms": 1e3 * timing.median, "ms_low": 1e3 * timing.low, "ms_high": 1e3 * timing.high}
    users._at_rest.close()


def at_rest(folder: Path, count: int, shared: bool, fetches: int) -> dict[str, Any]:
    """`count` users of ten choices: bytes each, and how long fetching one takes."""
    draw, steering = random.Random(0), Steering(256)
    store, encoder = SqliteStore(folder / f"{count}-{shared}.db"), encoder_fingerprint(steering.encoder)
    catalogue = [Option(torch.randn(EMBEDDING)) for _ in range(1000)]
    begin = time.perf_counter()
    for start in range(0, count, 1000):
        latents = torch.randn(min(1000, count - start), LATENT).bfloat16()
        store.put(
            [
                Change(StoredUser(f"user-{start + i}", 1, 1.0, latent, encoder), _ten(draw, catalogue, shared), True)
                for i, latent in enumerate(latents)
            ]
        )
    seconds = time.perf_counter() - begin
    store.close()
    store = SqliteStore(store.path)
    users = StoredUsers(steering, store)
    names = [f"user-{draw.randrange(count)}" for _ in range(fetches)]
    found = {
        "measure": "at_rest",
        "users": count,
        "options": "shared by all" if shared else "each user's own",
        "bytes_a_user": store.path.stat().st_size / count,
        "ms_a_user_written": 1e3 * seconds / count,
        "ms_store_get": _percentiles([partial(store.get, name) for name in names]),
        "ms_fetched_into_the_bank": _percentiles([partial(users.__getitem__, name) for name in names]),
    }
    store.close()
    store.path.unlink()
    return found


def _ten(draw: random.Random, catalogue: list[Option], shared: bool) -> list[tuple[Option, Option]]:
    sides = draw.sample(catalogue, 20) if shared else [Option(torch.randn(EMBEDDING)) for _ in range(20)]
    return list(zip(sides[::2], sides[1::2], strict=True))


def _percentiles(calls: list[Callable[[], Any]]) -> dict[str, float]:
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def show(results: list[dict[str, Any]]) -> None:
    """Prints what was measured, a line each."""
    for result in results:
        if result["measure"] == "add_choice":
            added, encoded = pretty(1e-3 * result["ms_incremental"]), pretty(1e-3 * result["ms_encode_again"])
            print(
                f"a choice more for a user of {result['choices']:,}: {added}, encoding all again {encoded} "
                f"({result['times_cheaper']:.1f} times that); they differ by {result['largest_difference']:.1e} of "
                f"{result['largest_latent']:.2f}"
            )
        elif result["measure"] == "at_rest":
            get, fetched = result["ms_store_get"], result["ms_fetched_into_the_bank"]
            print(
                f"{result['users']:,} users of ten choices, options {result['options']}: {result['bytes_a_user']:.0f} "
                f"bytes each; get {get['p50']:.2f} ms (p99 {get['p99']:.2f}), fetched into the bank "
                f"{fetched['p50']:.2f} ms (p99 {fetched['p99']:.2f})"
            )
        else:
            print(f"{result['measure']}: {result['ms']:.2f} ms [{result['ms_low']:.2f}, {result['ms_high']:.2f}]")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--own", type=int, default=1000, help="users who have options of their own")
    parser.add_argument("--choices", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--fetches", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the databases are made; a temporary folder if not named")
    parser.add_argument("--json", type=Path, help="where to write the results, a list of objects")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        results = [additions(count, args.rounds) for count in args.choices]
        results += changes(folder, args.rounds)
        results += [at_rest(folder, count, True, args.fetches) for count in args.users]
        results.append(at_rest(folder, args.own, False, args.fetches))
    show(results)
    if args.json:
        about = machine()
        args.json.write_text(json.dumps([{**result, **about} for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
