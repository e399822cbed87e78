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

import httpx  # noqa: E402
import openai  # noqa: E402
import psutil  # noqa: E402

from fssa_fast import BASE, PRIOR, Choice  # noqa: E402
from fssa_fast.vllm.latents import Steering, encode  # noqa: E402

LENGTH = 8
REQUESTS = int(os.environ.get("FSSA_VLLM_REQUESTS", "200"))  # 2,000 by hand


@pytest.fixture(scope="module")
def served(tiny: Any) -> Iterator[tuple[Any, openai.OpenAI, int]]:
    policy, folder = tiny("Llama")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base"),
        "--served-model-name", "tiny", "tiny:base", "--host", "127.0.0.1", "--port", str(port),
        "--load-format", "fssa", "--model-loader-extra-config", f'{{"fssa": {{"policy": "{folder / "policy"}"}}}}',
        "--enforce-eager", "--dtype", "float32", "--max-model-len", "128",
        "--max-num-seqs", "8", "--max-num-batched-tokens", "16", "--num-gpu-blocks-override", "8",
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
        yield policy, client, server.pid
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


def numbers(text: str) -> list[int]:
    return [int(word.removeprefix("w")) for word in text.split()]


def test_chat_completions_and_responses_say_what_the_user_is_told(served: Any) -> None:
    policy, client, _ = served
    words, prompt = "w9 w8 w7", [3, 9, 8, 7, 4]
    messages: Any = [{"role": "user", "content": words}]
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("tiny", "user0", {"user": "user0"}),
        ("tiny", "user1", {"extra_body": {"vllm_xargs": {"fssa_user": "user1"}}}),
        ("tiny", PRIOR, {}),
        ("tiny:base", BASE, {"user": "user0"}),
    ]
    for model, user, said in ways:
        said = said | {"extra_body": said.get("extra_body", {}) | {"ignore_eos": True}}
        common: dict[str, Any] = {"model": model, "temperature": 0} | said
        chat = client.chat.completions.create(messages=messages, max_tokens=LENGTH, **common)
        assert greedy(policy, prompt, numbers(chat.choices[0].message.content or ""), user)
        response = client.responses.create(input=words, max_output_tokens=LENGTH, **common)
        assert greedy(policy, prompt, numbers(response.output_text), user)
        stream = client.completions.create(prompt="w3 w9 w8 w7 w4", max_tokens=LENGTH, stream=True, **common)
        pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
        assert len(pieces) > 1 and greedy(policy, prompt, numbers("".join(pieces)), user)
    for create, asked in (
        (client.chat.completions.create, {"messages": messages}),
        (client.responses.create, {"input": words}),
        (client.completions.create, {"prompt": words}),
    ):
        with pytest.raises(openai.BadRequestError, match="user: expected one that the store has, got 'nobody'"):
            create(model="tiny", user="nobody", **asked)


def test_strength_and_latents_are_taken(served: Any) -> None:
    policy, client, _ = served
    prompt = [11, 12, 13]
    policy.users.interpolate("half", {"user0": 0.5})
    halved = {"vllm_xargs": {"fssa_strength": 0.5}}
    assert greedy(policy, prompt, tokens(ask(client, prompt, "user0", **halved)), "half")
    latent = encode(Steering(1.0, torch.ones(16).bfloat16()))
    sent = tokens(ask(client, prompt, vllm_xargs={"fssa_latent": latent}))
    assert sent != tokens(ask(client, prompt)) and len(sent) == LENGTH


def test_the_field_user_steers_and_the_base_has_a_name(served: Any) -> None:
    policy, client, _ = served
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
    policy, client, _ = served
    with pytest.raises(openai.BadRequestError, match="user|fssa|latent"):
        ask(client, [1, 2, 3], **more)
    assert greedy(policy, [1, 2, 3], tokens(ask(client, [1, 2, 3], "user0")), "user0")


def memory(pid: int) -> int:
    """Bytes of the server and all its processes, of their own."""
    server = psutil.Process(pid)
    return sum(process.memory_full_info().uss for process in [server, *server.children(recursive=True)])


def test_random_requests_with_joins_aborts_updates_and_preemptions_each_get_their_own_users_answer(served: Any) -> None:
    policy, client, pid = served
    chance, draw = random.Random(0), torch.Generator().manual_seed(5)
    users = [f"user{number}" for number in range(6)]
    starts = [[chance.randrange(1, 256) for _ in range(70)] for _ in range(4)]

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

    wrong, used = [], []
    with ThreadPoolExecutor(12) as pool:
        for wave in range(10):  # between them somebody joins and somebody changes, while the server runs
            a, b = 3 * torch.randn(2, 2, 8, generator=draw)
            choices = [Choice(x, y) for x, y in zip(a, b, strict=True)]
            users.append(f"joined{wave}")
            policy.users.add(users[-1], choices)
            policy.users.update(chance.choice(users), choices[:1])
            jobs = [
                (chance.choice(starts)[: chance.choice((5, 33, 60))], chance.choice(users), chance.random() < 0.2)
                for _ in range(REQUESTS // 10)
            ]
            known: dict[Any, bool] = {}
            for (prompt, user, _), answer in zip(jobs, pool.map(run, jobs), strict=True):
                if answer is not None:
                    key = tuple(prompt), user, tuple(answer)
                    known[key] = known.get(key) or greedy(policy, prompt, answer, user)
            wrong += [(wave, *key) for key, right in known.items() if not right]
            used.append(memory(pid))
    assert wrong == []
    assert used[-1] - used[4] < 16 << 20, used  # level, once warm
    found = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    preempted = [line for line in found.splitlines() if line.startswith("vllm:num_preemptions_total")]
    assert sum(float(line.split()[-1]) for line in preempted) > 0
    print(f"{REQUESTS} requests; megabytes after each tenth: {[n >> 20 for n in used]}; {preempted}")
