"""The fused form computes what the attached one computes, row by row, and leaves the model as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import columns, cpu_backends, dtypes, normal, running
from tiny import VOCABULARY, make_choices, make_ids, make_model, make_policy, shake
from tolerances import check_parity

from fssa_fast import BASE, PRIOR, LoraConfig, SteerablePolicy, SteeringConfig, use_backend
from fssa_fast._native import load_native
from fssa_fast.generation import CannotFuse
from fssa_fast.generation.block_ops import AttentionInputs, AttentionSettings
from fssa_fast.generation.cache import BlockCache
from fssa_fast.generation.native_ops import NativeOps
from fssa_fast.generation.plain_ops import PlainOps
from fssa_fast.steering.config import EncoderConfig

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(load_native()[0] is None, reason="not built"))]
native = pytest.mark.skipif(load_native()[0] is None, reason="not built")

ADAPTERS = (
    LoraConfig(("q_proj", "v_proj"), 4),
    LoraConfig(("q_proj", "o_proj", "gate_proj", "down_proj"), 3, modulation="none"),
    LoraConfig(("k_proj", "up_proj"), 5, modulation="scale"),
)


def steered(kind: str, dtype: torch.dtype, **changes) -> SteerablePolicy:
    if kind in ("mistral", "gemma2", "gemma3"):
        changes.setdefault("sliding_window", 6)
    model = make_model(kind, attn_implementation="eager", **changes)
    for parameter in model.parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            generator = torch.Generator().manual_seed(len(parameter))
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    config = SteeringConfig(EncoderConfig(8, 16, heads=2), True, ADAPTERS)
    policy = shake(SteerablePolicy(model.to(dtype), config, capacity=4), 1, 0.1)
    policy.users.add("a", make_choices(1))
    policy.users.add("b", make_choices(2))
    return policy


def attached_logits(policy: SteerablePolicy, ids: torch.Tensor, users: list[str]) -> torch.Tensor:
    with torch.no_grad(), policy.users.slots(users) as slots:
        return policy.forward(ids, slots=slots).logits


def fused_logits(policy: SteerablePolicy, ids: torch.Tensor, users: list[str], prompt: int) -> torch.Tensor:
    """All logits: `prompt` tokens of every row at once, packed, then a token of every row a step."""
    fused, (rows, length) = policy.fused, ids.shape
    cache = fused.new_cache(rows, 64)
    for row in range(rows):
        cache.assign(row, [1 + 2 * row, 2 + 2 * row])
    logits = torch.empty(rows, length, VOCABULARY, dtype=fused.dtype)
    which = torch.arange(rows)
    with policy.users.slots(users) as slots:
        first = fused.forward(
            ids[:, :prompt].flatten(), slots.repeat_interleave(prompt), which.repeat_interleave(prompt),
            torch.arange(prompt).repeat(rows), cache,
        )  # fmt: skip
        logits[:, :prompt] = first.view(rows, prompt, -1)
        for at in range(prompt, length):
            logits[:, at] = fused.forward(ids[:, at], slots, which, torch.full((rows,), at), cache)
    return logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILY)
def test_same_logits_as_attached(kind, dtype, backend):
    policy, users, ids = steered(kind, dtype), [BASE, PRIOR, "a", "b"], make_ids(4, 36)
    with use_backend(backend):
        policy.fuse()
    assert isinstance(policy.fused.ops, NativeOps) == (backend == "cpu")
    with use_backend("reference"):
        plain = attached_logits(policy, ids, users)
        exact_policy = steered(kind, torch.float64)
        exact_policy.load_state_dict({k: v.double() for k, v in policy.state_dict().items()})
        for name in ("a", "b"):
            exact_policy.bank.rows[exact_policy.users.slot(name)] = policy.bank.rows[policy.users.slot(name)].double()
        exact_policy.bank.rows[1] = policy.bank.rows[1].double()
        exact = attached_logits(exact_policy, ids, users)
    got = fused_logits(policy, ids, users, 33)

    def error(logits: torch.Tensor) -> float:
        return (logits.double() - exact).square().mean().sqrt().item()

    # The root mean square over some nine thousand logits: their largest error is one logit's luck.
    assert error(got) <= 2 * error(plain) + torch.finfo(dtype).eps * exact.abs().mean().item()
    base = policy.model(ids[:1]).logits if backend == "reference" else plain[:1]
    assert (got[:1].double() - base.double()).abs().max() < 20 * (plain.double() - exact).abs().max()
    apart = (got[2] - got[3]).double().square().mean().sqrt()
    assert apart > 20 * error(got) or dtype == torch.bfloat16  # users differ by far more than rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_and_rows_that_are_base(backend):
    """Without an adapter's or film's effect, a base row is the plain model."""
    model = make_model(seed=3)
    ids = make_ids(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
    policy = make_policy(model, capacity=2)
    with use_backend(backend):
        policy.fuse()
    torch.testing.assert_close(fused_logits(policy, ids, [BASE, BASE], 9), plain, atol=2e-5, rtol=1e-5)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_their_company(dtype):
    """Bit for bit: alone, among others, in one step or in pieces."""
    policy = steered("llama", dtype)
    policy.fuse()
    ids = make_ids(4, 40)
    together = fused_logits(policy, ids, [BASE, PRIOR, "a", "b"], 7)
    for row, user in enumerate([BASE, PRIOR, "a", "b"]):
        for prompt in (1, 33, 40):
            assert torch.equal(fused_logits(policy, ids[row : row + 1], [user], prompt)[0], together[row])


def linear(ops: NativeOps | PlainOps, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.full((len(x), len(weight) + 1), 7.0, dtype=x.dtype)
    ops.linear(x, ops.pack(weight), bias, y[:, :-1])()
    return y


@pytest.mark.parametrize("isa", cpu_backends())
@pytest.mark.parametrize("sizes", [(7, 5), (32, 32), (70, 300), (33, 257)])
@dtypes
def test_native_linear(dtype, sizes, isa):
    """Within the rule of accuracy, nothing written beside, and a row's bits whatever the number of rows."""
    outputs, width = sizes
    torch.manual_seed(0)
    x, weight, bias = columns(50, width, dtype), normal(outputs, width, dtype=dtype), normal(outputs, dtype=dtype)
    with running(isa):
        ops = NativeOps(load_native()[0])
        together = linear(ops, x, weight, bias)
        check_parity(together, lambda *args: linear(PlainOps(), *args), (x, weight, bias))
        for rows in (1, 2, 11, 12, 13, 31):
            assert torch.equal(linear(ops, x[:rows], weight, bias), together[:rows])


