"""What of the plugin for vLLM needs no vLLM: places and shards, latents as text, salts, columns, slots, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

from fssa_fast import Choice, EncoderConfig, SteerablePolicy, SteeringConfig
from fssa_fast.users.sqlite_store import SqliteStore
from fssa_fast.users.store import Change, StoredUser, StoreError
from fssa_fast.vllm import BASE, PRIOR
from fssa_fast.vllm.latents import Steering, cache_salt, decode, encode
from fssa_fast.vllm.named import Bound, NamedUsers
from fssa_fast.vllm.options import read_options
from fssa_fast.vllm.places import cut, describe, find
from fssa_fast.vllm.refusals import refuse
from fssa_fast.vllm.rows import Columns, WorkerRows
from fssa_fast.vllm.runners import RequestSlots, prepare_inputs, steered_state
from fssa_fast.vllm.steering import LoraChild, steer_block, steer_linear

# ---------------------------------------------------------------- places and shards: classes named as vLLM's


class ReplicatedLinear(torch.nn.Module):
    pass


class ColumnParallelLinear(torch.nn.Module):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    pass


class RowParallelLinear(torch.nn.Module):
    pass


class Plain:
    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return F.linear(x, layer.weight)


def linear(cls: type, inputs: int, outputs: int, size: int, rank: int, **more: Any) -> Any:
    layer = cls()
    given = dict(input_size=inputs, output_size=outputs, tp_size=size, tp_rank=rank, quant_method=Plain()) | more
    for name, value in given.items():
        setattr(layer, name, value)
    return layer


def qkv(size: int, rank: int) -> Any:
    heads = dict(total_num_heads=8, total_num_kv_heads=2, head_size=4, v_head_size=4)
    return linear(QKVParallelLinear, 12, 48, size, rank, **heads, num_kv_head_replicas=max(1, size // 2))


def gate_up(size: int, rank: int) -> Any:
    return linear(MergedColumnParallelLinear, 12, 32, size, rank, output_sizes=[16, 16])


# The linear of one of so many workers, the adapted segments, and the outputs of all that are merged in it.
KINDS = {
    "replicated": (lambda size, rank: linear(ReplicatedLinear, 12, 20, size, rank), slice(0, None), [20]),
    "column": (lambda size, rank: linear(ColumnParallelLinear, 12, 16, size, rank), slice(0, None), [16]),
    "row": (lambda size, rank: linear(RowParallelLinear, 12, 20, size, rank), slice(0, None), [20]),
    "gate": (gate_up, slice(0, 1), [16, 16]),
    "up": (gate_up, slice(1, 2), [16, 16]),
    "both": (gate_up, slice(0, None), [16, 16]),
    "q": (qkv, slice(0, 1), [32, 8, 8]),
    "k": (qkv, slice(1, 2), [32, 8, 8]),
    "v": (qkv, slice(2, 3), [32, 8, 8]),
    "whole qkv": (qkv, slice(0, None), [32, 8, 8]),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_of_all_workers_are_the_whole_linear(kind: str, size: int) -> None:
    make, segments, wholes = KINDS[kind]
    torch.manual_seed(0)
    x, weight = torch.randn(5, 12), torch.randn(sum(wholes), 12)
    a, b = torch.randn(3, 12), torch.randn(3, sum(wholes[segments]))
    rows = WorkerRows(torch.randn(6, 2), torch.randn(6), requests=2, tokens=8, dtype=torch.float32, device=x.device)
    rows.rows[1:].normal_()
    rows.slots[:5] = torch.tensor([0, 1, 2, 1, 2])
    gamma, beta = slice(0, 3), slice(3, 6)

    own = rows.rows[rows.slots[:5].long()]
    first = sum(wholes[: segments.start])
    wanted = x @ weight.T
    wanted[:, first : first + b.shape[1]] += (own[:, gamma] * (x @ a.T) + own[:, beta]) @ b

    outputs = []
    for rank in range(size):
        layer = make(size, rank)
        shards = describe(layer)
        merged = weight.split(wholes)
        layer.weight = torch.cat([w[s.here] for w, s in zip(merged, shards.segments, strict=True)])[:, shards.inputs]
        mine = cut(a, b, shards, segments)
        mine_a, mine_b = (part.contiguous() for part in mine)
        steer_linear(layer, LoraChild(rows, mine_a, mine_b, gamma, beta if shards.adds_shift else None))
        assert isinstance(layer.quant_method, Plain) and layer.requires_unquantized_input
        outputs.append(layer.quant_method.apply(layer, x[:, shards.inputs].contiguous()))
    if kind == "row":
        torch.testing.assert_close(sum(outputs), wanted)
        return
    for output, rank in zip(outputs, range(size), strict=True):
        here = describe(make(size, rank)).segments
        parts = [w[:, s.here] for w, s in zip(wanted.split(wholes, 1), here, strict=True)]
        torch.testing.assert_close(output, torch.cat(parts, 1))
        plain = F.linear(x, torch.cat([w[s.here] for w, s in zip(weight.split(wholes), here, strict=True)]))
        assert torch.equal(output[0], plain[0])  # a base row


def test_a_linear_of_another_kind_is_refused() -> None:
    class IndexedQKVParallelLinear(QKVParallelLinear):
        pass

    with pytest.raises(ValueError, match="linear: expected .* got IndexedQKVParallelLinear"):
        describe(linear(IndexedQKVParallelLinear, 12, 48, 1, 0))
    with pytest.raises(ValueError, match="expected one of 7 outputs"):
        cut(torch.zeros(2, 12), torch.zeros(2, 7), describe(qkv(1, 0)), slice(0, 1))


def test_projections_are_found_under_their_merged_names() -> None:
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    modules = {"model.layers.0.self_attn.qkv_proj": 1, "language_model.model.layers.0.mlp.down_proj": 2}
    place = find("model.layers.0.self_attn.v_proj", modules, packed)
    assert place is not None and (place.path, place.segments) == ("model.layers.0.self_attn.qkv_proj", slice(2, 3))
    place = find("model.layers.0.mlp.down_proj", modules, packed)
    assert place is not None and place.path == "language_model.model.layers.0.mlp.down_proj"
    assert find("model.layers.1.self_attn.v_proj", modules, packed) is None


# ---------------------------------------------------------------- latents and salts


def test_a_latent_is_the_same_after_its_text() -> None:
    latent = torch.randn(64).bfloat16()
    back = decode(encode(Steering(0.1, latent)), 64)
    assert back.strength == 0.1 and torch.equal(back.latent, latent)


@pytest.mark.parametrize(
    "text",
    ["", "1.0", "1.0:", "nan:AAAA", "1.0:AACAfw==", "1.0:gH+Afw==", "1:####", 3, None, "1.0:AAAAAA==AAAA", "é:ü"],
)
def test_texts_that_are_no_latent_raise(text: Any) -> None:
    with pytest.raises(ValueError, match="latent: expected"):
        decode(text, 2)


def test_salts_tell_users_and_versions_and_the_base_apart() -> None:
    texts = [None, "1.0:AAA", "0.5:AAA", "1.0:AAB"]
    salts = [cache_salt(text, own) for text in texts for own in (None, "a", "latent 1.0:AAA", "1.0:AAA")]
    assert len(set(salts)) == len(salts) and salts[0] is None
    assert cache_salt("1.0:AAA", None) not in {cache_salt(None, salt) for salt in salts}  # a salt cannot be forged


# ---------------------------------------------------------------- rows and slots


def worker(requests: int = 3, tokens: int = 12) -> WorkerRows:
    weight, bias = torch.randn(5, 4), torch.randn(5)
    return WorkerRows(weight, bias, requests=requests, tokens=tokens, dtype=torch.float32, device=torch.device("cpu"))


def text(seed: int, strength: float = 1.0) -> str:
    return encode(Steering(strength, torch.randn(4, generator=torch.Generator().manual_seed(seed))))


def row(rows: WorkerRows, asked: str | None) -> torch.Tensor:
    if asked is None:
        return torch.zeros(5)
    steering = decode(asked, 4)
    return steering.strength * F.linear(steering.latent.float()[None], rows.weight, rows.bias)[0]


def test_columns_are_gathered_and_strengths_are_columns_like_others() -> None:
    columns = Columns(torch.arange(12.0).view(6, 2), torch.arange(6.0))
    assert columns.add(slice(4, 6), 2) == slice(0, 2)
    assert columns.add(slice(6, 7), 3) == slice(2, 5)  # beyond the modulated ones: a plain adapter's strength
    assert columns.add_zeros(1) == slice(5, 6)
    weight, bias = columns.gathered()
    assert weight.tolist() == [[8, 9], [10, 11], *[[0, 0]] * 4] and bias.tolist() == [4, 5, 1, 1, 1, 0]


def test_every_token_reads_its_requests_row_through_joins_moves_and_preemptions() -> None:
    torch.manual_seed(0)
    rows = worker()
    slots = RequestSlots(rows)
    address = rows.rows.data_ptr(), rows.slots.data_ptr()
    steps: list[dict[str, tuple[str | None, int]]] = [
        {"a": (text(1), 4), "b": (text(2), 1), "base": (None, 2)},
        {"b": (text(2), 1), "a": (text(1), 1), "c": (text(1, 0.5), 7)},
        {"c": (text(3), 1), "d": (text(4), 3), "a": (text(1), 2)},  # b leaves, c is another's now
        {"b": (text(2), 5)},
    ]
    for step in steps:
        slots.update(step)
        owners = [asked for asked, count in step.values() for _ in range(count)]
        found = rows.rows[rows.slots.long()]
        assert torch.equal(found[: len(owners)], torch.stack([row(rows, asked) for asked in owners]))
        assert not found[len(owners) :].any()  # what pads a step is the base
    assert address == (rows.rows.data_ptr(), rows.slots.data_ptr())


class RecordOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the ops of a block, and which look at numbers on the host."""

    HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def host_reads(self) -> list[str]:
        return [name for name in self.names if any(word in name for word in self.HOST)]


