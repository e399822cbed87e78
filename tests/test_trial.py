"""The block that is tried before a GPU's steps are trusted: in Triton's interpreter, with faults planted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fssa_fast import BackendError
from fssa_fast.backends import load_backend
from fssa_fast.generation import which_ops
from fssa_fast.generation.block_ops import AttentionInputs, Step
from fssa_fast.generation.graphs import CudaGraphs
from fssa_fast.generation.plain_ops import PlainOps
from fssa_fast.generation.trial import try_block

if load_backend("triton")[0] is None:
    pytest.skip(f"the Triton backend cannot run here: {load_backend('triton')[1]}", allow_module_level=True)

from fssa_fast.generation.triton_ops import TritonOps  # noqa: E402  (needs triton)
from fssa_fast.kernels import configs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_that_are_right_pass(dtype):
    graphs = CudaGraphs(DEVICE) if DEVICE.type == "cuda" else None
    try_block(TritonOps(DEVICE, dtype), DEVICE, dtype, 16, graphs)


class NoShift(PlainOps):
    """Leaves beta out."""

    def adapt(self, parts: Any, slots: Tensor) -> Step:
        return super().adapt([type(part)(**{**vars(part), "beta": None}) for part in parts], slots)


class NoPast(PlainOps):
    """Every token is alone in its sequence."""

    def attention(self, settings: Any, given: AttentionInputs, *rest: Any) -> Step:
        alone = AttentionInputs(given.q, given.k, given.v, given.positions * 0, given.sequences)
        return super().attention(settings, alone, *rest)


class NoFilm(PlainOps):
    """Everybody is slot 0."""

    def film_norm(self, given: Any) -> Step:
        return super().film_norm(type(given)(**{**vars(given), "slots": given.slots * 0}))


class NoGate(PlainOps):
    """Does not compile."""

    def gate(self, *args: Any) -> Step:
        raise RuntimeError("start value is not a constexpr")


@pytest.mark.parametrize(
    ("ops", "said"),
    [
        (NoShift(), "its adapted queries is"),
        (NoPast(), "its attention is"),
        (NoFilm(), "its film is"),
        (NoGate(), "tried and failed: RuntimeError.*not a constexpr"),
    ],
    ids=["adapter", "attention", "film", "compiler"],
)
def test_a_planted_fault_is_caught(ops, said):
    with pytest.raises(BackendError, match=said):
        try_block(ops, DEVICE, torch.float32, 16, None)


def test_a_replay_that_does_nothing_is_caught():
    class Stale(CudaGraphs):
        def __init__(self) -> None:
            pass

        def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
            result = work()
            return lambda: result

    with pytest.raises(BackendError, match="tried, captured, and its adapted queries is"):
        try_block(PlainOps(), DEVICE, torch.float32, 16, Stale())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_left_to_itself_it_falls_back_and_says_why(monkeypatch, caplog):
    """With steps that know no GPU in Triton's place."""
    monkeypatch.setattr("fssa_fast.generation.triton_ops.TritonOps", lambda *_: PlainOps())
    monkeypatch.setattr(which_ops, "CudaGraphs", lambda _: None)
    with caplog.at_level(logging.WARNING, "fssa_fast"):
        assert isinstance(which_ops.ops_for(torch.device("cuda"), torch.float32, 16), PlainOps)
    [record] = caplog.records
    assert "runs by its definitions in PyTorch (triton: a block was tried and failed: " in record.getMessage()


def test_asked_for_by_name_it_raises(monkeypatch):
    from fssa_fast import use_backend

    monkeypatch.setattr("fssa_fast.generation.triton_ops.TritonOps", lambda *_: NoFilm())
    with use_backend("triton"), pytest.raises(BackendError, match="'triton' was asked for .* its film is"):
        which_ops.ops_for(DEVICE, torch.float32, 16)


@pytest.mark.parametrize(("hip", "lanes"), [(None, 32), ("6.4", 64)], ids=["NVIDIA", "AMD"])
def test_a_norm_has_at_most_1024_threads(hip, lanes, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert all(configs.norm_tile(width).warps * lanes <= 1024 for width in (100, 4096, 16384, 16385, 65536))
