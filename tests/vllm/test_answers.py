"""Steered answers of vLLM are the attached policy's, token by token."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm.version", reason="needs vLLM: make vllm-test")

from fssa_fast.vllm import BASE, PRIOR, steered_llm, steered_params  # noqa: E402

from vllm import TokensPrompt  # noqa: E402  # isort: skip

USERS = [*(f"user{number}" for number in range(6)), BASE, PRIOR]
LENGTH = 12


def prompts(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 256, (5 + 3 * n,), generator=generator).tolist() for n in range(count)]


Asked = list[tuple[list[int], str]]


@torch.no_grad()
def not_greedy(policy: Any, asked: Asked, answered: list[list[int]]) -> Asked:
    """The requests whose answer the attached policy, asked alone and without a cache, would not have given greedily.

    One forward each: every token of the answer must be the likeliest after those before it.
    """
    wrong = []
    for (prompt, user), answer in zip(asked, answered, strict=True):
        with policy.steer([user]):
            logits = policy.model(torch.tensor([prompt + answer])).logits[0]
        if len(answer) != LENGTH or logits[len(prompt) - 1 : -1].argmax(-1).tolist() != answer:
            wrong.append((prompt, user))
    return wrong


def answers(llm: Any, asked: Asked) -> list[list[int]]:
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


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma3"])
def test_mixed_users_are_answered_as_by_the_attached_policy(tiny: Any, kind: str, eager: bool) -> None:
    policy, folder = tiny(kind)
    asked = [(prompt, user) for prompt in prompts() for user in USERS]
    answered = answers(serve(folder, enforce_eager=eager), asked)
    assert not_greedy(policy, asked, answered) == []
    assert len({tuple(answer) for answer in answered}) > len(asked) // 2  # the users differ


def test_base_rows_are_plain_vllms_bit_for_bit(tiny: Any) -> None:
    from vllm import LLM, SamplingParams

    _, folder = tiny("Llama")
    own = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts()]
    params = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "logprobs": 5}

    def numbers(outputs: Any) -> list[Any]:
        return [[{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs] for o in outputs]

    options = {"skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 16, "max_model_len": 128}
    plain = LLM(str(folder / "base"), enforce_eager=True, **options).generate(own, SamplingParams(**params))
    assert numbers(serve(folder).generate(own, steered_params(BASE, **params))) == numbers(plain)


def test_chunks_preemption_and_prefixes_change_no_answer(tiny: Any) -> None:
    policy, folder = tiny("Llama")
    small = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 14}  # chunks of a prompt, and preemption
    llm = serve(folder, **small, block_size=32, enable_prefix_caching=True)
    long = [(prompts()[7] * 3)[:70] for _ in USERS]
    asked = list(zip(long, USERS, strict=True))
    for _ in range(2):  # the second time, from the blocks of the first
        assert not_greedy(policy, asked, answers(llm, asked)) == []


def test_without_salts_a_user_would_be_answered_from_anothers_blocks(tiny: Any, monkeypatch: Any) -> None:
    policy, folder = tiny("Llama")
    monkeypatch.setattr("fssa_fast.vllm.requests.cache_salt", lambda text, own: own)
    llm = serve(folder, block_size=32, enable_prefix_caching=True)
    prompt = (prompts()[7] * 3)[:70]
    first, second = [(prompt, "user0")], [(prompt, "user1")]
    assert not_greedy(policy, first, answers(llm, first)) == []
    assert not_greedy(policy, second, answers(llm, second)) == second


def test_an_unknown_user_raises_and_the_engine_goes_on(tiny: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    policy, folder = tiny("Llama")
    llm = serve(folder)
    for extra in ({"fssa_user": "nobody"}, {"fssa_latent": "1.0:AAAA"}, {"fssa": "1.0:AAAA"}, {"fssa_strength": 1e39}):
        with pytest.raises(VLLMValidationError, match="user|latent|unknown|strength"):
            llm.generate([TokensPrompt(prompt_token_ids=[1])], steered_params(extra_args=extra, max_tokens=2))
    for strength in (1e2, 1e4, 1e6, 1e8, 1e10, 1e20, 1e30):  # refused or finite: no NaN stays in the cache
        far = steered_params("user1", strength=strength, temperature=0, max_tokens=LENGTH, ignore_eos=True)
        with suppress(VLLMValidationError):
            llm.generate([TokensPrompt(prompt_token_ids=[1, 2, 3])], far)
    asked = [(prompts()[0], "user0")]
    assert not_greedy(policy, asked, answers(llm, asked)) == []


def test_a_policy_of_another_base_is_refused(tiny: Any, tmp_path: Any) -> None:
    _, folder = tiny("Llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "policy").symlink_to(folder / "policy")
    (tmp_path / "users.db").symlink_to(folder / "users.db")
    with pytest.raises(Exception, match="policy: expected one of this base|Engine core initialization failed"):
        serve(tmp_path)