def test_the_second_runners_state_points_tokens_without_a_look_at_them() -> None:
    torch.manual_seed(0)

    class State:
        def __init__(self, model: Any) -> None:
            self.model = model

        def add_request(self, req_index: int, new_req_data: Any) -> None: ...

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, int]:
            return {"positions": 1}

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, int]:
            return {}

    rows = worker()
    state = steered_state(State)(SimpleNamespace(fssa=rows))
    texts = {0: text(1), 1: None, 2: text(2)}
    for index, asked in texts.items():
        params = SimpleNamespace(extra_args=None if asked is None else {"fssa": asked})
        state.add_request(index, SimpleNamespace(sampling_params=params))
    batch = SimpleNamespace(
        num_reqs=3,
        query_start_loc=torch.tensor([0, 1, 4, 6, 6, 6], dtype=torch.int32),
        idx_mapping=torch.tensor([2, 0, 1, 0, 0]),
    )
    address = rows.slots.data_ptr()
    with RecordOps() as record:
        assert state.prepare_inputs(batch, None) == {"positions": 1}
    assert record.host_reads() == [] and rows.slots.data_ptr() == address
    assert rows.slots.tolist() == [3, 1, 1, 1, 2, 2, *[0] * 6]
    owners = torch.stack([row(rows, texts[i]) for i in (2, 0, 0, 0, 1, 1)])
    assert torch.equal(rows.rows[rows.slots[:6].long()], owners)
    state.prepare_dummy_inputs(2, 4)
    assert not rows.slots.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [True, False])
