"""What several versions of an adapter over one base cost: python -m bench.versions

SmolLM2-135M with adapters of the demo's shape: 32 rows that decode, all in one version, or half in each of two, or
eight in each of four. Rows of different versions share no product, so that every version's step reads the weights
again. And memory: the packed weights of one version, and what another one adds, since those that no adapter is packed
into are shared.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from bench.timing import compare, machine, pretty
from fssa_fast import PRIOR, SteerablePolicy
from fssa_fast.generation import FusedModel
from fssa_fast.policy.sharing import share_parameters
from fssa_fast.policy.storage import read_description

ROWS, PROMPT = 32, 32


def packed_bytes(forms: list[FusedModel]) -> int:
    """Memory of the packed weights of some forms, what they share counted once."""
    found = {}
    for form in forms:
        groups = [group for block in form.blocks for group in (block.qkv, block.o, block.gate_up, block.down)]
        for weight in (form.head, *(g.weight for g in groups), *(a.b for g in groups for a in g.adapters)):
            found[weight.data.data_ptr()] = weight.data.nbytes
    return sum(found.values())


def main() -> None:
    """Measures, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="at most, a side")
    args = parser.parse_args()

    from examples.demo.base import load_base

    base, _ = load_base()
    config = read_description("examples/demo/adapter").config
    policies: list[SteerablePolicy] = []
    for _ in range(4):
        policy = SteerablePolicy(share_parameters(base), config, modulation_std=0.05)
        policy.fuse(beside=policies[-1].fused if policies else None)
        policies.append(policy)
    forms = [policy.fused for policy in policies if policy.fused is not None]
    torch.manual_seed(0)

    def side(versions: int) -> Any:
        rows = ROWS // versions
        caches = [form.new_cache(rows, 2 * PROMPT) for form in forms[:versions]]
        for cache in caches:
            each = 2 * PROMPT // cache.block
            for row in range(rows):
                cache.assign(row, list(range(1 + row * each, 1 + (row + 1) * each)))
        ids = torch.randint(0, 49152, (rows,), dtype=torch.int32)
        slots = torch.full((rows,), policies[0].users.slot(PRIOR), dtype=torch.int32)
        sequences = torch.arange(rows, dtype=torch.int32)
        positions = torch.full((rows,), PROMPT, dtype=torch.int32)

        def step() -> None:
            for form, cache in zip(forms, caches, strict=False):
                form.forward(ids, slots, sequences, positions, cache)

        return step

    timings = compare({f"{n} versions" if n > 1 else "1 version": side(n) for n in (1, 2, 4)}, seconds=args.seconds)
    one, two = packed_bytes(forms[:1]), packed_bytes(forms[:2])
    found = {
        "machine": machine(),
        "a step of 32 rows": {name: pretty(timing.median) for name, timing in timings.items()},
        "MiB packed": {"one version": one >> 20, "another version": (two - one) >> 20},
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