# (query heads, kv heads, width), window, softcap, norms of heads
HEADS = {
    "of three": ((9, 3, 16), 0, 0.0, False),
    "of six": ((12, 2, 24), 5, 0.0, True),
    "of fourteen": ((14, 1, 34), 37, 3.0, True),
}


def attended(case: str, ops: NativeOps | PlainOps, pieces: list[int], *args: torch.Tensor) -> torch.Tensor:
    """What two prompts get, interleaved in steps of so many tokens of each."""
    (heads, kv_heads, width), window, softcap, normed = HEADS[case]
    product, q_norm, k_norm, cos, sin = args
    length = len(product) // 2
    cache = BlockCache(1, kv_heads, width, sequences=2, max_length=96, dtype=product.dtype, device=product.device)
    cache.table.copy_(torch.tensor([[3, 1, 5], [2, 6, 4]]))
    for held in (cache._keys, cache._values):
        held[:, cache.block * kv_heads * width :] = float("nan")  # what an earlier sequence may have left there
    settings = AttentionSettings(
        heads, kv_heads, width, q_norm if normed else None, k_norm if normed else None, 1e-5, cos.float(), sin.float(),
        0.3, softcap, window,
    )  # fmt: skip
    out = torch.empty(len(product), heads * width, dtype=product.dtype)
    begin = 0
    for size in pieces:
        where = torch.arange(begin, min(begin + size, length), dtype=torch.int32)
        for row in (0, 1) if size > 1 else (slice(None),):
            which = torch.arange(2, dtype=torch.int32)[row].repeat_interleave(len(where))
            rows = (which * length + where.repeat(len(which) // len(where))).long()
            q, k, v = product[rows].split([heads * width, kv_heads * width, kv_heads * width], 1)
            own = torch.empty(len(rows), heads * width, dtype=product.dtype)
            positions = where.repeat(len(which) // len(where))
            ops.attention(settings, AttentionInputs(q, k, v, positions, which), cache, 0, own)()
            out[rows] = own
        begin += size
    return out


@pytest.mark.parametrize("isa", cpu_backends())
@pytest.mark.parametrize("case", HEADS)
@dtypes
def test_native_attention(dtype, case, isa):
    """Within the rule of accuracy, over a cache full of NaN, and the same bits however a prompt comes in pieces."""
    torch.manual_seed(0)
    (heads, kv_heads, width), *_ = HEADS[case]
    angles = torch.rand(96, width // 2).repeat(1, 2) * 6
    norms = [1 + normal(width, dtype=dtype, scale=0.3) for _ in range(2)]
    args = normal(2 * 71, (heads + 2 * kv_heads) * width, dtype=dtype), *norms, angles.cos(), angles.sin()
    with running(isa):
        ops = NativeOps(load_native()[0])
        together = attended(case, ops, [71], *args)
        check_parity(together, lambda *args: attended(case, PlainOps(), [71], *args), args)
        for pieces in ([1] * 71, [33, 38], [5, 1, 1, 31, 40]):
            assert torch.equal(attended(case, ops, pieces, *args), together)


def test_unfuse_and_the_model_as_it_was():
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    policy = make_policy(model)
    ids = make_ids(1, 6)
    logits = attached_logits(policy, ids, [PRIOR])
    assert policy.fuse().nbytes > 0
    assert torch.equal(attached_logits(policy, ids, [PRIOR]), logits)
    policy.unfuse()
    assert policy.fused is None
    policy.detach()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "olmo2"])
def test_unknown_architectures_are_named(kind):
    with pytest.raises(CannotFuse, match=f"expected one of llama.*got '{kind}'"):
        make_policy(make_model(kind)).fuse()


def test_what_would_not_compute_the_same_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(CannotFuse, match="rope.*'dynamic'"):
        make_policy(make_model(rope_parameters=rope)).fuse()
    policy = make_policy()
    handle = policy.model.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    with pytest.raises(CannotFuse, match="hooks.*layers.0.mlp"):
        policy.fuse()
    handle.remove()
    policy.model.model.layers[1].forward = lambda *a, **k: None
    with pytest.raises(CannotFuse, match="layers.1"):
        policy.fuse()
    with pytest.raises(CannotFuse, match="activation.*'relu'"):
        make_policy(make_model(hidden_act="relu")).fuse()


def test_rope_kinds_are_read_from_the_model():
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    policy, ids = make_policy(make_model(rope_parameters=rope)), make_ids(2, 40)
    policy.fuse()
    torch.testing.assert_close(
        fused_logits(policy, ids, [PRIOR, BASE], 30), attached_logits(policy, ids, [PRIOR, BASE]), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_on_some_of_the_blocks(kind):
    types = ["full_attention", "sliding_attention"]
    model = make_model(kind, attn_implementation="eager", use_sliding_window=True, sliding_window=5, layer_types=types)
    policy, ids = make_policy(model), make_ids(2, 40)
    assert [block.attention.window for block in policy.fuse().blocks] == [0, 5]
    torch.testing.assert_close(
        fused_logits(policy, ids, [PRIOR, BASE], 33), attached_logits(policy, ids, [PRIOR, BASE]), atol=2e-4, rtol=1e-4
    )


def test_a_cache_is_let_go():
    policy = make_policy()
    fused = policy.fuse()
    engine = policy.engine(max_rows=2, max_tokens=64, background=False)
    engine.run([{"prompt": [5, 6], "user": PRIOR, "max_new_tokens": 2}])
    cache = weakref.ref(engine._cache)
    engine.close()
    del engine
    gc.collect()
    assert cache() is None and fused is policy.fused


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_steps(backend):
    policy = make_policy(capacity=2)
    with use_backend(backend):
        fused = policy.fuse()
    with pytest.raises(ValueError, match="max_length: expected at most the 128 positions"):
        fused.new_cache(1, 129)
    cache = fused.new_cache(1, 32)
    cache.assign(0, [1])
    one = torch.zeros(1, dtype=torch.long)
    for slot, sequence, position in ((9, 0, 0), (-1, 0, 0), (0, 3, 0), (0, -1, 0), (0, 0, 32), (0, 0, -1)):
        with pytest.raises(IndexError):
            fused.forward(one, one + slot, one + sequence, one + position, cache)
    with pytest.raises(ValueError, match="slots: expected one for each of the 2 tokens"):
        fused.forward(one.repeat(2), one, one.repeat(2), one.repeat(2), cache)


def test_a_model_on_several_devices_is_not_fused():
    policy = make_policy()
    policy.model.model.layers[1].mlp.to("meta")
    with pytest.raises(CannotFuse, match="expected all parameters on one device, got them on cpu.*, meta"):
        policy.fuse()
