"""Steered answers of vLLM are the attached policy's, token by token."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm.version", reason="needs vLLM: make vllm-test")

from fssa_fast.vllm import BASE, PRIOR, steered_llm, steered_params  # noqa: E402

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402  # isort: skip

USERS = [*(f"user{number}" for number in range(6)), BASE, PRIOR]
LENGTH = 12
RUNNER = {"1": "vllm.v1.worker.gpu_model_runner", "2": "vllm.v1.worker.gpu.model_runner"}


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


ENGINE = {
    "enforce_eager": True, "max_num_seqs": 16, "max_model_len": 128, "skip_tokenizer_init": True, "dtype": "float32",
}  # fmt: skip


def serve(folder: Any, **options: Any) -> Any:
    options = ENGINE | options
    return steered_llm(
        str(folder / "base"),
        str(folder / "policy"),
        users=str(folder / "users.db"),
        **options,
    )


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma3"])
def test_mixed_users_are_answered_as_by_the_attached_policy(tiny: Any, kind: str, eager: bool) -> None:
    policy, folder = tiny(kind)
    asked = [(prompt, user) for prompt in prompts() for user in USERS]
    llm = serve(folder, enforce_eager=eager)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert RUNNER[os.environ["FSSA_VLLM_RUNNER"]] in {cls.__module__ for cls in type(runner).__mro__}
    answered = answers(llm, asked)
    assert not_greedy(policy, asked, answered) == []
    assert len({tuple(answer) for answer in answered}) > len(asked) // 2  # the users differ


def logprobs(llm: Any, own: list[Any], *, apart: bool = False) -> torch.Tensor:
    """Of the greedy answers of the base [requests, LENGTH, 256]; apart: one request after the other."""
    asked = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "logprobs": 256}
    steered = "fssa" in llm.llm_engine.vllm_config.additional_config
    params = steered_params(BASE, **asked) if steered else SamplingParams(**asked)
    outputs = [o for part in ([[p] for p in own] if apart else [own]) for o in llm.generate(part, params)]
    return torch.tensor(
        [[[step[t].logprob for t in range(256)] for step in output.outputs[0].logprobs] for output in outputs]
    )


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_base_rows_are_plain_vllms(tiny: Any, eager: bool) -> None:
    """Bit for bit in eager; compiled, within what plain vLLM itself rounds otherwise in a batch of another size."""
    _, folder = tiny("Llama")
    own = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts()]
    options: dict[str, Any] = ENGINE | {"enforce_eager": eager, "max_logprobs": 256}
    plain = LLM(str(folder / "base"), **options)
    wanted = logprobs(plain, own)
    found = logprobs(serve(folder, **options), own)
    if eager:
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).abs().max() <= (logprobs(plain, own, apart=True) - wanted).abs().max()


def test_chunks_preemption_and_prefixes_change_no_answer(tiny: Any) -> None:
    policy, folder = tiny("Llama")
    small = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 6}  # chunks of a prompt, and preemption
    llm = serve(folder, **small, block_size=32, enable_prefix_caching=True, disable_log_stats=False)
    asked = [((prompts()[7] * 3)[:60], user) for user in USERS]  # its answer fills a block, and needs one more
    before = counted(llm, "vllm:num_preemptions")
    for order in (asked, asked[::-1]):  # the second time, from the blocks of the first
        assert not_greedy(policy, order, answers(llm, order)) == []
    assert counted(llm, "vllm:num_preemptions") > before and counted(llm, "vllm:prefix_cache_hits") > 0


def counted(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


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


def test_connectors_that_may_give_one_users_blocks_to_another_are_refused(tiny: Any) -> None:
    _, folder = tiny("Llama")
    shared = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ValueError, match="kv_connector: expected none"):
        serve(folder, kv_transfer_config=shared)


def test_a_seam_that_vllm_has_changed_is_named_at_the_start(tiny: Any, monkeypatch: Any) -> None:
    from fssa_fast.vllm.seams import SEAMS, check_seams, seam

    _, folder = tiny("Llama")
    check_seams()
    for name, where in SEAMS.items():
        with monkeypatch.context() as changed:
            if where.arguments:  # renamed
                changed.setattr(seam(name), where.method, lambda self, others: None)
            else:  # gone
                changed.delattr(seam(name), where.method)
            with pytest.raises(RuntimeError, match=f"{where.cls}.{where.method} .* vLLM .* is too new or too old"):
                check_seams()
    monkeypatch.setattr(seam("old_runner"), "_prepare_inputs", lambda self, others: None)
    with pytest.raises(RuntimeError, match="GPUModelRunner._prepare_inputs .* is too new or too old"):
        serve(folder)


@pytest.mark.skipif(os.environ["FSSA_VLLM_RUNNER"] == "2", reason="workers of their own do not interpret Triton")
def test_two_workers_that_share_every_linear_answer_alike(tiny: Any, monkeypatch: Any) -> None:
    policy, folder = tiny("Llama")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = serve(folder, tensor_parallel_size=2)
    asked = [(prompt, user) for prompt in prompts(4) for user in USERS]
    assert not_greedy(policy, asked, answers(llm, asked)) == []
    llm.llm_engine.engine_core.shutdown()
