"""What it costs to draw a step's tokens on the CPU: python -m bench.sampling

32 rows of 151,936 random logits, float32, each row with a seed of its own and a prompt of 256 tokens: by the definition
in PyTorch and by the native core, in one process, in turn. Settings: all rows greedy; all at temperature 0.7; the same
with one knob more; and `mixed`, where the rows have all of these settings in turn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.timing import compare, machine, pretty
from fssa_fast.backends import use_backend
from fssa_fast.generation.sampler import Sampler
from fssa_fast.generation.sampling import Sampling

ROWS, VOCABULARY = 32, 151936
PROMPT = [(7 * i) % VOCABULARY for i in range(256)]
MORE: dict[str, dict[str, Any]] = {
    "temperature": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "logit_bias": {"logit_bias": {token: 1.0 for token in range(100)}},
    "allowed_tokens": {"allowed_tokens": range(0, VOCABULARY, 2)},
}
KNOBS = {"greedy": Sampling(), **{name: Sampling(temperature=0.7, **more) for name, more in MORE.items()}}
SETTINGS = {**{name: [knobs] for name, knobs in KNOBS.items()}, "mixed": list(KNOBS.values())}


def sampler(settings: list[Sampling], backend: str) -> Sampler:
    with use_backend(backend):
        made = Sampler(ROWS, VOCABULARY, 2 * len(PROMPT), torch.device("cpu"))
    for row in range(ROWS):
        made.assign(row, settings[row % len(settings)], row, PROMPT, len(PROMPT) // 2, False)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also writes the medians, in seconds, and the machine here")
    parser.add_argument("--seconds", type=float, default=1.0, help="a side and setting, about")
    args = parser.parse_args()
    logits = 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    rows, found = np.arange(ROWS, dtype=np.int32), {}
    positions = np.full(ROWS, len(PROMPT) - 1, dtype=np.int32)
    for name, settings in SETTINGS.items():
        samplers = {backend: sampler(settings, backend) for backend in ("reference", "cpu")}
        sides = {backend: lambda made=made: made.sample(logits, rows, positions) for backend, made in samplers.items()}
        timings = compare(sides, seconds=args.seconds)
        found[name] = {backend: timing.median for backend, timing in timings.items()}
        print(f"{name:18s}", *(f"{backend} {pretty(seconds)}" for backend, seconds in found[name].items()), sep="   ")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "medians": found}, indent=1))


if __name__ == "__main__":
    main()
