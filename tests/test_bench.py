"""The benchmarks run: every system of the decode benchmark takes a step, and those that compute the same agree."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

from bench.decode import SHAPES, Bench, first_tokens, make_bare, make_policy, random_base, stream
from bench.users import additions, at_rest, changes


@pytest.fixture(scope="module")
def bench() -> Bench:
    base = make_model(num_key_value_heads=4, max_position_embeddings=2048)
    return Bench(base, make_policy(base, 4, 8), 4, 3, 32)


@pytest.mark.parametrize("system", ["transformers", "reference", "peft_mixed", "loop", "attached", "fused", "engine"])
def test_every_system_takes_steps(bench, system):
    if system in ("reference", "peft_mixed"):
        pytest.importorskip("peft")
    with torch.inference_mode():
        ((_, step),) = bench.steps([system])
        first, second = step(), step()
    if isinstance(first, torch.Tensor):
        assert first.shape == (3,) and torch.equal(first, second)


def test_those_that_compute_the_same_agree(bench):
    with torch.inference_mode():
        steps = dict(bench.steps(["transformers", "attached", "fused", "fused_base"]))
        found = {name: step().clone() for name, step in steps.items()}
    assert torch.equal(found["transformers"], found["fused_base"]) and torch.equal(found["attached"], found["fused"])
    assert set(first_tokens(bench, ["transformers", "attached", "fused"])) == {"transformers", "attached", "fused"}


def test_the_base_is_fused_without_an_adapter(bench):
    bare, steered = make_bare(bench.base).fuse(), bench.policy.fused or bench.policy.fuse()
    assert all(not group.adapters for block in bare.blocks for group in (block.qkv, block.o, block.gate_up, block.down))
    assert bare.nbytes < steered.nbytes


def test_random_models_of_a_shape():
    config = SHAPES["qwen2.5-1.5b"]()
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (1536, 28, 2)
    base = random_base(make_model("qwen2", max_position_embeddings=2048).config, "cpu")
    assert base.dtype == torch.bfloat16
    small = Bench(base, make_policy(base, 4, 2), 4, 2, 8)
    with torch.inference_mode():
        ((_, step),) = small.steps(["fused"])
        assert step().shape == (2,)


def test_the_stream_is_what_each_request_gets_alone(bench):
    found = stream(bench.policy, 12, 3, 1.0)
    assert found["same_as_alone"] and found["requests"] == 12 and found["users"] == 6


def test_users(tmp_path):
    added = additions(12, 5)
    assert added["largest_difference"] < 1e-4 * added["largest_latent"]
    assert [result["ms"] > 0 for result in changes(tmp_path, 1)] == [True, True]
    for shared in (True, False):
        assert at_rest(tmp_path, 50, shared, 5)["bytes_a_user"] > 512
