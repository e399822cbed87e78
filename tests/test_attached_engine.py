"""Models without a fused form are served by the attached one: each answer is that user's, whoever comes beside."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny import BOS, EOS, PAD, VOCABULARY, make_choices, make_ids, make_model, make_policy, make_tokenizer
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig

from fssa_fast import BASE, PRIOR, EncoderConfig, LoraConfig, SteerablePolicy, SteeringConfig
from fssa_fast.generation import Engine, QueueFull

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
CONFIGS: dict[str, Any] = {
    "mamba": lambda: MambaConfig(
        hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2, **TOKENS,
    ),
    "mixtral": lambda: MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, initializer_range=0.2, max_position_embeddings=128, **TOKENS,
    ),
}  # fmt: skip
NAMES = ("gpt2", "phi3", "mamba", "mixtral")
USERS = [BASE, PRIOR, "alice", "bob", "alice"]


def make(name: str) -> SteerablePolicy:
    if name in CONFIGS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    else:
        model = make_model(name)
    policy = make_policy(model, modulations=() if name == "mamba" else ("scale_shift",), tokenizer=make_tokenizer())
    policy.users.add_many({"alice": make_choices(1), "bob": make_choices(2)})
    return policy


def open_engine(policy: SteerablePolicy, **options: Any) -> Engine:
    return policy.engine(**{"max_rows": 3, "max_tokens": 256, "step_tokens": 8, "background": False, **options})


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_each_users_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts longer than a step, rows given to others, requests that are cancelled: as transformers answers alone."""
    policy = make(name)
    with caplog.at_level(logging.WARNING, "fssa_fast"), open_engine(policy) as engine:
        assert caplog.text.count("attached form") == 1 and f"got '{policy.model.config.model_type}'" in caplog.text
        rows = [make_ids(1, 5 + 6 * i, seed=i)[0].tolist() for i in range(len(USERS))]
        options = {"max_new_tokens": 10}
        gone = engine.submit(make_ids(1, 20)[0].tolist(), "bob", max_new_tokens=50)
        engine.step()
        handles = [engine.submit(row, user, **options) for row, user in zip(rows, USERS, strict=True)]
        engine.step()
        gone.cancel()
        results = [handle.result() for handle in handles]
        assert gone.result().reason == "cancelled" and engine.running == 0
        for row, user, result in zip(rows, USERS, results, strict=True):
            alone = policy.generate(torch.tensor([row]), [user], do_sample=False, **options)[0, len(row) :].tolist()
            assert result.tokens == alone and result.cached_tokens == 0
        assert len({tuple(result.tokens) for result in results}) > 3
        assert engine.run([{"prompt": rows[3], "user": "bob", **options}])[0].tokens == results[3].tokens
    assert not policy.bank._pins


@pytest.mark.parametrize("name", NAMES)
def test_what_is_put_back_goes_on(name: str) -> None:
    policy = make(name)
    requests = [{"prompt": make_ids(1, 20, seed=i)[0].tolist(), "user": USERS[i], "max_new_tokens": 40,
                 "temperature": 0.5, "seed": i} for i in range(3)]  # fmt: skip
    with open_engine(policy, max_tokens=128, max_length=64, ends=()) as little:
        found = [result.tokens for result in little.run(requests)]
        assert little.preempted > 0
    with open_engine(policy, max_tokens=1024, ends=()) as roomy:
        assert found == [result.tokens for result in roomy.run(requests)] and roomy.preempted == 0


def test_streams_stops_and_texts() -> None:
    policy = make("mixtral")
    with open_engine(policy, background=True, ends=()) as engine:
        whole = engine.submit("w7 w8", "alice", max_new_tokens=12).result(60)
        stop = whole.text.split()[4]
        handle = engine.submit("w7 w8", "alice", max_new_tokens=12, stop=[stop])
        pieces = list(handle.text())
        assert handle.result().reason == "stop" and "".join(pieces) == whole.text[: whole.text.index(stop)]
        several = engine.submit_many("w7 w8", "bob", 3, max_new_tokens=4, temperature=1.0, seed=4, logprobs=1)
        assert len({tuple(one.result(60).tokens) for one in several}) > 1
        assert list(engine.submit("w7 w8", {"alice": 0.5, "bob": 0.5}, max_new_tokens=3))


def test_a_model_that_fails_ends_its_step_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make("gpt2")
    engine = open_engine(policy, max_rows=1, max_waiting=2)
    first, second = (engine.submit([5, 6, 7], name, max_new_tokens=4) for name in ("alice", "bob"))
    with pytest.raises(QueueFull):
        engine.submit([5], "bob", max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(policy.model.transformer, "forward", lambda *_, **__: 1 / 0)
        engine.step()
    with pytest.raises(ZeroDivisionError):
        first.result()
    wanted = policy.generate(torch.tensor([[5, 6, 7]]), ["bob"], max_new_tokens=4, do_sample=False)[0, 3:]
    assert second.result().tokens == wanted.tolist()


def test_a_model_that_keeps_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make("gpt2")
    engine = open_engine(policy)
    engine._fused._options["use_cache"] = False
    with pytest.raises(ValueError, match="expected one that returns what it keeps as .* got GPT2LMHeadModel"):
        engine.submit([5, 6], "alice", max_new_tokens=4).result()


def test_steering_by_what_is_not_a_projection_of_attention() -> None:
    """Adapters on a recurrent model's own projections."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["mamba"]()).eval()
        config = SteeringConfig(EncoderConfig(8, 16, heads=2), True, (LoraConfig(("in_proj",), 4, 8.0, "scale_shift"),))
        policy = SteerablePolicy(model, config)
    policy.users.add("alice", make_choices(1))
    row = make_ids(1, 9)
    with open_engine(policy) as engine:
        found = engine.run([{"prompt": row[0].tolist(), "user": "alice", "max_new_tokens": 5}])[0].tokens
    assert found == policy.generate(row, ["alice"], max_new_tokens=5, do_sample=False)[0, 9:].tolist()
