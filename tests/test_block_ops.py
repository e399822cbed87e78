"""The steps of a fused block by Triton's kernels, against their definitions: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import columns, dtypes, normal, planted, some_slots, unwritten_is_nan
from tiny import VOCABULARY, make_choices, make_ids, make_model, make_policy, shake
from tolerances import check_parity
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fssa_fast import BASE, PRIOR, BackendError, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig, use_backend
from fssa_fast.backends import load_backend
from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings, Expansion, FilmNorm
from fssa_fast.generation.cache import BLOCK, BlockCache
from fssa_fast.generation.plain_ops import PlainOps

found, reason = load_backend("triton")
if found is None:
    pytest.skip(f"the Triton backend cannot run here: {reason}", allow_module_level=True)

from triton.runtime import interpreter, jit  # noqa: E402  (needs triton)

from fssa_fast.generation.triton_ops import TritonOps  # noqa: E402  (needs triton)
from fssa_fast.kernels import block, configs  # noqa: E402
from fssa_fast.kernels.common import INTERPRETED  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def here(value: Any) -> Any:
    """Arguments on the device under test, tensors with their strides."""
    if isinstance(value, Tensor) and DEVICE.type != "cpu":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)
    return type(value)(map(here, value)) if isinstance(value, (list, tuple)) else value


def ops_of(dtype: torch.dtype) -> Any:
    """Triton's steps for a dtype that it takes; the definitions for float64."""
    return PlainOps() if dtype == torch.float64 else TritonOps(DEVICE, dtype)


def check(step: Any, *args: Any) -> list[Tensor]:
    """`step(ops, *args)` by Triton's kernels is what it is by the definitions; returns the former."""
    args = here(args)
    got = step(ops_of(args[0].dtype), *args)
    check_parity(got, lambda *args: step(PlainOps(), *args), args)
    return got


