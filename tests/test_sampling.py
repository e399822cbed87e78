"""The sampler: the draws of every knob against its plain meaning, and a row's draws independent of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fssa_fast.generation.sampler import Sampler
from fssa_fast.generation.sampling import Sampling

V, DRAWS = 40, 4000
CPU = torch.device("cpu")
LOGITS = 2 * torch.randn(V, generator=torch.Generator().manual_seed(3))
TOKENS = [3, 3, 5, 7, 5, 5, 9]  # of which the first three are the prompt


def plain(knobs: Sampling) -> torch.Tensor:
    """The distribution, a token at a time."""
    x = LOGITS.double().clone()
    for token, bias in (knobs.logit_bias or {}).items():
        x[token] += bias
    answer = TOKENS[3:]
    for token in set(TOKENS):
        x[token] = x[token] / knobs.repetition_penalty if x[token] > 0 else x[token] * knobs.repetition_penalty
        x[token] -= knobs.frequency_penalty * answer.count(token) + knobs.presence_penalty * (token in answer)
    if knobs.allowed_tokens is not None:
        x[[i for i in range(V) if i not in knobs.allowed_tokens]] = -math.inf
    p = (x / knobs.temperature).softmax(0)
    p[p < knobs.min_p * p.max()] = 0
    order = p.argsort(descending=True)
    if knobs.top_k:
        p[order[knobs.top_k :]] = 0
    before = (p / p.sum())[order].cumsum(0) - (p / p.sum())[order]
    p[order[before >= knobs.top_p]] = 0
    return p / p.sum()


def drawn(knobs: Sampling, count: int = DRAWS) -> list[int]:
    sampler = Sampler(count, V, 16, CPU)
    for row in range(count):
        sampler.assign(row, knobs, row, TOKENS, 3, False)
    rows = np.arange(count, dtype=np.int32)
    return sampler.sample(LOGITS.repeat(count, 1), rows, np.full(count, len(TOKENS) - 1, dtype=np.int32))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"logit_bias": {1: 3.0, 2: -100}},
        {"allowed_tokens": [1, 4, 9, 33]},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": -0.5},
        {"repetition_penalty": 0.7, "presence_penalty": -1.0, "logit_bias": {5: 2.0}, "top_p": 0.7},
    ],
    ids=str,
)
def test_draws_have_the_plain_distribution(knobs):
    """Chi-square over tokens expected at least 5 times, at one in 100,000; and nothing that is dropped is drawn."""
    chosen = Sampling(**{"temperature": 1.0, **knobs})
    expected, counts = plain(chosen) * DRAWS, torch.bincount(torch.tensor(drawn(chosen)), minlength=V).double()
    assert not counts[expected == 0].any()
    often = expected >= 5
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert chi < freedom + 4.3 * math.sqrt(2 * freedom) + 12


def test_a_rows_draws_do_not_depend_on_the_batch():
    """Alone or among rows with other knobs: the same tokens."""
    knobs = [
        {"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 0.7, "frequency_penalty": 1.0}, {"temperature": 1.0, "allowed_tokens": [1, 2]},
        {"temperature": 1.0, "logit_bias": {4: 5.0}, "top_k": 3},
    ]  # fmt: skip
    logits = torch.randn(len(knobs), V, generator=torch.Generator().manual_seed(1))

    def sample(which: list[int], position: int) -> list[int]:
        sampler = Sampler(len(knobs), V, 64, CPU)
        for i in which:
            sampler.assign(i, Sampling(**knobs[i]), 100 + i, TOKENS, 3, False)
        rows = np.array(which, dtype=np.int32)
        return sampler.sample(logits[which], rows, np.full(len(which), position, dtype=np.int32))

    for position in range(6, 12):
        assert sample([0, 1, 2, 3, 4, 5], position) == [sample([i], position)[0] for i in range(6)]
    assert len({sample([1], position)[0] for position in range(6, 40)}) > 3


def test_greedy_bad_logits_and_logprobs():
    sampler = Sampler(3, V, 16, CPU)
    for row in range(3):
        sampler.assign(row, Sampling(logprobs=2), 0, TOKENS, 3, False)
    logits, rows = torch.stack([LOGITS, LOGITS, -LOGITS]), np.arange(3, dtype=np.int32)
    logits[1, 7] = math.nan
    tokens = sampler.sample(logits, rows, rows)
    assert tokens == [int(LOGITS.argmax()), -1, int(LOGITS.argmin())]
    found = dict(sampler.logprobs(logits, rows, tokens))
    best = LOGITS.log_softmax(0).topk(2)
    assert set(found) == {0, 2} and found[0].token == tokens[0]
    assert found[0].logprob == pytest.approx(best.values[0].item())
    assert found[0].top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 1e-40), ("min_p", 1.5), ("presence_penalty", 3), ("repetition_penalty", 0), ("logprobs", 21)],
)
def test_knobs_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Sampling(**{name: value})
