"""Decode steps captured as graphs: CUDA's on a GPU, and where there is none a stand-in that records what runs.

The stand-in keeps PyTorch's operations and the kernels' launches with the tensors they got, and replays those alone: a
number that the host computed while recording is the same in every replay, as on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import make_choices, make_ids, make_model, make_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fssa_fast import PRIOR, SteerablePolicy, use_backend
from fssa_fast.backends import load_backend
from fssa_fast.generation import fused as fused_module
from fssa_fast.generation import graphs as graphs_module
from fssa_fast.generation.graphs import SIZES, CudaGraphs, padded

if load_backend("triton")[0] is None:
    pytest.skip(f"the Triton backend cannot run here: {load_backend('triton')[1]}", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402  (needs triton)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::unique")


class FakeGraph:
    """What was recorded, in order."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for run in self.work:
            run()


class Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert not name.startswith(FORBIDDEN), f"{name} waits for the GPU"
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not name.startswith("aten::empty"):

            def again() -> None:
                new = func(*args, **(kwargs or {}))
                if new.data_ptr() != result.data_ptr():
                    result.copy_(new)

            self.graph.work.append(again)
        return result


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: FakeStream) -> None:
        pass


class Captures:
    """How often something was captured, and into which pools."""

    def __init__(self) -> None:
        self.pools: list[Any] = []

    def __len__(self) -> int:
        return len(self.pools)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Counts captures, and where there is no GPU puts the stand-in in the place of CUDA's graphs."""
    met = Captures()
    handles = iter(range(1000))
    launch = interpreter.GridExecutor.__call__
    real_graph = torch.cuda.graph

    @contextlib.contextmanager
    def graph(captured: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        met.pools.append(pool)
        if GPU:
            with real_graph(captured, pool=pool, stream=stream, capture_error_mode=capture_error_mode):
                yield
            return

        def record(kernel: Any, *args: Any, **options: Any) -> None:
            captured.work.append(lambda: launch(kernel, *args, **options))
            with _disable_current_modes():
                launch(kernel, *args, **options)

        with monkeypatch.context() as patched, Recorder(captured):
            patched.setattr(interpreter.GridExecutor, "__call__", record)
            yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    if not GPU:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    return met


def make(kind: str = "llama") -> SteerablePolicy:
    """A policy, fused with Triton's steps and no graphs yet."""
    model = make_model(kind, num_hidden_layers=1).to(DEVICE)
    policy = make_policy(model, modulations=("scale_shift",), capacity=4)
    policy.users.add("a", make_choices(1))
    policy.users.add("b", make_choices(2))
    with use_backend("triton"):
        policy.fuse()
    policy.fused.graphs = None
    policy.fused.ops._reads = False  # as on a GPU
    return policy


def prefilled(policy: SteerablePolicy, slots: Tensor, length: int = 2) -> Any:
    """A cache with a prompt for each of the slots, by direct steps."""
    fused, rows = policy.fused, len(slots)
    graphs, fused.graphs = fused.graphs, None
    cache = fused.new_cache(rows, 64)
    for row in range(rows):
        cache.assign(row, [1 + 2 * row, 2 + 2 * row])
    which = torch.arange(rows, device=DEVICE)
    fused.forward(
        make_ids(rows, length).flatten().to(DEVICE), slots.repeat_interleave(length),
        which.repeat_interleave(length), torch.arange(length, device=DEVICE).repeat(rows), cache, length * which,
    )  # fmt: skip
    fused.graphs = graphs
    return cache


def decode(policy: SteerablePolicy, cache: Any, slots: Tensor, steps: int = 2, first: int = 2) -> Tensor:
    """The logits of some steps: other tokens and positions in each."""
    which = torch.arange(len(slots), device=DEVICE)
    ids = make_ids(len(slots), steps, seed=1).to(DEVICE)
    return torch.stack(
        [
            policy.fused.forward(ids[:, i], slots, which, torch.full_like(which, first + i), cache).clone()
            for i in range(steps)
        ]
    )


def slots_of(policy: SteerablePolicy, *names: str) -> Tensor:
    return torch.tensor([policy.users.slot(name) for name in names], dtype=torch.int32, device=DEVICE)


def test_sizes():
    assert [padded(n) for n in (1, 2, 3, 5, 31, 64, 65, 256)] == [1, 2, 4, 8, 32, 64, 80, 256]
    assert list(SIZES) == sorted(set(SIZES))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_replayed_is_direct(kind, captures):
    """With other tokens, positions, users and rows of the bank than were captured; filled up from three to four."""
    policy = make(kind)
    slots, row = slots_of(policy, "b", PRIOR, "a"), policy.bank.rows[policy.users.slot("a")]
    before = row.clone()

    def logits() -> Tensor:
        row.copy_(before)
        cache = prefilled(policy, slots)
        first = decode(policy, cache, slots)
        row.mul_(0.5)
        return torch.cat([first, decode(policy, cache, slots.flip(0), 2, 4)])

    direct = logits()
    policy.fused.graphs = CudaGraphs(DEVICE)
    torch.testing.assert_close(logits(), direct, atol=1e-5, rtol=1e-5)
    assert len(captures) == 1


def test_rows_that_fill_up_change_no_bits(captures):
    """Three rows and nobody's are three of four rows."""
    policy = make()
    slots = slots_of(policy, "a", "b", PRIOR, "a")
    policy.fused.graphs = CudaGraphs(DEVICE)
    four = decode(policy, prefilled(policy, slots), slots)
    cache = prefilled(policy, slots)
    before = cache.layer(0)[0].clone()
    three = decode(policy, cache, slots[:3])
    assert torch.equal(three, four[:, :3])
    written = (cache.layer(0)[0] != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert written == [1, 3, 5]  # not the fourth row's, and not block 0


def test_a_graph_for_each_size_and_cache(captures):
    policy = make()
    fused = policy.fused
    fused.graphs = CudaGraphs(DEVICE)
    slots = slots_of(policy, "a", "b", PRIOR)
    first, second = prefilled(policy, slots), prefilled(policy, slots)
    for rows in (3, 1, 3):
        decode(policy, first, slots[:rows], 1)
    assert len(captures) == 2
    decode(policy, second, slots, 1)
    assert len(captures) == 3 and len(set(captures.pools)) == 1
    fused.forget(first)
    decode(policy, second, slots, 1)
    assert len(captures) == 3
    fused.forget(second)
    gc.collect()
    assert not fused._workspace._replays
    decode(policy, second, slots[:1], 1)
    assert len(captures) == 4 and len(set(captures.pools)) == 2  # the first pool went with its last graph


def test_graphs_go_when_the_buffers_grow(captures, monkeypatch):
    monkeypatch.setattr(graphs_module, "SIZES", (1, 2, 4))
    monkeypatch.setattr(fused_module, "SIZES", (1, 2, 4))
    policy = make()
    policy.fused.graphs = CudaGraphs(DEVICE)
    slots = slots_of(policy, "a", "b")
    cache = policy.fused.new_cache(2, 64)
    cache.assign(0, [1])
    cache.assign(1, [2])
    small = decode(policy, cache, slots, 1, 0)
    assert policy.fused._workspace.size == 4
    prefilled(policy, slots, 5)
    assert policy.fused._workspace.size == 10
    assert torch.equal(decode(policy, cache, slots, 1, 0), small) and len(captures) == 2


def test_a_prompt_and_its_last_logits(captures):
    """Tokens of one sequence in one step, and the logits of some of them: the head runs after the graph."""
    policy = make()
    slots = slots_of(policy, "a", "a", "a")
    ids, last = torch.tensor([7, 8, 9], device=DEVICE), torch.tensor([2], device=DEVICE)
    found = []
    for graphs in (None, CudaGraphs(DEVICE)):
        policy.fused.graphs = graphs
        cache = policy.fused.new_cache(1, 64)
        cache.assign(0, [1, 2])
        found.append(policy.fused.forward(ids, slots, 0 * slots, torch.arange(3, device=DEVICE), cache, last).clone())
    assert found[1].shape == (1, 64) and len(captures) == 1
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    every = policy.fused.forward(ids, slots, 0 * slots, torch.arange(3, device=DEVICE), cache)
    torch.testing.assert_close(every[2:], found[0], atol=1e-5, rtol=1e-5)
    assert len(captures) == 2


def test_an_engine_on_graphs(captures, monkeypatch):
    """Every request's tokens are those it gets without them."""
    policy = make()
    requests = [
        {"prompt": [5, 6, 7], "user": "a", "max_new_tokens": 4},
        {"prompt": [8], "user": "b", "max_new_tokens": 3},
        {"prompt": [9, 10], "user": {"a": 0.5, "b": 0.5}, "max_new_tokens": 2},
    ]

    def served() -> list[list[int]]:
        with policy.engine(max_rows=3, max_tokens=96, warm_up=False, background=False) as engine:
            return [result.tokens for result in engine.run(requests)]

    direct = served()
    policy.fused.graphs = CudaGraphs(DEVICE)
    assert served() == direct and captures
    monkeypatch.setattr(fused_module, "SIZES", (1, 2, 4))
    monkeypatch.setattr(graphs_module, "SIZES", (1, 2, 4))
    with policy.engine(max_rows=3, max_tokens=96, step_tokens=4, warm_up=True, background=False) as engine:
        before = len(captures)
        assert [result.tokens for result in engine.run(requests)] == direct
        assert len(captures) == before  # all had been captured: as many steps of either kind as there are sizes
        assert len(policy.fused._workspace._replays) == 6
    assert not policy.fused._workspace._replays  # an engine that is closed takes its graphs along


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_device(dtype):
    """A model as it is served: the graphs are there by themselves, and give what direct steps give, bit for bit."""
    model = make_model(
        hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=3, max_position_embeddings=2048
    )
    policy = make_policy(model.to(DEVICE, dtype), modulations=("scale_shift",), capacity=70)
    names = [f"user{i}" for i in range(64)]
    policy.users.add_many({name: make_choices(i) for i, name in enumerate(names)})
    fused = policy.fuse()
    graphs = fused.graphs
    assert graphs is not None
    for rows in (1, 8, 64):
        slots = slots_of(policy, *names[:rows])
        captured = decode(policy, prefilled(policy, slots, 20), slots, 8, 20)
        fused.graphs = None
        direct = decode(policy, prefilled(policy, slots, 20), slots, 8, 20)
        fused.graphs = graphs
        assert torch.equal(captured, direct)
