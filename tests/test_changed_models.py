"""A model that is converted, moved, trained, copied or saved while it is attached: followed, or refused in time."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_choices, make_ids, make_model, make_policy
from torch import nn

from fssa_fast import BASE, PRIOR, SteerablePolicy
from fssa_fast.generation import StaleFused

PROMPT = [5, 6, 7, 8]


def with_users(dtype: torch.dtype = torch.float32) -> SteerablePolicy:
    policy = make_policy(make_model(dtype=dtype))
    policy.users.add("alice", make_choices(1))
    return policy


def answers(policy: SteerablePolicy) -> list[list[int]]:
    requests = [{"prompt": PROMPT, "user": user, "max_new_tokens": 8} for user in ("alice", PRIOR, BASE)]
    with policy.engine(background=False) as engine:
        return [result.tokens for result in engine.run(requests)]


def attached(policy: SteerablePolicy) -> list[list[int]]:
    prompts = torch.tensor([PROMPT] * 3)
    whole = policy.generate(prompts, ["alice", PRIOR, BASE], max_new_tokens=8, do_sample=False)
    rows = whole[:, len(PROMPT) :].tolist()
    end = policy.model.generation_config.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@pytest.mark.parametrize("whole", [True, False], ids=["policy", "model"])
@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_bank_follows_the_models_dtype(before: torch.dtype, after: torch.dtype, whole: bool) -> None:
    policy = with_users(before)
    answers(policy)
    (policy if whole else policy.model).to(after)
    twin = make_policy(make_model(dtype=before)).to(after)  # made so, without anything fused or answered before
    twin.users.add("alice", make_choices(1))
    twin.bank.rows.copy_(policy.bank.rows)
    assert policy.model(make_ids(1)).logits.dtype == after
    assert answers(policy) == answers(twin)
    assert policy.bank.rows.dtype == after
    if after == torch.float32:
        assert answers(policy) == attached(policy)


def test_a_conversion_while_rows_are_read_is_refused_before_anything_changes() -> None:
    policy = with_users()
    with policy.steer(["alice"]), pytest.raises(RuntimeError, match="bank: expected no generation under way"):
        policy.bfloat16()
    assert {parameter.dtype for parameter in policy.parameters()} == {policy.bank.rows.dtype} == {torch.float32}


def test_a_reader_that_comes_during_a_conversion_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the model would be converted beside a bank that no longer may be."""
    policy, converted = with_users(), threading.Event()
    read: list[torch.dtype] = []

    def reader() -> None:
        with policy.steer(["alice"]):
            read.append(policy.bank.rows.dtype)
            converted.wait(30)

    def convert(*args: Any, **options: Any) -> Any:
        model = nn.Module._apply(policy.model, *args, **options)
        came.start()
        came.join(0.3)  # by then it reads, or waits
        return model

    came = threading.Thread(target=reader)
    monkeypatch.setattr(policy.model, "_apply", convert)
    try:
        policy.bfloat16()
    finally:
        converted.set()
        came.join()
    assert {parameter.dtype for parameter in policy.parameters()} == {policy.bank.rows.dtype, *read} == {torch.bfloat16}


@pytest.mark.parametrize("step", ["submit", "step", "forward"])
def test_rows_of_another_dtype_are_never_read_as_the_models(step: str) -> None:
    """The kernels are handed addresses: half as wide rows would be read as other numbers, past their end."""
    policy = with_users()
    fused = policy.fuse()
    with policy.engine(background=False) as engine:
        handle = engine.submit(PROMPT, BASE, max_new_tokens=8) if step == "step" else None
        policy.bank.rows = policy.bank.rows.bfloat16()
        if step == "forward":
            one = torch.zeros(1, dtype=torch.int32)
            with pytest.raises(StaleFused, match="bank: expected rows of torch.float32"):
                fused.forward(torch.tensor([5]), one, one, one, fused.new_cache(1, 8))
        elif handle is not None:
            with pytest.raises(StaleFused, match="bank: expected rows of torch.float32"):
                handle.result()
        else:
            with pytest.raises(StaleFused, match="bank: expected rows of torch.float32"):
                engine.submit(PROMPT, BASE, max_new_tokens=8).result()


def trained(policy: SteerablePolicy) -> None:
    for _, child in policy.attachment.children():
        with torch.no_grad():
            child.b[0].mul_(2.0)


def replaced(policy: SteerablePolicy) -> None:
    weight = policy.model.get_output_embeddings().weight
    weight.data = weight.data.clone()


@pytest.mark.parametrize("change", [trained, replaced])
def test_a_parameter_changed_after_fusing_is_noticed(change: Any) -> None:
    policy = with_users()
    fused = policy.fuse()
    before = answers(policy)
    with policy.engine(background=False) as engine:
        under_way = engine.submit(PROMPT, "alice", max_new_tokens=8)
        engine.step()
        change(policy)
        with pytest.raises(StaleFused, match="parameters that were fused.*call policy.fuse"):
            engine.submit(PROMPT, "alice")
        if change is replaced:  # the packed weights are what they were: what has begun ends with them
            assert under_way.result().tokens == before[0]
    if change is trained:
        one = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(StaleFused):
            fused.forward(torch.tensor([5]), one, one, one, fused.new_cache(1, 8))
    assert answers(policy) == attached(policy)  # a new engine fuses again
    assert policy.fused is not fused


def test_copies_say_how_a_policy_is_kept() -> None:
    policy = with_users()
    for copied in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="policy: expected save_pretrained and from_pretrained"):
            copied(policy)


def test_the_base_model_saves_itself_alone(tmp_path: Path) -> None:
    """Not our adapters in its file: whoever loads it would be told of tensors it does not know."""
    policy, plain = with_users(), make_model()
    policy.model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "fssa" in name]
    loaded, info = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(make_ids(1)).logits, plain(make_ids(1)).logits)
    policy.model.load_state_dict(plain.state_dict())  # and takes its own state as a whole one
    assert any(".fssa." in name for name in policy.state_dict())  # which is not what the policy keeps of itself
    policy.load_state_dict(policy.state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_models_own_checkpointing_is_refused(reentrant: bool) -> None:
    """Its backward would compute the blocks again without users, or with those served by then."""
    policy = with_users()
    policy.model.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match="expected gradient checkpointing by the policy"), policy.steer(["alice"]):
        policy.model(make_ids(1))
    with pytest.raises(ValueError, match="expected gradient checkpointing by the policy"):
        policy(make_ids(1), slots=torch.tensor([1]))
    policy.gradient_checkpointing_enable()
    with policy.steer(["alice"]):
        policy.model(make_ids(1)).logits.sum().backward()
    with torch.no_grad(), policy.steer(["alice"]):
        policy.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        policy.model(make_ids(1))  # nothing is computed again where there is no backward
