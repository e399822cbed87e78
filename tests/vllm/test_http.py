"""The server with the plugin, asked by the openai client: a name is all that a client adds."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="needs vLLM: make vllm-test")

import openai  # noqa: E402

from fssa_fast import BASE, Choice  # noqa: E402

LENGTH = 8
REQUESTS = int(os.environ.get("FSSA_VLLM_REQUESTS", "60"))  # 2,000 by hand; fewer where all tests run


@pytest.fixture(scope="module")
def served(tiny: Any) -> Iterator[tuple[Any, openai.OpenAI]]:
    policy, folder = tiny("Llama")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base"),
        "--served-model-name", "tiny", "tiny:base", "--host", "127.0.0.1", "--port", str(port),
        "--load-format", "fssa", "--model-loader-extra-config", f'{{"fssa": {{"policy": "{folder / "policy"}"}}}}',
        "--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128",
        "--max-num-seqs", "8", "--max-num-batched-tokens", "16", "--num-gpu-blocks-override", "12",
        "--block-size", "32",
    ]  # fmt: skip
    environment = os.environ | {"FSSA_USERS": str(folder / "users.db"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = Path(folder / "server.log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        deadline = time.monotonic() + 600
        while not answers(client):
            assert server.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
            time.sleep(0.5)
        yield policy, client
    finally:
        server.terminate()
        server.wait(30)


def answers(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.APIConnectionError:
        return False
    return True


def ask(client: openai.OpenAI, prompt: list[int], user: str | None = None, model: str = "tiny", **more: Any) -> Any:
    extra = {"return_token_ids": True, "ignore_eos": True, "detokenize": False} | more
    named = {} if user is None else {"user": user}
    return client.completions.create(
        model=model, prompt=prompt, max_tokens=LENGTH, temperature=0, extra_body=extra, **named
    )


def tokens(answer: Any) -> list[int]:
    return answer.choices[0].model_dump()["token_ids"]


@torch.no_grad()
def greedy(policy: Any, prompt: list[int], answer: list[int], user: str) -> bool:
    with policy.steer([user]):
        logits = policy.model(torch.tensor([prompt + answer])).logits[0]
    return len(answer) == LENGTH and logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_the_field_user_steers_and_the_base_has_a_name(served: Any) -> None:
    policy, client = served
    prompt = [5, 6, 7, 8, 9]
    for user in ("user0", "user1"):
        assert greedy(policy, prompt, tokens(ask(client, prompt, user)), user)
        assert greedy(policy, prompt, tokens(ask(client, prompt, vllm_xargs={"fssa_user": user})), user)
    assert greedy(policy, prompt, tokens(ask(client, prompt, "user0", model="tiny:base")), BASE)
    policy.users.interpolate("mixed", {"user0": 0.5, "user1": 0.5})
    assert greedy(policy, prompt, tokens(ask(client, prompt, "mixed")), "mixed")  # added while the server runs
    blend = tokens(ask(client, prompt, vllm_xargs={"fssa_users": '{"user0": 0.5, "user1": 0.5}'}))
    assert greedy(policy, prompt, blend, "mixed")
    before = tokens(ask(client, prompt, "user2"))
    policy.users.update("user2", [Choice(torch.ones(8) * 3, -torch.ones(8) * 3)] * 4)
    after = tokens(ask(client, prompt, "user2"))
    assert before != after and greedy(policy, prompt, after, "user2")


@pytest.mark.parametrize(
    "more",
    [
        {"user": "nobody"},
        {"vllm_xargs": {"fssa_usr": "user0"}},
        {"vllm_xargs": {"fssa_latent": "1:AAAA"}},
        {"vllm_xargs": {"fssa": "1:AAAA"}},
        {"vllm_xargs": {"fssa_strength": "much"}},
        {"vllm_xargs": {"fssa_users": "[]"}},
        {"user": "user0", "use_beam_search": True},
    ],
)
def test_what_cannot_be_served_is_a_400_that_says_so(served: Any, more: dict[str, Any]) -> None:
    policy, client = served
    with pytest.raises(openai.BadRequestError, match="user|fssa|latent"):
        ask(client, [1, 2, 3], **more)
    assert greedy(policy, [1, 2, 3], tokens(ask(client, [1, 2, 3], "user0")), "user0")


def test_random_requests_with_aborts_and_preemptions_each_get_their_own_users_answer(served: Any) -> None:
    policy, client = served
    chance = random.Random(0)
    users = [f"user{number}" for number in (0, 1, 3, 4, 5)]
    starts = [[chance.randrange(1, 256) for _ in range(70)] for _ in range(4)]
    jobs = []
    for _ in range(REQUESTS):
        prompt = chance.choice(starts)[: chance.choice((5, 33, 70))]
        jobs.append((prompt, chance.choice(users), chance.random() < 0.2))

    def run(job: tuple[list[int], str, bool]) -> list[int] | None:
        prompt, user, leaves = job
        if not leaves:
            return tokens(ask(client, prompt, user))
        stream = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=50, user=user, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True, "detokenize": False},
        )  # fmt: skip
        for _ in stream:
            stream.close()
            break
        return None

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(run, jobs))
    known: dict[Any, bool] = {}
    for (prompt, user, _), answer in zip(jobs, answers, strict=True):
        if answer is not None:
            key = tuple(prompt), user, tuple(answer)
            known[key] = known.get(key) or greedy(policy, prompt, answer, user)
    assert [key for key, right in known.items() if not right] == []
