"""`policy.generate` by the fused form: what transformers would have answered, and all else left to transformers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_generation import CHAT, GREEDY, MIXED, served
from tiny import EOS, PAD, make_ids

from fssa_fast import BASE, SteerablePolicy, UnknownUser, use_backend
from fssa_fast.generation import Engine


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that have been made."""
    made: list[Engine] = []
    init = Engine.__init__

    def note(self: Engine, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Engine, "__init__", note)
    return made


def fused(name: str = "llama") -> SteerablePolicy:
    policy = served(name)
    policy.fuse()
    return policy


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_greedy_answers_are_those_of_the_attached_form(name: str, engines: list[Engine]) -> None:
    policy, other = fused(name), served(name)
    long, short = make_ids(1, 9), make_ids(1, 4, seed=3)
    ids = torch.cat([long, torch.cat([torch.full((1, 5), PAD), short], 1)]).repeat(2, 1)
    masks: list[dict[str, Any]] = [{"attention_mask": (ids != PAD).long()}, {}]
    for options in (
        *({**GREEDY, **mask} for mask in masks),
        {"max_new_tokens": 12, "repetition_penalty": 1.3},
        {"max_new_tokens": 12, "eos_token_id": [EOS, 11, 12, 20], "pad_token_id": 7},
    ):
        before = len(engines)
        found = policy.generate(ids, MIXED, **options)
        assert len(engines) == before + 1 and torch.equal(found, other.generate(ids, MIXED, **options))
    texts = ["w7 w8 w9", CHAT, "w12"]
    assert policy.generate(texts, MIXED[:3], **GREEDY) == other.generate(texts, MIXED[:3], **GREEDY)
    assert not policy.bank._pins


def test_streams_are_the_answers(engines: list[Engine]) -> None:
    policy, other = fused(), served()
    pieces = list(policy.stream("w7 w8", "alice", **GREEDY))
    assert len(pieces) > 1 and "".join(pieces) == other.generate(["w7 w8"], ["alice"], **GREEDY)[0]
    stream = policy.stream("w7 w8", "alice", **GREEDY)
    assert next(stream) and policy.bank._pins
    stream.close()
    assert not policy.bank._pins and len(engines) == 2


def test_samples_follow_the_seed_and_the_distribution(engines: list[Engine]) -> None:
    policy, ids = fused(), make_ids(1)
    options = {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 400, "eos_token_id": None, "top_k": 5}

    def sample(seed: int, **changes: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return policy.generate(ids, ["alice"], **{**options, **changes})

    first = sample(0)
    assert torch.equal(sample(0), first) and not torch.equal(sample(1), first) and first.shape == (400, 8)
    with policy.steer(["alice"]), torch.no_grad():
        best = policy.model(ids).logits[0, -1].topk(5)
    expected = 400 * best.values.softmax(0)
    counts = torch.bincount(first[:, -1], minlength=64)
    assert counts[best.indices].sum() == 400
    assert ((counts[best.indices] - expected) ** 2 / expected).sum() < 30  # 4 degrees of freedom: one in 100,000
    assert len(set(sample(2, top_k=None)[:, -1].tolist())) > 5
    several = policy.generate(["w7", "w8"], ["alice", BASE], **{**options, "num_return_sequences": 2})
    assert [len(texts) for texts in several] == [2, 2] and len(engines) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2}, {"return_dict_in_generate": True}, {"min_new_tokens": 2}, {"use_cache": False},
        {"cache_implementation": "static"}, {"max_new_tokens": 130},
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]] * 4)},
    ],
    ids=str,
)  # fmt: skip
def test_the_rest_is_transformers(options: dict[str, Any], engines: list[Engine]) -> None:
    policy, other, ids = fused(), served(), make_ids(4)
    wanted, found = (one.generate(ids, MIXED, **{**GREEDY, **options}) for one in (other, policy))
    sequences = [out if isinstance(out, torch.Tensor) else out.sequences for out in (wanted, found)]
    assert torch.equal(*sequences) and not engines


def test_settings_of_the_model_count(engines: list[Engine]) -> None:
    policy, ids = fused(), make_ids(2)
    policy.model.generation_config.suppress_tokens = list(range(30))
    assert (policy.generate(ids, ["alice", "bob"], **GREEDY)[:, 7:] >= 30).all() and not engines
    policy.model.generation_config.suppress_tokens = None
    policy.model.generation_config.eos_token_id = list(range(64))
    assert policy.generate(ids, ["alice", "bob"], max_new_tokens=5).shape == (2, 8) and len(engines) == 1


@pytest.mark.parametrize(
    "options", [{"no_such_option": 2}, {"do_sample": True, "temperature": 0.0}, {"num_return_sequences": 2}], ids=str
)
def test_errors_are_transformers(options: dict[str, Any]) -> None:
    policy = fused()
    with pytest.raises(ValueError, match=f"{list(options)[-1]}|strictly positive|[Gg]reedy"):
        policy.generate(make_ids(1), ["alice"], **{**GREEDY, **options})
    with pytest.raises(UnknownUser, match="nobody"):
        policy.generate(make_ids(2), ["alice", "nobody"], **GREEDY)
    assert not policy.bank._pins


def test_a_stale_fused_form_is_passed_over_and_told_once(
    engines: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    policy, ids = fused(), make_ids(2)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(-1)
    with caplog.at_level(logging.WARNING, "fssa_fast"):
        found = [policy.generate(ids, ["alice", "bob"], **GREEDY) for _ in range(2)]
    assert not engines and "lm_head.weight has been changed" in caplog.text
    assert caplog.text.count("call policy.fuse() again") == 1
    policy.fuse()
    assert torch.equal(policy.generate(ids, ["alice", "bob"], **GREEDY), found[0]) and len(engines) == 1
    with use_backend("reference"):  # not what the fused form was made with
        assert torch.equal(policy.generate(ids, ["alice", "bob"], **GREEDY), found[0]) and len(engines) == 1
