"""Steered answers of vLLM are the attached policy's, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM: make vllm-test")

from fssa_fast.vllm import BASE, PRIOR, steered_llm, steered_params  # noqa: E402

from vllm import TokensPrompt  # noqa: E402  # isort: skip

USERS = [*(f"user{number}" for number in range(6)), BASE, PRIOR]
LENGTH = 12


def prompts(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 256, (5 + 3 * n,), generator=generator).tolist() for n in range(count)]


@torch.no_grad()
def expected(policy: Any, asked: list[tuple[list[int], str]]) -> list[list[int]]:
    """Greedy tokens by the attached policy, each request alone and without a cache."""
    answers = []
    for prompt, user in asked:
        tokens = list(prompt)
        for _ in range(LENGTH):
            with policy.steer([user]):
                tokens.append(int(policy.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def answers(llm: Any, asked: list[tuple[list[int], str]]) -> list[list[int]]:
    params = [steered_params(user, temperature=0, max_tokens=LENGTH, ignore_eos=True) for _, user in asked]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p, _ in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def serve(folder: Any, **options: Any) -> Any:
    options = {"enforce_eager": True, "max_num_seqs": 16, "max_model_len": 128} | options
    return steered_llm(
        str(folder / "base"),
        str(folder / "policy"),
        users=str(folder / "users.db"),
        skip_tokenizer_init=True,
        dtype="float32",
        **options,
    )


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma3"])
def test_mixed_users_are_answered_as_by_the_attached_policy(tiny: Any, kind: str) -> None:
    policy, folder = tiny(kind)
    asked = [(prompt, user) for prompt in prompts() for user in USERS]
    wanted = expected(policy, asked)
    assert len({tuple(tokens) for tokens in wanted}) > len(wanted) // 2  # the users differ
    got = answers(serve(folder), asked)
    assert [case for case, a, b in zip(asked, got, wanted, strict=True) if a != b] == []