def test_film_changes_the_stream_by_the_row_of_every_token_and_looks_at_no_number(
    apart: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    width = 16
    rows = WorkerRows(
        torch.zeros(40, 4), torch.zeros(40), requests=2, tokens=8, dtype=dtype, device=torch.device("cpu")
    )
    rows.rows[1:].normal_()
    rows.slots[:4] = torch.tensor([2, 0, 1, 2])
    block = torch.nn.Identity()
    steer_block(block, rows, slice(3, 3 + 2 * width))
    added, stream = torch.randn(2, 4, width).to(dtype)
    with RecordOps() as record:
        output = block((added, stream) if apart else stream)
    assert record.host_reads() == []
    own = rows.rows[rows.slots[:4].long()].double()
    hidden = stream.double() + (added.double() if apart else 0)
    wanted = hidden * (1 + own[:, 3 : 3 + width]) + own[:, 3 + width : 3 + 2 * width]
    new = output[1] if apart else output
    close = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.05, rtol=0.02)
    torch.testing.assert_close(new.double() + (added.double() if apart else 0), wanted, **close)
    assert torch.equal(new[1], stream[1]) and (not apart or output[0] is added)  # a base row


def test_what_a_captured_step_does_is_the_same_for_whoever_is_served_and_sees_their_rows() -> None:
    """Traced once and replayed on the same buffers, as a CUDA graph is: no host reads, copies or fills of their own."""
    torch.manual_seed(0)
    rows, width = worker(), 2
    linear_ = linear(ReplicatedLinear, 12, 2 * width, 1, 0)
    linear_.weight = torch.randn(2 * width, 12)
    child = LoraChild(rows, torch.randn(1, 12), torch.randn(1, 2 * width), slice(0, 1), slice(1, 2))
    steer_linear(linear_, child)
    block = torch.nn.Identity()
    steer_block(block, rows, slice(1, 1 + 2 * width))
    hangers = [rows.rows, rows.slots, child.a, child.b]
    addresses = [tensor.data_ptr() for tensor in hangers]

    def step(x: torch.Tensor) -> torch.Tensor:
        added, stream = block(linear_.quant_method.apply(linear_, x).chunk(2, -1))
        return added + stream

    def serve(*seeds: int) -> None:
        for slot, seed in enumerate(seeds, 1):
            rows.fill(slot, text(seed))
        rows.point(torch.tensor([0, 1, 3, 6], dtype=torch.int32), torch.randperm(3))

    x = torch.randn(6, 12)
    with torch.no_grad():
        serve(1, 2, 3)
        graph = make_fx(step)(x)
        kept = {getattr(graph, str(node.target)).data_ptr() for node in graph.graph.nodes if node.op == "get_attr"}
        assert set(addresses) <= kept  # the buffers themselves, not what was in them
        targets = [node.target for node in graph.graph.nodes]
        traced = [target.name() for target in targets if isinstance(target, torch._ops.OpOverload)]
        outside = (*RecordOps.HOST, "_to_copy", "pin_memory", "lift_fresh", "empty", "zeros", "full", "arange", "copy_")
        assert "fssa::lora_" in traced
        assert [name for name in traced if any(word in name for word in outside)] == []
        before = graph(x)
        with RecordOps() as first:
            assert torch.equal(graph(x), step(x))
        serve(4, 5, 6)
        with RecordOps() as second:
            assert torch.equal(graph(x), step(x))
        assert first.names == second.names and not torch.equal(graph(x), before)
    assert addresses == [tensor.data_ptr() for tensor in hangers]


