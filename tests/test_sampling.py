"""The sampler: the draws of every knob against its plain meaning, and a row's draws independent of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fssa_fast._native import load_native
from fssa_fast.backends import use_backend
from fssa_fast.generation.native_draw import NativeDraw
from fssa_fast.generation.sampler import Sampler
from fssa_fast.generation.sampling import Knobs, Sampling, draw
from fssa_fast.generation.which_draw import which_draw

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


def drawn(knobs: Sampling, backend: str, count: int = DRAWS) -> list[int]:
    with use_backend(backend):
        sampler = Sampler(count, V, 16, CPU)
    for row in range(count):
        sampler.assign(row, knobs, row, TOKENS, 3, False)
    rows = np.arange(count, dtype=np.int32)
    return sampler.sample(LOGITS.repeat(count, 1), rows, np.full(count, len(TOKENS) - 1, dtype=np.int32))


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


@BACKENDS
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
def test_draws_have_the_plain_distribution(knobs, backend):
    """Chi-square over tokens expected at least 5 times, at one in 100,000; and nothing that is dropped is drawn."""
    chosen = Sampling(**{"temperature": 1.0, **knobs})
    expected, counts = plain(chosen) * DRAWS, torch.bincount(torch.tensor(drawn(chosen, backend)), minlength=V).double()
    assert not counts[expected == 0].any()
    often = expected >= 5
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert chi < freedom + 4.3 * math.sqrt(2 * freedom) + 12


@BACKENDS
def test_a_rows_draws_do_not_depend_on_the_batch(backend):
    """Alone or among rows with other knobs: the same tokens."""
    knobs = [
        {"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 0.7, "frequency_penalty": 1.0}, {"temperature": 1.0, "allowed_tokens": [1, 2]},
        {"temperature": 1.0, "logit_bias": {4: 5.0}, "top_k": 3},
    ]  # fmt: skip
    logits = torch.randn(len(knobs), V, generator=torch.Generator().manual_seed(1))

    def sample(which: list[int], position: int) -> list[int]:
        with use_backend(backend):
            sampler = Sampler(len(knobs), V, 64, CPU)
        for i in which:
            sampler.assign(i, Sampling(**knobs[i]), 100 + i, TOKENS, 3, False)
        rows = np.array(which, dtype=np.int32)
        return sampler.sample(logits[which], rows, np.full(len(which), position, dtype=np.int32))

    for position in range(6, 12):
        assert sample([0, 1, 2, 3, 4, 5], position) == [sample([i], position)[0] for i in range(6)]
    assert len({sample([1], position)[0] for position in range(6, 40)}) > 3


@BACKENDS
def test_greedy_bad_logits_and_logprobs(backend):
    with use_backend(backend):
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


def native() -> NativeDraw:
    with use_backend("cpu"):
        found = which_draw(CPU)
    assert isinstance(found, NativeDraw)
    return found


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request):
    core, reason = load_native()
    assert core is not None, reason
    if not core.has_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    before = core.isa()
    core.set_isa(request.param)
    yield
    core.set_isa(before)


def knobs_of(rows: int, top_ks: list[int], top_ps: list[float]) -> Knobs:
    """Every combination of these in turn, at several temperatures; the last row is greedy."""
    knobs = Knobs.new(rows, CPU)
    for row in range(rows):
        knobs.temperature[row] = [1.0, 0.7, 2.5][row % 3]
        knobs.min_p[row] = [0.0, 0.0, 0.0, 1e-3][row % 4]
        knobs.top_k[row] = top_ks[row % len(top_ks)]
        knobs.top_p[row] = top_ps[row // len(top_ks) % len(top_ps)]
        knobs.seed[row] = (1 << 62) + row
    knobs.temperature[-1] = 0.0
    return knobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 13, 1024, 5003])
def test_native_draws_are_the_definitions(vocabulary, dtype, instruction_set):
    """But where a random number falls between two sums of weights that differ by the exponential's last places.

    A sum differs by less than 2^-21 of it: at most one draw of 600 may fall there (expected: one of a million).
    Ties at the thresholds come with the low dtypes, and tokens that cannot be drawn with -inf.
    """
    rows = 300
    knobs = knobs_of(rows, [0, 1, 5, 40, 10_000], [1.0, 0.9, 0.3, 1e-6])
    logits = (2 * torch.randn(rows, vocabulary + 3, generator=torch.Generator().manual_seed(vocabulary))).to(dtype)
    logits = logits[:, :vocabulary]  # rows that are not neighbours
    logits[:, vocabulary // 2 + 1 :: 3] = -math.inf
    differing = 0
    for position in range(2):
        where, at = torch.arange(rows).int().flip(0), torch.full((rows,), position, dtype=torch.int32)
        differing += (native()(logits, knobs, where, at) != draw(logits, knobs, where, at)).sum().item()
    assert differing <= 1


def test_native_threads_do_not_matter():
    logits, knobs = torch.randn(40, 3000, generator=torch.Generator().manual_seed(5)), knobs_of(40, [0, 9], [1.0, 0.5])
    rows, before = torch.arange(40).int(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(native()(logits, knobs, rows, rows).tolist())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == [native()(logits[i : i + 1], knobs, rows[i : i + 1], rows[i : i + 1]).item()
                                    for i in range(40)]  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_native_gives_no_token_where_logits_are_not_finite(bad, temperature, instruction_set):
    logits, knobs = torch.zeros(41, 39), Knobs.new(41, CPU)
    knobs.temperature.fill_(temperature)
    logits[torch.arange(39), torch.arange(39)] = bad
    logits[39] = -math.inf
    tokens = native()(logits, knobs, torch.arange(41).int(), torch.arange(41).int()).tolist()
    assert tokens[:40] == [-1] * 40 and 0 <= tokens[40] < 39


def test_native_refuses_knobs_of_rows_that_are_not_there():
    with pytest.raises(IndexError, match=r"slots: expected values in \[0, 2\), got 2"):
        native()(torch.zeros(1, 5), Knobs.new(2, CPU), torch.tensor([2], dtype=torch.int32), torch.zeros(1).int())


def test_greedy_rows_beside_sampled_ones_take_the_first_of_the_likeliest():
    logits = LOGITS.repeat(4, 1)
    logits[:, [6, 11]] = 9.0
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            sampler = Sampler(4, V, 16, CPU)
        for row, knobs in enumerate([{}, {"temperature": 1.0}, {"logit_bias": {30: 20.0}}, {"temperature": 1e-4}]):
            sampler.assign(row, Sampling(**knobs), row, TOKENS, 3, False)
        rows = np.arange(4, dtype=np.int32)
        tokens = sampler.sample(logits, rows, rows)
        assert (tokens[0], tokens[2]) == (6, 30) and tokens[3] in (6, 11)


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 1e-40), ("min_p", 1.5), ("presence_penalty", 3), ("repetition_penalty", 0), ("logprobs", 21)],
)
def test_knobs_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Sampling(**{name: value})
