"""What the server promises under load: keys that never meet, no error of its own, and no choice lost that was answered.

FSSA_SERVING_CALLS says how many random calls three keys make, FSSA_SERVING_STREAMS how many streams wait, and
FSSA_SERVING_EXAMPLES how many requests of either kind are made for each operation of the API; else they are few.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")

from serving_tiny import Tiny, tiny_server  # noqa: E402

from fssa_fast import PRIOR, SqliteStore  # noqa: E402
from fssa_fast.serving.keys import Key  # noqa: E402

CALLS = int(os.environ.get("FSSA_SERVING_CALLS", "60"))
SECRETS = {"one": "first-key", "two": "second-key", "three": "third-key"}


def headers(namespace: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[namespace]}"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Tiny]:
    keys = [Key(hashlib.sha256(secret.encode()).hexdigest(), space) for space, secret in SECRETS.items()]
    with tiny_server(tmp_path / "users.db", keys, {"max_rows": 4}) as running:
        yield running


def test_no_key_gets_anything_of_another(server):
    """Random calls of three keys at once, whose users have the same names: each answer is what that user gets alone."""
    names = ["ann", "ben", "cem"]
    expected: dict[tuple[str, str, int], str] = {}
    marks = {space: f"w{40 + i}" for i, space in enumerate(SECRETS)}  # a word that only this key's choices have
    for space in SECRETS:
        for i, name in enumerate(names):
            choice = {"chosen": marks[space], "rejected": f"w{20 + i}", "prompt": f"w{i + 6}"}
            body = {"name": name, "choices": [choice]}
            assert httpx.post(server.url + "/v1/users", json=body, headers=headers(space)).status_code == 201
    prompts = [" ".join(f"w{6 + (7 * p + i) % 50}" for i in range(12 + 30 * p)) for p in range(3)]
    for space in SECRETS:
        for name in [*names, None]:
            for p, prompt in enumerate(prompts):
                user = PRIOR if name is None else f"{space}/{name}"
                handle = server.engine.submit(prompt, user, max_new_tokens=6)
                expected[space, name or "", p] = handle.result().text or ""
    seen: dict[str, set[str]] = {space: set() for space in SECRETS}

    def call(number: int) -> None:
        draw = random.Random(number)
        space = draw.choice(list(SECRETS))
        with httpx.Client(base_url=server.url, headers=headers(space), timeout=60) as http:
            act = draw.random()
            if act < 0.6:
                name, p = draw.choice([*names, None]), draw.randrange(3)
                body = {"model": "tiny", "prompt": prompts[p], "max_tokens": 6, "temperature": 0}
                answer = http.post("/v1/completions", json=body | ({"user": name} if name else {})).json()
                assert answer["choices"][0]["text"] == expected[space, name or "", p]
                seen[space].add(answer["id"])
            elif act < 0.75:
                other = draw.choice([one for one in SECRETS if one != space])
                name = draw.choice([f"{other}/ann", f"../{other}/ann", f"{space}/ann", "zoe"])
                answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "w7", "user": name})
                assert answer.status_code == 404 and answer.json()["error"]["message"].count("/") == name.count("/")
            elif act < 0.85:
                ids = {one for key, own in seen.items() if key != space for one in list(own)}
                if ids:
                    better, worse = draw.choice(sorted(ids)), draw.choice(sorted(ids))
                    answer = http.post("/v1/feedback", json={"better": better, "worse": worse, "user": "ann"})
                    assert answer.status_code == 404
            else:
                listed = http.get("/v1/users").text + http.get("/v1/map").text + http.get("/v1/users/ann/choices").text
                assert marks[space] in listed
                assert [one["id"] for one in http.get("/v1/users").json()["data"]] == names
                assert not any(mark in listed for other, mark in marks.items() if other != space)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(call, range(CALLS)))


def test_idle_streams_take_no_threads(server):
    """Streams that wait for a row are coroutines: no thread is added, and others are answered."""
    gate, step = threading.Event(), server.engine.step
    server.engine.step = lambda: gate.wait(30) and step()
    count = int(os.environ.get("FSSA_SERVING_STREAMS", "40"))
    body = {"model": "tiny", "prompt": "w7", "max_tokens": 2, "stream": True}
    with httpx.Client(base_url=server.url, headers=headers("one"), timeout=60,
                      limits=httpx.Limits(max_connections=None)) as http:  # fmt: skip
        http.get("/v1/models")
        first = http.send(http.build_request("POST", "/v1/completions", json=body), stream=True)
        for _ in range(12):  # the pool for what blocks is full
            http.get("/v1/users")
        before = threading.active_count()
        asked = [http.build_request("POST", "/v1/completions", json=body) for _ in range(count)]
        streams = [http.send(request, stream=True) for request in asked]
        assert threading.active_count() <= before + 8  # those of the pool
        assert server.engine.running + server.engine.waiting == count + 1
        assert http.get("/v1/users").status_code == 200
        gate.set()
        for stream in [first, *streams]:
            assert stream.read().endswith(b"data: [DONE]\n\n")


def test_no_request_that_can_be_written_is_an_error_of_the_server(tmp_path):
    """Requests made of the OpenAPI document, well-formed and not."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    examples = int(os.environ.get("FSSA_SERVING_EXAMPLES", "2"))
    with tiny_server(tmp_path / "users.db", engine={"max_rows": 4}) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        tried = 0
        for found in schema.get_all_operations():
            operation = found.ok()
            modes = schemathesis.GenerationMode

            @hypothesis.given(case=operation.as_strategy(generation_mode=modes.POSITIVE)
                              | operation.as_strategy(generation_mode=modes.NEGATIVE))  # fmt: skip
            @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                                 suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
            def one(case: Any) -> None:
                nonlocal tried
                answer = case.call(timeout=60)
                tried += 1
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["code"]

            try:
                one()
            except hypothesis.errors.Unsatisfiable:
                continue  # an operation of which nothing can be wrong
        assert tried > 10 * examples


_SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from serving_tiny import Tiny
server = Tiny(Path(sys.argv[1]), None, {})
print(server.port, flush=True)
server._thread.join()
"""


def test_no_choice_is_lost_that_was_answered(tmp_path):
    """The process is killed while choices are added: the file opens, and has each that was answered."""
    path, acknowledged = tmp_path / "users.db", []
    command = [sys.executable, "-c", _SERVER, str(path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        for name in range(3):
            assert httpx.post(url + "/v1/users", json={"name": f"user-{name}"}).status_code == 201

        def add(worker: int) -> None:
            number = 0
            with httpx.Client(base_url=url, timeout=10) as http:
                while True:
                    number += 1
                    text = f"chosen {worker} {number}"
                    body = {"choices": [{"chosen": text, "rejected": "w7"}]}
                    try:
                        if http.post(f"/v1/users/user-{worker}/choices", json=body).status_code != 201:
                            return
                    except httpx.HTTPError:
                        return
                    acknowledged.append((f"user-{worker}", text))

        threads = [threading.Thread(target=add, args=(worker,)) for worker in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for thread in threads:
        thread.join(30)
    assert len(acknowledged) > 10
    store = SqliteStore(path)
    there = {(f"user-{w}", pair[0].text) for w in range(3) for pair in store.choices(f"user-{w}") or ()}
    store.close()
    assert set(acknowledged) <= there
    assert len(there) <= len(acknowledged) + 3, "at most what was under way"


@pytest.mark.slow  # LiteLLM takes long to import
def test_other_peoples_clients(tmp_path):
    """LiteLLM, and LangChain's class for OpenAI."""
    with tiny_server(tmp_path / "users.db", create_users=True) as server:
        chat = [{"role": "user", "content": "w7 w8"}]
        expected = server.engine.submit(chat, PRIOR, max_new_tokens=5).result().text
        tried = 0
        for client in (_litellm, _langchain):
            if (found := client(server.url + "/v1", chat)) is not None:
                assert found == (expected, expected)
                tried += 1
        if not tried:
            pytest.skip("neither LiteLLM nor langchain-openai is installed")


def _langchain(url: str, chat: Any) -> tuple[str, str] | None:
    try:
        from langchain_openai import ChatOpenAI
    except ModuleNotFoundError:
        return None
    model = ChatOpenAI(model="tiny", base_url=url, api_key="none", temperature=0, max_tokens=5, max_retries=0,
                       model_kwargs={"user": "someone"})  # fmt: skip
    return model.invoke(chat).content, "".join(piece.content for piece in model.stream(chat))


def _litellm(url: str, chat: Any) -> tuple[str, str] | None:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no list of prices from the network
    try:
        import litellm
    except ModuleNotFoundError:
        return None
    options: dict[str, Any] = {"model": "openai/tiny", "messages": chat, "api_base": url, "api_key": "none"}
    options |= {"temperature": 0, "max_tokens": 5, "user": "someone", "num_retries": 0}
    whole = litellm.completion(**options).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **options)]
    return whole, "".join(pieces)