def test_a_runner_whose_model_is_not_steered_is_left_alone() -> None:
    runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(1, 1))
    assert prepare_inputs(lambda own, output: output, runner, "prepared") == "prepared"
    assert list(vars(runner)) == ["get_model"]


# ---------------------------------------------------------------- users by name


@pytest.fixture
def users(tmp_path: Any) -> NamedUsers:
    store = SqliteStore(tmp_path / "users.db")
    store.put([Change(StoredUser("alice", 1, 2.0, torch.full((4,), 1.0).bfloat16(), "own"))])
    store.put([Change(StoredUser("bob", 1, 1.0, torch.full((4,), -2.0).bfloat16(), "own"))])
    return NamedUsers(store, torch.zeros(4).bfloat16(), encoder="own", bounds=[Bound(1.0, 1.0, 1e4)])


def test_names_blends_and_latents_become_texts(users: NamedUsers) -> None:
    def found(asked: dict[str, Any]) -> tuple[float, float]:
        steering = decode(users.text(asked) or "", 4)
        return steering.strength, float(steering.latent[0])

    assert users.text({"fssa_user": BASE}) is None
    assert found({}) == found({"fssa_user": PRIOR}) == (1.0, 0.0)
    assert found({"fssa_user": "alice"}) == (2.0, 1.0)
    assert found({"fssa_user": "alice", "fssa_strength": 0.5}) == (1.0, 1.0)
    assert found({"fssa_users": '{"alice": 0.5, "bob": 1}'}) == (2.0, -0.5)
    assert found({"fssa_users": {"alice": 1.0, BASE: 3.0}}) == (2.0, 1.0)
    assert found({"fssa_latent": text(1, 3.0)})[0] == 3.0


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"fssa_user": "nobody"}, "user: expected one that the store has, got 'nobody'"),
        ({"fssa_user": ""}, "user: expected a name"),
        ({"fssa_user": 3}, "user: expected a name"),
        ({"fssa_user": "\ud800"}, "user: expected a text in Unicode"),
        ({"fssa_user": "alice", "fssa_users": "{}"}, "expected it alone"),
        ({"fssa_users": "{"}, "expected JSON"),
        ({"fssa_users": "[" * 100_000}, "expected JSON"),
        ({"fssa_users": ["alice", 1]}, "expected weights by name"),
        ({"fssa_users": {"alice": float("nan")}}, "expected a finite number"),
        ({"fssa_users": {"alice": 1.0, "bob": -2.0}}, "is not 0"),
        ({"fssa_users": {"alice": 1e308, "bob": 1e308}}, "expected"),
        ({"fssa_users": {str(i): 1 for i in range(65)}}, "at most 64"),
        ({"fssa_strength": "1"}, "fssa_strength: expected a finite number"),
        ({"fssa_strength": True}, "fssa_strength: expected a finite number"),
        ({"fssa_strength": 10**400}, "fssa_strength: expected a finite number"),
        ({"fssa_strength": 1e6}, "fssa_strength: expected rows up to"),
        ({"fssa_latent": "1e9:" + "AIA=" * 2}, "latent: expected"),
        ({"fssa": text(1)}, "fssa: unknown"),
        ({"fssa_usr": "alice"}, "fssa_usr: unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_raises_and_says_so(users: NamedUsers, asked: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        users.text(asked)


def test_a_latent_of_another_encoder_is_not_served(users: NamedUsers) -> None:
    users._store.put([Change(StoredUser("carol", 1, 1.0, torch.zeros(4).bfloat16(), "another"))])
    with pytest.raises(StoreError, match="carol"):
        users.text({"fssa_user": "carol"})


def test_users_are_found_in_postgresql_by_the_url_in_the_environment(
    postgres: Any, monkeypatch: Any, tmp_path: Any
) -> None:
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)).eval()
    policy = SteerablePolicy(model, SteeringConfig(EncoderConfig(embedding_width=8, latent_width=16), film=True))
    policy.save_pretrained(tmp_path / "policy")
    url = postgres.database().where
    policy.use_store(url)
    policy.users.add("alice", [Choice(torch.ones(8), torch.zeros(8))])
    monkeypatch.setenv("FSSA_USERS", url)
    options = read_options(
        SimpleNamespace(load_format="fssa", model_loader_extra_config={"fssa": {"policy": str(tmp_path / "policy")}})
    )
    assert options is not None
    users = NamedUsers.open(options, SimpleNamespace(hf_text_config=model.config, dtype=torch.bfloat16))
    texts = [users.text({}), users.text({"fssa_user": "alice"})]
    policy.users.update("alice", [Choice(torch.zeros(8), torch.ones(8))])
    texts.append(users.text({"fssa_user": "alice"}))
    assert len(set(texts)) == 3  # the prior, and alice before and after


