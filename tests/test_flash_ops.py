"""The steps with flash-attn's attention: with functions in its place that do what its documentation says, checked as it
checks them; on a GPU where it is installed, with its own.
"""

from __future__ import annotations

import logging
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import make_choices, make_ids, make_model, make_policy
from tolerances import check_parity
from torch import Tensor

from fssa_fast import BASE, BackendError, use_backend
from fssa_fast.backends import load_backend
from fssa_fast.generation import which_ops
from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings
from fssa_fast.generation.cache import BlockCache
from fssa_fast.generation.plain_ops import PlainOps
from fssa_fast.report import environment

found, reason = load_backend("triton")
if found is None:
    pytest.skip(f"the Triton backend cannot run here: {reason}", allow_module_level=True)

from fssa_fast.generation.flash_ops import PAGE, FlashFunctions, FlashOps, load_flash  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
in_its_place = pytest.mark.skipif(GPU, reason="the functions in flash-attn's place are the CPU's")


@pytest.fixture
def functions() -> FlashFunctions:
    """flash-attn's on a GPU; those that take its place elsewhere."""
    if not GPU:
        return FlashFunctions(with_kvcache, varlen)
    try:
        return load_flash()
    except BackendError as missing:
        pytest.skip(str(missing))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int], cap: float) -> Tensor:
    """q [Q, H, D] over k, v [K, H', D]; causal and window with the last query at the last key; zeros without a key."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones_like(back, dtype=torch.bool)
    seen &= (back <= left) if left >= 0 else seen
    seen &= (back >= -right) if right >= 0 else seen
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", shares, values).to(q.dtype)


def rows_of(pages: Tensor, table: Tensor, length: int) -> Tensor:
    return pages[table.long()].flatten(0, 1)[:length]


def check_cache(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *lengths: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert k.shape == v.shape and k.shape[1] % 256 == 0 and q.shape[-1] == k.shape[-1] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[-2] % k.shape[-2] == 0
    for numbers in (table, *lengths):
        assert numbers.dtype == torch.int32 and numbers.stride(-1) == 1


def with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, softmax_scale: float,
    causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    check_cache(q, k_cache, v_cache, block_table, cache_seqlens)
    assert len(q) == len(block_table) == len(cache_seqlens)
    outs = []
    for row, table, length in zip(q, block_table, cache_seqlens.tolist(), strict=True):
        k, v = (rows_of(pages, table, length) for pages in (k_cache, v_cache))
        outs.append(attend(row, k, v, softmax_scale, causal, window_size, softcap))
    return torch.stack(outs)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor,
) -> Tensor:  # fmt: skip
    check_cache(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(queries) == len(keys) == len(block_table) + 1 and queries[-1] == len(q) and queries[0] == keys[0] == 0
    out = torch.full_like(q, math.nan)
    for row, table in enumerate(block_table):
        own, length = slice(queries[row], queries[row + 1]), keys[row + 1] - keys[row]
        assert queries[row + 1] - queries[row] <= max_seqlen_q and length <= max_seqlen_k
        pages = (rows_of(held, table, length) for held in (k, v))
        out[own] = attend(q[own], *pages, softmax_scale, causal, window_size, softcap)
    return out


# ---------------------------------------------------------------- the step

# heads, kv heads, head width; window; softcap; norm
CASES = {
    "of three": ((9, 3, 16), 0, 0.0, False),
    "of six": ((12, 2, 24), 5, 0.0, True),
    "capped window": ((4, 2, 8), 300, 50.0, False),
}
# Of each token: which sequence (-1: nobody's), and its position
TOKENS = {
    "decode": [(2, 0), (0, 33), (1, 300), (3, 255)],
    "decode, some nobody's": [(1, 256), (-1, 0), (-1, 0)],
    "prefill": [(2, 0), (2, 1), (0, 254), (0, 255), (0, 256), (1, 65)],
    "prefill, some nobody's": [(3, 400), (0, 10), (0, 11), (0, 12), (2, 0), (-1, 0), (-1, 0)],
}


def attention(case: str, which: str) -> Any:
    (heads, kv_heads, width), window, softcap, normed = CASES[case]

    def step(ops: Any, product: Tensor, past: Tensor, norms: list[Tensor], angles: Tensor) -> list[Tensor]:
        dtype, tokens = product.dtype, TOKENS[which]
        sequences, positions = torch.tensor(tokens, dtype=torch.int32, device=DEVICE).T.contiguous()
        cache = BlockCache(
            2, kv_heads, width, sequences=4, max_length=512, block=ops.cache_block, dtype=dtype, device=DEVICE
        )
        cache.table.copy_(
            1 + torch.randperm(4 * cache.table.shape[1], generator=torch.Generator().manual_seed(0)).view(4, -1)
        )
        rows = isinstance(ops, FlashOps)
        held = (
            cache.layer_of_rows(1)
            if rows
            else (cache.layer(1)[0].permute(0, 3, 1, 2), cache.layer(1)[1].transpose(1, 2))
        )

        def pages(row: int) -> list[Tensor]:
            return [pages[cache.table[row].long()].flatten(0, 1) for pages in held]

        for row in range(4):
            for pages_of, values in zip(held, past[row], strict=True):
                pages_of[cache.table[row].long()] = values.unflatten(0, (-1, ops.cache_block)).to(dtype)
        settings = AttentionSettings(
            heads, kv_heads, width, *(norms if normed else (None, None)), 1e-5, angles.cos().float(),
            angles.sin().float(), 0.3, softcap, window,
        )  # fmt: skip
        mine = torch.tensor([owner >= 0 for owner, _ in tokens], device=DEVICE)
        sizes = [heads * width, kv_heads * width, kv_heads * width]
        if not rows:  # the definition knows no tokens of nobody
            product, sequences, positions = product[mine], sequences[mine], positions[mine]
        out = torch.full((len(product), heads * width + 3), 7.0, dtype=dtype, device=DEVICE)
        given = AttentionInputs(*product.split(sizes, 1), positions, sequences)
        ops.attention(settings, given, cache, 1, out[:, : heads * width])()
        assert (out[:, -3:] == 7).all()
        return [out[mine] if rows else out, *(x for row in range(4) for x in pages(row)), *cache.layer(0)]

    return step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", TOKENS)
@pytest.mark.parametrize("case", CASES)
def test_attention(case, which, dtype, functions):
    torch.manual_seed(0)
    (heads, kv_heads, width), *_ = CASES[case]
    product = torch.randn(len(TOKENS[which]), (heads + 2 * kv_heads) * width).to(dtype)
    past = torch.randn(4, 2, 512, kv_heads, width).to(dtype)
    norms = [(1 + 0.3 * torch.randn(width)).to(dtype) for _ in range(2)]
    angles = torch.rand(512, width // 2).repeat(1, 2) * 6
    args = product.to(DEVICE), past.to(DEVICE), [norm.to(DEVICE) for norm in norms], angles.to(DEVICE)
    step = attention(case, which)
    got = step(FlashOps(DEVICE, dtype, width, functions), *args)
    check_parity(got[:-2], lambda *args: step(PlainOps(), *args)[:-2], args)
    assert not any(held.any() for held in got[-2:])  # the other layer


# ---------------------------------------------------------------- whole models


@in_its_place
@pytest.mark.proof
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_the_engine_serves_as_with_our_own_attention(kind, monkeypatch):
    changes = {"sliding_window": 3} if kind == "gemma2" else {}
    policy = make_policy(make_model(kind, dtype=torch.bfloat16, head_dim=8, **changes))
    policy.users.add("a", make_choices(1))
    requests = [
        {"prompt": ids, "user": user, "max_new_tokens": 5}
        for ids, user in zip(make_ids(4, 9).tolist(), [BASE, "a", "a", BASE], strict=True)
    ]
    own = served(policy, requests)
    straw_package(monkeypatch)
    assert served(policy, requests, "flash-attn") == own
    assert policy.fused is not None and isinstance(policy.fused.ops, FlashOps)


def served(policy: Any, requests: list[dict[str, Any]], attention: str = "own") -> list[list[int]]:
    with use_backend("triton"):
        policy.fuse(attention=attention)
        with policy.engine(max_rows=3, max_tokens=4 * PAGE, step_tokens=16, background=False) as engine:
            return [result.tokens for result in engine.run(requests)]


# ---------------------------------------------------------------- what is asked for, and what is there


def straw_package(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_with_kvcache = functions.get("with_kvcache", with_kvcache)
    package.flash_attn_varlen_func = functions.get("varlen", varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which_ops, "_TRIED", set())


def asked_for(dtype: torch.dtype, width: int) -> Any:
    with use_backend("triton"):
        return which_ops.ops_for(DEVICE, dtype, width, "flash-attn")


@in_its_place
def test_the_installed_package_is_tried_first(monkeypatch, untried):
    straw_package(monkeypatch, varlen=lambda *args, **kwargs: 1.5 * varlen(*args, **kwargs))
    with pytest.raises(BackendError, match=r"its attention is 0\.\d* from the definition"):
        asked_for(torch.bfloat16, 16)
    straw_package(monkeypatch, with_kvcache=lambda q: q)
    with pytest.raises(BackendError, match="a block was tried and failed: TypeError"):
        asked_for(torch.bfloat16, 16)
    straw_package(monkeypatch)
    assert isinstance(asked_for(torch.bfloat16, 16), FlashOps)


@in_its_place
def test_what_it_does_not_take(monkeypatch):
    straw_package(monkeypatch)
    for dtype, width, message in ((torch.float32, 16, "got torch.float32"), (torch.bfloat16, 20, "got 20"),
                                  (torch.bfloat16, 264, "got 264")):  # fmt: skip
        with pytest.raises(BackendError, match=message):
            asked_for(dtype, width)


@in_its_place
def test_asked_for_by_name_it_runs_or_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    policy = make_policy(make_model(dtype=torch.bfloat16))
    with use_backend("triton"), pytest.raises(BackendError, match="flash-attn was asked for .* could not be imported"):
        policy.fuse(attention="flash-attn")
    with use_backend("cpu"), pytest.raises(BackendError, match="beside the backend 'triton' only, not 'cpu'"):
        policy.fuse(attention="flash-attn")
    with pytest.raises(ValueError, match="attention: expected one of auto, flash-attn, own, got 'flash'"):
        policy.fuse(attention="flash")


@in_its_place
def test_left_to_itself_it_falls_back_and_says_so(monkeypatch, caplog, untried):
    straw_package(monkeypatch, with_kvcache=lambda q: q)
    with use_backend("triton"), caplog.at_level(logging.WARNING, "fssa_fast"):
        ops = which_ops.ops_for(DEVICE, torch.bfloat16, 16)
    assert not isinstance(ops, FlashOps) and "attention runs by our own kernels: a block was tried" in caplog.text
    straw_package(monkeypatch)
    with use_backend("triton"):
        assert isinstance(which_ops.ops_for(DEVICE, torch.bfloat16, 16), FlashOps)
        assert not isinstance(which_ops.ops_for(DEVICE, torch.bfloat16, 16, "own"), FlashOps)


def test_the_report_says_whether_it_is_there():
    assert "flash-attn" in environment()
