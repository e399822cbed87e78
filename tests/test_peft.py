"""PEFT's adapter format, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LATENT, WIDTH, make_choices, make_ids, make_model, make_policy

from fssa_fast import BASE, PRIOR, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig
from fssa_fast.nn import CheckpointError
from fssa_fast.policy.peft_format import load_peft, read_peft_config, save_peft

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}


def plain_policy(name: str, rank: int = 4, alpha: float = 8.0) -> SteerablePolicy:
    lora = LoraConfig(TARGETS[name], rank, alpha, "none")
    return SteerablePolicy(make_model(name), SteeringConfig(EncoderConfig(WIDTH, LATENT, heads=2), False, (lora,)))


def randomise(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)


@torch.no_grad()
def steered(policy: SteerablePolicy) -> torch.Tensor:
    policy.users.add("alice", make_choices(1))
    with policy.steer(["alice", BASE, PRIOR]):
        return policy.model(make_ids(3)).logits


@pytest.mark.parametrize("name", TARGETS)
def test_peft_reads_what_is_written_here(name: str, tmp_path: Path) -> None:
    policy = plain_policy(name)
    randomise(p for n, p in policy.named_parameters() if ".fssa." in n)
    wanted = steered(policy)
    save_peft(policy, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(name), tmp_path)
    with torch.no_grad():
        found = theirs(make_ids(3)).logits
        torch.testing.assert_close(wanted[[0, 2]], found[[0, 2]], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(wanted[1], found[1], atol=0.01)
        with theirs.disable_adapter():
            assert torch.equal(theirs(make_ids(3)).logits[1], wanted[1])
    policy.users.scale("alice", 0.5)  # PEFT's way to halve an adapter
    for module in theirs.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    with torch.no_grad(), policy.steer(["alice"] * 3):
        torch.testing.assert_close(policy.model(make_ids(3)).logits, theirs(make_ids(3)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_what_peft_writes_is_read_here(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS[name]), task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(make_model(name), config)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs(make_ids(3)).logits
    assert read_peft_config(tmp_path) == LoraConfig(tuple(sorted(TARGETS[name])), 4, 8.0, "none")
    policy = plain_policy(name)
    load_peft(policy, tmp_path)
    found = steered(policy)
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1], wanted[1], atol=0.01)
    save_peft(policy, tmp_path / "again")
    ours, original = load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert set(ours) == set(original) and all(torch.equal(ours[key], original[key]) for key in ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias: .*'all'"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: .*'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "LoRA"),
        ({"r": 3}, "rank 4.*got 3"),
        ({"lora_alpha": 9}, "alpha 8.0.*9"),
        ({"r": 0}, "r: .*0"),
        ({"r": True}, "r: .*True"),
        ({"lora_alpha": "8"}, "lora_alpha: .*'8'"),
        ({"target_modules": "all-linear"}, "target_modules: .*'all-linear'"),
        ({"target_modules": []}, r"target_modules: .*\[\]"),
    ],
)
def test_what_is_not_this_adapter_is_named_and_nothing_changed(changes: Any, message: str, tmp_path: Path) -> None:
    policy = plain_policy("llama")
    save_peft(policy, tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**data, **changes}))
    randomise(p for n, p in policy.named_parameters() if ".fssa." in n)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_peft(policy, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), "is missing"),
        (lambda t, n: t.update(extra=torch.zeros(1)), "'extra' is not expected"),
        (lambda t, n: t.update({n: t[n].T.contiguous()}), "expected shape"),
        (lambda t, n: t[n].fill_(float("nan")), "NaN"),
    ],
)
def test_damaged_weights_are_named_and_nothing_changed(change: Any, message: str, tmp_path: Path) -> None:
    policy = plain_policy("llama")
    save_peft(policy, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors, "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    randomise(p for n, p in policy.named_parameters() if ".fssa." in n)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_peft(policy, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


def test_damaged_configurations_are_named(tmp_path: Path) -> None:
    for data in (b"", b"{", b"[]", b"9" * 10_000, b"\xff"):
        (tmp_path / CONFIG).write_bytes(data)
        with pytest.raises(CheckpointError, match=CONFIG):
            read_peft_config(tmp_path)
    with pytest.raises(CheckpointError, match=CONFIG):
        read_peft_config(tmp_path / "nowhere")


def test_a_policy_without_one_plain_adapter(tmp_path: Path) -> None:
    for modulations in (("scale",), ("none", "none")):
        policy = make_policy(modulations=modulations)
        for use in (save_peft, load_peft):
            with pytest.raises(ValueError, match="policy: expected one plain adapter"):
                use(policy, tmp_path)


def test_the_plain_adapter_beside_modulated_ones(tmp_path: Path) -> None:
    policy = make_policy(modulations=("scale_shift", "none", "scale"))
    save_peft(policy, tmp_path)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    randomise(p for n, p in policy.named_parameters() if n.endswith((".fssa.a.1", ".fssa.b.1")))
    load_peft(policy, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())