def beside(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Room for a result [rows, width] whose rows are apart, full of sevens."""
    return torch.full((rows, width + 3), 7.0, dtype=dtype, device=DEVICE)


# ---------------------------------------------------------------- the steps


def linear(ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = beside(len(x), len(weight), x.dtype)
    ops.linear(x, ops.pack(weight), bias, y[:, : len(weight)])()
    return y


@pytest.mark.parametrize("biased", [True, False])
def test_linear(biased):
    x, weight = columns(5, 33, torch.float32), normal(7, 33)
    check(linear, x, weight, *([normal(7)] if biased else [None]))


# The parts of each y: (rank, kind); "one": one number for all ranks
ADAPTERS = {
    "one": ((20, [(4, "both")]),),
    "two of one": ((70, [(3, "both"), (17, "one")]), (9, [(20, "scale")])),
    "three": ((64, [(16, "both")]), (16, [(16, "both")]), (17, [(33, "one")])),
}


def adapters(case: str, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """A product [rows, ys and hiddens] as a group has it, the bank, the Bs, and the slots."""
    width = sum(out + sum(rank for rank, _ in parts) for out, parts in ADAPTERS[case])
    bank = sum(2 * rank + 1 for _, parts in ADAPTERS[case] for rank, _ in parts)
    bs = [normal(out, rank, dtype=dtype, scale=rank**-0.5) for out, parts in ADAPTERS[case] for rank, _ in parts]
    return columns(rows, width, dtype), columns(6, bank, dtype), bs, some_slots(rows, 6)


def adapt(case: str) -> Any:
    def step(ops: Any, product: Tensor, bank: Tensor, bs: list[Tensor], slots: Tensor) -> Tensor:
        product, at, column, parts, left = product.clone(), 0, 0, [], list(bs)
        for out, own in ADAPTERS[case]:
            y, at = product[:, at : at + out], at + out
            for rank, kind in own:
                hidden, at = product[:, at : at + rank], at + rank
                gamma = bank[:, column : column + (1 if kind == "one" else rank)].expand(-1, rank)
                beta = bank[:, column + rank : column + 2 * rank] if kind == "both" else None
                column += 2 * rank + 1
                parts.append(Expansion(hidden, gamma, beta, ops.pack(left.pop(0)), y))
        ops.adapt(parts, slots)()
        return product

    return step


@dtypes
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapt(case, dtype):
    check(adapt(case), *adapters(case, 5, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapt_does_not_depend_on_the_other_rows(dtype):
    """Across the heights of tiles, too."""
    assert configs.expand_tile(70, 20, 4, dtype).rows > configs.expand_tile(1, 20, 4, dtype).rows
    product, bank, bs, slots = here(adapters("one", 70, dtype))
    step, ops = adapt("one"), ops_of(dtype)
    together = step(ops, product, bank, bs, slots)
    for rows in (slice(0, 1), slice(60, 70)):
        assert torch.equal(step(ops, product[rows], bank, bs, slots[rows]), together[rows])


def gate(activation: str) -> Any:
    def step(ops: Any, both: Tensor) -> Tensor:
        width = both.shape[1] // 2
        y = beside(len(both), width, both.dtype)
        ops.gate(activation, both[:, :width], both[:, width:], y[:, :width])()
        return y

    return step


@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gate(activation, dtype):
    both = columns(3, 2 * 131, dtype, 4.0)
    both[0, :2] = torch.tensor([-200.0, 200.0])
    check(gate(activation), both)


def norms(
    ops: Any, x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, slots: Tensor, weight: Tensor
) -> list[Tensor]:
    hidden, normed = residual.clone(), torch.empty_like(residual)
    ops.film_norm(FilmNorm(x, hidden, scale, shift, slots, weight, 1e-5, hidden, normed))()
    alone = normed.clone()
    nothing = torch.zeros_like(x[:1])
    no_film = nothing.expand_as(scale)
    ops.film_norm(FilmNorm(alone, nothing.expand_as(x), no_film, no_film, slots, weight, 1e-5, alone, alone))()
    return [hidden, normed, alone]


@dtypes
@pytest.mark.parametrize("width", [1, 200])
def test_film_norm_in_place(width, dtype):
    """What is added is in a buffer of wider rows; hidden is written over the residual, and the norm alone over x."""
    bank = columns(5, 2 * width, dtype)
    x, residual = columns(4, width, dtype), normal(4, width, dtype=dtype)
    check(norms, x, residual, bank[:, :width], bank[:, width:], some_slots(4, 5), normal(width, dtype=dtype))


# (query heads, kv heads, width), window, softcap, norms of heads
HEADS = {
    "alone": ((2, 2, 8), 0, 0.0, False),
    "of three": ((9, 3, 16), 0, 0.0, False),
    "of six": ((12, 2, 24), 5, 0.0, True),
    "of eight": ((8, 1, 32), 0, 3.0, True),
    "capped window": ((4, 2, 8), 37, 50.0, False),
}
# Of each token: which sequence, and its position
DECODE = [(2, 0), (0, 33), (1, 70), (3, 31)]
PREFILL = [(2, 0), (2, 1), (0, 31), (0, 32), (1, 65)]


def caches(case: str, tokens: list[tuple[int, int]], dtype: torch.dtype, room: int = 96) -> tuple[Any, ...]:
    """q, k and v as columns of one product, a cache with a past, its table in no order, norms, positions, sequences."""
    (heads, kv_heads, width), *_ = HEADS[case]
    across = room // BLOCK
    product = columns(len(tokens), (heads + 2 * kv_heads) * width, dtype)
    pages = [normal(1 + 4 * across, kv_heads, *shape, dtype=dtype) for shape in ((width, BLOCK), (BLOCK, width))]
    table = (1 + torch.randperm(4 * across, dtype=torch.int32)).view(4, across)
    sequences, positions = torch.tensor(tokens, dtype=torch.int32).T.contiguous()
    norm = [1 + normal(width, dtype=dtype, scale=0.3) for _ in range(2)]
    angles = torch.rand(room, width // 2).repeat(1, 2) * 6
    return product, pages, table, norm, positions, sequences, angles.cos(), angles.sin()


def attention(case: str) -> Any:
    (heads, kv_heads, width), window, softcap, normed = HEADS[case]

    def step(
        ops: Any, product: Tensor, pages: list[Tensor], table: Tensor, norm: list[Tensor], positions: Tensor,
        sequences: Tensor, cos: Tensor, sin: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        cache = BlockCache(
            2, kv_heads, width, sequences=4, max_length=table.shape[1] * BLOCK, dtype=product.dtype, device=DEVICE
        )
        cache.table.copy_(table)
        for held, page in zip(cache.layer(1), pages, strict=True):
            held.copy_(page)
        q, k, v = product.split([heads * width, kv_heads * width, kv_heads * width], 1)
        settings = AttentionSettings(
            heads, kv_heads, width, *(norm if normed else (None, None)), 1e-5, cos.float(), sin.float(), 0.3, softcap,
            window,
        )  # fmt: skip
        out = beside(len(q), heads * width, product.dtype)
        ops.attention(settings, AttentionInputs(q, k, v, positions, sequences), cache, 1, out[:, : heads * width])()
        return [out, *cache.layer(1), *cache.layer(0)]

    return step


@dtypes
@pytest.mark.parametrize("tokens", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("case", HEADS)
def test_attention(case, tokens, dtype):
    check(attention(case), *caches(case, tokens, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["of six", "of eight", "capped window"])
def test_attention_in_chunks(case, dtype, monkeypatch):
    """Side by side, or one after the other: the same bits, and within the rule."""
    monkeypatch.setattr(configs, "attend_tile", lambda *_: configs.AttendTile(16, 32, 32, 4, 1))
    args = caches(case, [(0, 95), (1, 31), (2, 0), (3, 64)], dtype)
    apart, *_ = check(attention(case), *args)
    for parts in (1, 2):
        monkeypatch.setattr(configs, "attend_parts", lambda *_, parts=parts: parts)
        joined, *_ = attention(case)(ops_of(dtype), *here(args))
        assert torch.equal(apart, joined)


# A prompt that begins, one that goes on, a decode beside them, and a sequence whose tokens are apart.
MIXED = [(2, 0), (2, 1), (2, 2), (0, 40), (1, 62), (1, 63), (1, 64), (1, 65), (3, 7), (2, 3), (3, 8)]


def alone_and_together(case: str, tokens: list[tuple[int, int]], dtype: torch.dtype, room: int, rows: Any) -> None:
    """What these tokens give together is within the rule, and each of `rows` has the bits that it has by itself."""
    args = caches(case, tokens, dtype, room)
    together, *cached = check(attention(case), *args)
    product, _, table, norm, positions, sequences, *angles = here(args)
    for row in rows:  # what comes later is in the cache, too
        own = slice(row, row + 1)
        alone, *_ = attention(case)(
            ops_of(dtype), product[own], cached[:2], table, norm, positions[own], sequences[own], *angles
        )
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HEADS)
def test_tokens_that_share_a_tile(case, dtype, monkeypatch):
    """They meet their sequence's keys together, whatever else is in the tile."""
    monkeypatch.setattr(configs, "attend_tile", lambda *_: configs.AttendTile(16, 32, 32, 4, 1))
    alone_and_together(case, MIXED, dtype, 96, (2, 3, 6, 10))


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 31, 33, 500, 513, 1025, 4096])
def test_a_prompt_up_to_each_length(length, dtype):
    """The last tokens of a prompt, another prompt's first, and a decode, by the tile that a GPU has."""
    last = [(1, at) for at in range(max(0, length - 9), length)]
    tokens = [(0, 0), (0, 1), *last, (2, length - 1)]
    alone_and_together("of eight", tokens, dtype, -(-length // BLOCK) * BLOCK, (1, len(tokens) - 2, len(tokens) - 1))


@pytest.mark.proof
@pytest.mark.parametrize("group", range(1, 17))
def test_every_number_of_queries_a_kv_head(group, monkeypatch):
    monkeypatch.setitem(HEADS, "so many", ((2 * group, 2, 16), 50 * (group % 2), 0.0, False))
    alone_and_together("so many", MIXED, torch.bfloat16, 96, (2, 3, 6))


ATTENTION_FAULTS = {
    "another sequence's keys": ("mine = sequence == current", "mine = sequence >= 0"),
    "the tile's last token for all": (
        "ends = tl.where(mine, position + 1,",
        "ends = tl.where(mine, tl.max(position, 0) + 1,",
    ),
    "the page of the step before": ("        page = next_page\n", ""),
    "a part that skips a chunk": ("range(first, last, parts)", "range(first, last, parts + 1)"),
    "the window of another row": ("seen &= at[None, :] >= ends[:, None] - window", "seen &= at[None, :] >= begin"),
}


@pytest.mark.proof
@pytest.mark.skipif(not INTERPRETED.value, reason="what a fault reads may not be there")
@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_a_fault_in_the_attention_is_caught(fault, monkeypatch, tmp_path):
    old, new = ATTENTION_FAULTS[fault]
    assert Path(block.__file__).read_text().count(old) == 1
    faulty = planted(tmp_path, Path(block.__file__), old, new)
    monkeypatch.setattr(configs, "attend_tile", lambda *_: configs.AttendTile(16, 32, 64, 4, 1))
    monkeypatch.setattr(configs, "attend_parts", lambda *_: 2)
    calls = [
        (attention(case), *caches(case, [*MIXED, (0, 150)], torch.float32, 160)) for case in ("of six", "of eight")
    ]
    for call in calls:
        check(*call)
    monkeypatch.setattr(block, "attend_", faulty.attend_)
    with unwritten_is_nan(), pytest.raises(AssertionError):
        for call in calls:
            check(*call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_the_other_rows(dtype):
    product, pages, table, norm, positions, sequences, *angles = here(caches("of three", DECODE, dtype))
    step, ops = attention("of three"), ops_of(dtype)
    together, *_ = step(ops, product, pages, table, norm, positions, sequences, *angles)
    for row in range(4):
        own = slice(row, row + 1)
        alone, *_ = step(ops, product[own], pages, table, norm, positions[own], sequences[own], *angles)
        assert torch.equal(alone, together[own])


def test_a_token_of_nobody_leaves_the_cache_alone():
    product, pages, table, norm, positions, sequences, *angles = here(caches("of three", DECODE, torch.float32))
    step, ops = attention("of three"), ops_of(torch.float32)
    together = step(ops, product, pages, table, norm, positions, sequences, *angles)
    less = step(ops, product[:3], pages, table, norm, positions[:3], sequences[:3], *angles)
    sequences[3], positions[3] = -1, 0
    out, *cached = step(ops, product, pages, table, norm, positions, sequences, *angles)
    assert torch.equal(out[:3], together[0][:3]) and not out[3, :-3].any()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(cached, less[1:], strict=True))


def test_tanh_is_exact_where_it_is_small():
    """Softcaps multiply what is lost there."""
    q = torch.cat([torch.logspace(-5, 2, 30), -torch.logspace(-5, 2, 30)])
    product = torch.zeros(60, 3 * 2)
    product[:, 0], product[:, 2] = q, 1.0
    check(only_scores, product)


def only_scores(ops: Any, product: Tensor) -> Tensor:
    """The share that a token gives to itself against an empty position before it: all there is of the softcap."""
    cache = BlockCache(1, 1, 2, sequences=len(product), max_length=32, dtype=product.dtype, device=DEVICE)
    cache.table.copy_(torch.arange(1, len(product) + 1)[:, None])
    flat = torch.ones(2, 2, device=DEVICE), torch.zeros(2, 2, device=DEVICE)
    settings = AttentionSettings(1, 1, 2, None, None, 0.0, *flat, 1.0, 20.0, 0)
    out = torch.empty(len(product), 2, dtype=product.dtype, device=DEVICE)
    positions = torch.ones(len(product), dtype=torch.int32, device=DEVICE)
    product[:, 4] = 1.0
    which = torch.arange(len(product), dtype=torch.int32, device=DEVICE)
    ops.attention(settings, AttentionInputs(*product.split(2, 1), positions, which), cache, 0, out)()
    return out


# ---------------------------------------------------------------- whole models

ADAPTED = (LoraConfig(("q_proj", "v_proj"), 4), LoraConfig(("q_proj", "o_proj", "down_proj"), 3, modulation="none"))


def steered(kind: str, dtype: torch.dtype, loras: tuple[LoraConfig, ...] = ADAPTED) -> SteerablePolicy:
    changes = {"sliding_window": 3} if kind == "gemma2" else {}
    model = make_model(kind, attn_implementation="eager", dtype=dtype, **changes).to(DEVICE)
    config = SteeringConfig(EncoderConfig(8, 16, heads=2), True, loras)
    policy = shake(SteerablePolicy(model, config, capacity=2), 1, 0.1)
    policy.users.add("a", make_choices(1))
    return policy


def fused_logits(policy: SteerablePolicy, ids: Tensor, users: list[str], prompt: int) -> Tensor:
    """All logits: `prompt` tokens of every row at once, then a token of every row a step."""
    fused, (rows, length) = policy.fused, ids.shape
    cache = fused.new_cache(rows, 64)
    for row in range(rows):
        cache.assign(row, [1 + 2 * row, 2 + 2 * row])
    logits = torch.empty(rows, length, VOCABULARY, dtype=fused.dtype, device=DEVICE)
    ids, which = ids.to(DEVICE), torch.arange(rows, device=DEVICE)
    with policy.users.slots(users) as slots:
        first = fused.forward(
            ids[:, :prompt].flatten(), slots.repeat_interleave(prompt), which.repeat_interleave(prompt),
            torch.arange(prompt, device=DEVICE).repeat(rows), cache,
        )  # fmt: skip
        logits[:, :prompt] = first.view(rows, prompt, -1)
        for at in range(prompt, length):
            logits[:, at] = fused.forward(ids[:, at], slots, which, torch.full_like(which, at), cache)
    return logits


def attached_logits(policy: SteerablePolicy, ids: Tensor, users: list[str]) -> Tensor:
    with torch.no_grad(), use_backend("reference"), policy.users.slots(users) as slots:
        return policy.forward(ids.to(slots.device), slots=slots).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_fused_is_attached(kind, dtype):
    policy, users, ids = steered(kind, dtype), [BASE, PRIOR, "a"], make_ids(3, 6)
    with use_backend("triton"):
        assert isinstance(policy.fuse().ops, TritonOps)
    exact_policy = steered(kind, torch.float64)
    exact_policy.load_state_dict({name: value.double() for name, value in policy.state_dict().items()})
    exact_policy.bank.rows.copy_(policy.bank.rows)
    exact = attached_logits(exact_policy, ids, users)

    def error(logits: Tensor) -> float:
        return (logits.double() - exact).square().mean().sqrt().item()

    bound = 2 * error(attached_logits(policy, ids, users)) + torch.finfo(dtype).eps * exact.abs().mean().item()
    assert error(fused_logits(policy, ids, users, 4)) <= bound


# ---------------------------------------------------------------- launches


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that do something: views and what only reserves memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._schema.name.startswith("aten::empty"):
            self.met[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The launches of this block: kernels of Triton, by name, and PyTorch's operations."""
    met: Counter[str] = Counter()
    if INTERPRETED.value:
        owner, name = interpreter.GridExecutor, "__call__"
    else:
        owner, name = jit.JITFunction, "run"
    original = getattr(owner, name)

    def launch(kernel: Any, *args: Any, **options: Any) -> Any:
        met[kernel.fn.__name__.removesuffix("_kernel")] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return original(kernel, *args, **options)

    monkeypatch.setattr(owner, name, launch)
    operations = Operations()
    with operations:
        yield met
    met.update(operations.met)
    monkeypatch.undo()


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_launches_of_a_block(adapted, monkeypatch):
    """Nine, and with adapters beside one group of projections, ten."""
    loras = (LoraConfig(("q_proj", "v_proj"), 4),) if adapted else ()
    policy = steered("llama", torch.float32, loras)
    with use_backend("triton"):
        fused = policy.fuse()
    fused.ops._reads = False  # on a CPU, values are looked at
    cache = fused.new_cache(2, 64)
    one = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    fused.forward(one, one, one, one, cache)
    with torch.inference_mode(), counted(monkeypatch) as met:
        for step in list(fused._workspace._plans.values())[0][0]:
            step()
    per_block = {"mm": 4, "remember": 1, "attend": 1, "gate": 1, "film_norm": 2, **({"adapt": 1} if adapted else {})}
    expected = Counter({name: count * len(fused.blocks) for name, count in per_block.items()})
    expected["film_norm"] += 1  # before the first block
    assert met == expected
    assert sum(per_block.values()) == 9 + adapted


# ---------------------------------------------------------------- asked for by name


def test_asked_for_by_name_it_runs_or_raises():
    policy = make_policy(capacity=2)
    for name in ("cuda", "triton"):
        policy.model.double()
        with use_backend(name), pytest.raises(BackendError, match=f"'{name}' was asked for but cannot run the fused"):
            policy.fuse()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the values on a GPU are not read")
def test_values_are_checked_where_that_is_free():
    policy = make_policy(capacity=2)
    with use_backend("triton"):
        fused = policy.fuse()
    cache = fused.new_cache(1, 32)
    cache.assign(0, [1])
    one = torch.zeros(1, dtype=torch.long)
    for slot, sequence, position in ((9, 0, 0), (-1, 0, 0), (0, 3, 0), (0, -1, 0), (0, 0, 32), (0, 0, -1)):
        with pytest.raises(IndexError):
            fused.forward(one, one + slot, one + sequence, one + position, cache)