# ---------------------------------------------------------------- refusals and options


def config(**changes: Any) -> Any:
    transfer = changes.get("connector") and SimpleNamespace(kv_connector=changes["connector"])
    return SimpleNamespace(
        parallel_config=SimpleNamespace(use_ubatching=changes.get("ubatching", False)),
        kv_transfer_config=transfer or None,
        model_config=SimpleNamespace(runner_type=changes.get("runner", "generate")),
    )


def test_what_could_answer_as_somebody_else_is_refused() -> None:
    refuse(config())
    refuse(config(connector="OffloadingConnector"))
    for changes, message in (
        ({"ubatching": True}, "dual-batch overlap: expected off"),
        ({"connector": "ExampleConnector"}, "kv_connector: .* got 'ExampleConnector'"),
        ({"runner": "pooling"}, "runner: expected generate"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(config(**changes))


def test_options_are_read_under_our_format_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(load_format: str, extra: Any) -> Any:
        return read_options(SimpleNamespace(load_format=load_format, model_loader_extra_config=extra))

    monkeypatch.setenv("FSSA_USERS", "users.db")
    assert read("auto", {"fssa": {"policy": "p"}}) is None
    assert read("fssa", {"fssa": {"policy": "p"}}).users == "users.db"
    assert read("fssa", {"fssa": {"policy": "p", "users": "u"}}).users == "u"
    for extra in ({}, {"fssa": {}}, {"fssa": {"policy": "p", "polcy": "q"}}, {"fssa": {"policy": 3}}, None):
        with pytest.raises(ValueError, match="model_loader_extra_config: expected"):
            read("fssa", extra)
