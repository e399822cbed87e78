"""What a step of the engine costs the host: python -m bench.host

The forward is replaced by one that returns the same logits at once, over a vocabulary of 64, so that what is left is
the engine's own work: which rows a step serves, their ids and positions, drawing, and handing the tokens out. All rows
decode. Greedy; and at temperature 0.7 with a seed each. Medians of single steps, and
20th and 80th percentiles, on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.decode import make_policy
from bench.timing import machine, pretty, summary

ROWS, VOCABULARY, STEPS = (1, 32, 256), 64, 400
SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.7}}


def make() -> Any:
    """A policy whose model is as small as they come: it is not asked."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=VOCABULARY,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return make_policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), 4, max(ROWS))


def steps(policy: Any, rows: int, sampling: dict[str, Any], count: int) -> list[float]:
    """Seconds of so many steps of rows that decode."""
    length, names = count + 64, list(policy.users)
    with policy.engine(
        max_rows=rows, max_tokens=rows * length, max_length=length, step_tokens=max(256, rows),
        max_waiting_per_user=rows, background=False,
    ) as engine:  # fmt: skip
        handles = [
            engine.submit([3, 4, 5, 6], names[i % len(names)], max_new_tokens=count + 32, **sampling)
            for i in range(rows)
        ]
        while any(not handle.take()[0] for handle in handles):
            engine.step()
        logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))
        engine._fused.forward = lambda *_: logits
        try:
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begin)
            assert engine.running == rows
        finally:
            del engine._fused.forward
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also writes the medians, in seconds, and the machine here")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"timed of each setting; default {STEPS}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, found = make(), {}
    for name, sampling in SETTINGS.items():
        for rows in ROWS:
            found[f"{name} {rows}"] = timing = summary(steps(policy, rows, sampling, args.steps))
            print(f"{name:8s} {rows:3d} rows", *map(pretty, timing[:3]), sep="   ")
    if args.json:
        medians = {name: timing.median for name, timing in found.items()}
        args.json.write_text(json.dumps({"machine": machine(), "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
