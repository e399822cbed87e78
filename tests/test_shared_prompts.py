"""Answers computed behind one prompt are what they are behind a prompt each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, PAD, VOCABULARY, make_model, make_policy, shake
from torch import Tensor

from fssa_fast.training import policy as training_policy
from fssa_fast.training import policy_log_probs
from fssa_fast.training.shared import SAVES, can_share, share_prompts

Lengths = tuple[int, int, int]  # of a prompt and its two answers


def make_rows(lengths: list[Lengths], seed: int = 0) -> dict[str, Any]:
    """A batch of pairs of rows, as `collate` makes it."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=draw).tolist()

    rows, start = [], []
    for prompt, *answers in lengths:
        ids = tokens(prompt)
        rows += [ids + tokens(answer) for answer in answers]
        start += [prompt, prompt]
    end = [len(row) for row in rows]
    width = max(end)
    return {
        "input_ids": torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in end]),
        "response_start": torch.tensor(start),
        "response_end": torch.tensor(end),
        "slots": torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(2),
    }


sizes = st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12))


@given(st.lists(sizes, min_size=1, max_size=4))
def test_every_token_is_found_again(lengths: list[Lengths]) -> None:
    batch = make_rows(lengths)
    ids, start, end = batch["input_ids"], batch["response_start"], batch["response_end"]
    shared = share_prompts(ids, start, end, torch.float32)
    if shared is None:
        assert max(sum(own) for own in lengths) > SAVES * 2 * ids.shape[1]
        return
    for name, (found, wanted) in {
        "tokens": (shared.input_ids, ids),
        "positions": (shared.position_ids, torch.arange(ids.shape[1]).expand_as(ids)),
    }.items():
        apart = shared.apart(found.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(apart[batch["attention_mask"] == 1], wanted[batch["attention_mask"] == 1]), name
    for row, (prompt, one, other) in enumerate(lengths):
        seen = shared.attention_mask[row, 0] == 0
        within = torch.ones(prompt + one + other, prompt + one + other, dtype=torch.bool).tril()
        within[prompt + one :, prompt : prompt + one] = False
        assert torch.equal(seen[: len(within), : len(within)], within)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in ARCHITECTURES for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")],
)
def test_log_probabilities_and_gradients_are_those_of_whole_rows(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_rows([(20, 3, 9), (14, 8, 2), (17, 1, 1)])

    def run(shared: bool) -> tuple[Tensor, dict[str, Tensor]]:
        # In float64: what differs is then more than rounding.
        policy = shake(make_policy(make_model(name, attn_implementation=attention, dtype=torch.float64)))
        policy.eval()  # no dropout
        if not shared:
            monkeypatch.setattr(training_policy, "can_share", lambda *_: False)
        asked = []
        policy.model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: asked.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        latents = torch.randn(3, policy.encoder.latent_width, generator=torch.Generator().manual_seed(5))
        found = policy_log_probs(policy, batch, policy.rows(latents), batch["slots"], chunk=7)
        (found * torch.arange(1.0, 7.0)).sum().backward()
        assert asked == [(3, 32) if shared else (6, 29)]
        gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        return found.detach(), gradients

    (ours, own), (theirs, other) = run(True), run(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-6)
    assert own.keys() == other.keys() and own
    for key in own:
        # Eager attention takes its softmax in float32, whatever it is given.
        torch.testing.assert_close(own[key], other[key], rtol=1e-5, atol=1e-5 * float(other[key].abs().max()))


def test_rows_that_share_no_prompt_are_left_apart() -> None:
    batch = make_rows([(20, 3, 9), (14, 8, 2)])

    def share(**changes: Tensor) -> Any:
        changed = batch | changes
        return share_prompts(changed["input_ids"], changed["response_start"], changed["response_end"], torch.float32)

    assert share() is not None
    other = batch["input_ids"].clone()
    other[1, 5] = (other[1, 5] + 1) % VOCABULARY
    assert share(input_ids=other) is None
    later = batch["response_start"].clone()
    later[1] += 1
    assert share(response_start=later) is None
    assert share(**{key: value[:3] for key, value in batch.items()}) is None
    short = make_rows([(2, 20, 20)])
    assert share_prompts(short["input_ids"], short["response_start"], short["response_end"], torch.float32) is None


def test_models_that_would_compute_something_else_are_named() -> None:
    assert can_share(make_model("llama"), 500)
    mistral = make_model("mistral", sliding_window=16)
    assert can_share(mistral, 16) and not can_share(mistral, 17)
    llama = make_model("llama")
    llama.config.model_type = "mamba"
    assert not can_share(llama, 8)
    llama = make_model("llama")
    llama.config._attn_implementation = "flash_attention_2"
    assert not can_share(llama, 8)
