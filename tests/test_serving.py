"""The server: what clients of OpenAI's API call, users and choices, keys, limits, and its end."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

import pydantic  # noqa: E402
from serving_tiny import Tiny, letters, make_talking_policy, tiny_server  # noqa: E402
from tiny import make_choices  # noqa: E402

from fssa_fast import BASE, PRIOR, Choice  # noqa: E402
from fssa_fast.generation.sampling import Sampling  # noqa: E402
from fssa_fast.serving.completions import sampling  # noqa: E402
from fssa_fast.serving.forms import TextForm  # noqa: E402
from fssa_fast.serving.keys import Key, add_key, read_keys  # noqa: E402
from fssa_fast.serving.remembered import Remembered  # noqa: E402

CHAT: list[Any] = [{"role": "user", "content": "w7 w8 w9"}]
CHOICES = [{"prompt": "w10", "chosen": "w11 w12", "rejected": "w13"}, {"chosen": "w20", "rejected": "w21 w22"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with tiny_server(tmp_path_factory.mktemp("served") / "users.db") as running:
        running.policy.users.add("alice", make_choices(0))
        running.policy.users.add("bob", make_choices(1))
        yield running


@pytest.fixture
def client(server: Tiny) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(server: Tiny) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=30) as found:
        yield found


def by_engine(server: Tiny, prompt: Any, user: Any, **options: Any) -> str:
    return server.engine.submit(prompt, user, **{"max_new_tokens": 12, **options}).result().text or ""


def wait_for(what: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


# ------------------------------------------------------------ completions, by OpenAI's own client


@pytest.mark.parametrize("user", [None, "alice", "bob"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_what_the_engine_says_to_that_user(server, client, user, stream):
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 12}
    options |= {} if user is None else {"user": user}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **options))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices[0].finish_reason in ("stop", "length")
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**options).choices[0].message.content
    assert text == by_engine(server, CHAT, user or PRIOR)


def test_users_differ_and_the_base_model_has_a_name_of_its_own(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:base"]
    assert client.models.retrieve("tiny:base").id == "tiny:base"

    def text(**options):
        found = client.chat.completions.create(messages=CHAT, temperature=0, max_tokens=12, **options)
        return found.choices[0].message.content

    texts = {text(model="tiny", user="alice"), text(model="tiny", user="bob"), text(model="tiny:base")}
    assert len(texts) == 3
    assert text(model="tiny:base", user="alice") == by_engine(server, CHAT, BASE)


def test_steering_mixes_and_scales(server, client):
    steering = {"users": {"alice": 0.7, "bob": 0.3, PRIOR: 0.1}, "strength": 0.8}
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=12, extra_body={"steering": steering}
    )
    expected = by_engine(server, CHAT, steering["users"], strength=0.8)
    assert found.choices[0].message.content == expected


def test_n_seed_stop_and_usage(server, client):
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "n": 3, "seed": 5, "user": "alice", "top_p": 0.9}
    found = client.chat.completions.create(**options)
    expected = [
        server.engine.submit(CHAT, "alice", max_new_tokens=12, temperature=1.0, top_p=0.9, seed=5 + i).result()
        for i in range(3)
    ]
    assert [c.message.content for c in found.choices] == [one.text for one in expected]
    assert [c.index for c in found.choices] == [0, 1, 2]
    assert found.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    assert found.usage.prompt_tokens == expected[0].prompt_tokens

    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == found.usage.completion_tokens
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [one.text for one in expected]

    words = expected[0].text.split()
    stopped = client.chat.completions.create(**options | {"n": 1, "stop": [words[3]]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == expected[0].text[: expected[0].text.index(words[3])]


def test_penalties_bias_and_logprobs_are_the_engines(server, client):
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"20": 3.0, "21": -100}}
    asked = {"model": "tiny", "user": "bob", "max_tokens": 8, "temperature": 0, **options}
    engine = options | {"logit_bias": {20: 3.0, 21: -100.0}, "logprobs": 2, "max_new_tokens": 8}
    expected = server.engine.submit(CHAT, "bob", **engine).result()
    choice = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **asked).choices[0]
    assert choice.message.content == expected.text != by_engine(server, CHAT, "bob", max_new_tokens=8)
    assert [one.logprob for one in choice.logprobs.content] == [one.logprob for one in expected.logprobs]
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * len(expected.tokens)
    found = client.completions.create(prompt="w7 w8", logprobs=2, **asked).choices[0].logprobs
    expected = server.engine.submit("w7 w8", "bob", **engine).result()
    assert found.token_logprobs == [one.logprob for one in expected.logprobs]


def test_logprobs_of_a_stream_are_those_of_the_whole_answer(client):
    options = {"model": "tiny", "user": "bob", "max_tokens": 9, "seed": 3, "n": 2}
    asked = {**options, "messages": CHAT, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    content: list[list[Any]] = [[], []]
    for chunk in client.chat.completions.create(stream=True, **asked):
        if chunk.choices[0].logprobs is not None:
            content[chunk.choices[0].index] += chunk.choices[0].logprobs.content
    assert content == [choice.logprobs.content for choice in whole.choices]

    asked = {**options, "prompt": "w7 w8", "logprobs": 3}
    whole = client.completions.create(**asked)
    found: list[dict[str, list[Any]]] = [{}, {}]
    for chunk in client.completions.create(stream=True, **asked):
        if chunk.choices[0].logprobs is not None:
            for name, values in chunk.choices[0].logprobs.model_dump().items():
                found[chunk.choices[0].index].setdefault(name, []).extend(values)
    assert found == [choice.logprobs.model_dump() for choice in whole.choices]


def test_every_knob_of_the_engine_can_be_turned(server, client):
    """By its own name, or OpenAI's or vLLM's; what it is turned to is what the engine is told."""
    knobs = {"top_k": 3, "min_p": 0.2, "repetition_penalty": 1.7, "allowed_token_ids": list(range(20, 40))}
    asked = {"model": "tiny", "prompt": "w7 w8", "user": "bob", "max_tokens": 8, "seed": 4, "extra_body": knobs}
    allowed = {"allowed_tokens": knobs["allowed_token_ids"]}
    engine = {name: value for name, value in knobs.items() if name != "allowed_token_ids"} | allowed
    expected = by_engine(server, "w7 w8", "bob", max_new_tokens=8, seed=4, temperature=1.0, **engine)
    assert client.completions.create(**asked).choices[0].text == expected
    assert {field.name for field in fields(Sampling)} <= set(sampling(TextForm(model="tiny", prompt="w7"), None))


SCHEMA = {"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 2}


def test_answers_have_the_form_that_is_asked_for(tmp_path):
    """`response_format`, by OpenAI's client and its parser of pydantic's classes, whole and streamed."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

    class Answer(pydantic.BaseModel):
        yes: bool
        why: Literal["ab", "c"]

    with tiny_server(tmp_path / "users.db", tokenizer=letters()) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        space = {str(token): -100 for token in server.policy.tokenizer(" \n\r\t")["input_ids"]}  # else it never ends
        options = {"model": "tiny", "messages": CHAT, "max_tokens": 60, "logit_bias": space}
        parsed = client.chat.completions.parse(response_format=Answer, **options).choices[0]
        assert isinstance(parsed.message.parsed, Answer) and parsed.finish_reason == "stop"
        form = {"type": "json_schema", "json_schema": {"name": "two", "schema": SCHEMA, "strict": None}}
        assert all(one in (1, 22) for one in json.loads(ask(client, response_format=form, **options)))
        digits = {"type": "regex", "pattern": "[0-3]{4}"}
        text = client.completions.create(
            model="tiny", prompt="ab", max_tokens=9, n=2, stream=True, extra_body={"response_format": digits}
        )
        answers = ["", ""]
        for chunk in text:
            answers[chunk.choices[0].index] += chunk.choices[0].text
        assert all(re.fullmatch("[0-3]{4}", answer) for answer in answers)
        bias = {str(token): 100 for token in server.policy.tokenizer("{}")["input_ids"]}
        assert ask(client, response_format={"type": "json_object"}, **options | {"logit_bias": bias}) == "{}"
        for wrong in (
            {"type": "regex", "pattern": "(" * 3}, {"type": "regex", "pattern": "((a{999}){999}){999}"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
            {"type": "json_schema"}, {"type": "text", "pattern": "a"}, {"type": "xml"},
        ):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as raised:
                ask(client, response_format=wrong, **options)
            assert (raised.value.param or "").startswith("response_format"), wrong
        assert not server.engine.running and not server.engine.waiting


def ask(client: Any, **options: Any) -> str:
    return client.chat.completions.create(**options).choices[0].message.content


def test_completions_of_texts_tokens_and_several(server, client):
    found = client.completions.create(model="tiny", prompt=["w7 w8", "w9"], temperature=0, n=2, user="bob")
    expected = [by_engine(server, prompt, "bob", max_new_tokens=16) for prompt in ("w7 w8", "w9") for _ in range(2)]
    assert [choice.text for choice in found.choices] == expected
    ids = server.policy.tokenizer("w7 w8")["input_ids"]
    assert client.completions.create(model="tiny", prompt=ids, temperature=0, user="bob").choices[0].text == expected[0]
    stream = client.completions.create(model="tiny", prompt="w9", temperature=0, user="bob", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[2]


def test_prompts_that_were_computed_are_counted_as_cached(client):
    asked = [{"role": "user", "content": " ".join(f"w{10 + i % 40}" for i in range(80))}]
    options = {"model": "tiny", "messages": asked, "max_tokens": 2, "user": "alice"}
    first, second = (client.chat.completions.create(**options).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 64


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"user": "nobody"}, 404, "user", "user_not_found"),
        ({"extra_body": {"steering": {"users": {"nobody": 1.0}}}}, 404, "user", "user_not_found"),
        ({"extra_body": {"tools": [{}]}}, 400, "tools", "unsupported_parameter"),
        ({"extra_body": {"best_of": 2}}, 400, "best_of", "unsupported_parameter"),
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"stop": [""]}, 400, "stop", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"max_tokens": 1000}, 400, "prompt", "context_length_exceeded"),
        ({"user": "__base__"}, 400, "user", "invalid_value"),
        ({"user": "a\nb"}, 400, "user", "invalid_value"),
    ],
)
def test_errors_have_openais_form(client, change, status, param, code):
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT, "max_tokens": 4, **change})
    assert raised.value.status_code == status
    assert raised.value.body["param"] == param and raised.value.body["code"] == code and raised.value.body["message"]


def test_a_null_is_as_good_as_left_out_and_half_a_character_is_an_error(http):
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 2, "tools": None, "stop": None, "logit_bias": None}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    for bad in ('{"model": "\\ud800"}', '{"\\ud800": 1}', "[1]", "{", '{"model": NaN}'):
        answer = http.post("/v1/chat/completions", content=bad, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_stream_that_is_cut_off_frees_its_row(tmp_path):
    with tiny_server(tmp_path / "users.db", engine={"max_rows": 1}) as server:
        server.policy.model.generation_config.eos_token_id = None
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        server.engine._ends = set()  # an answer that goes on to its limit
        gate, steps = threading.Event(), []
        plain = server.engine.step

        def step():
            steps.append(server.engine.running)
            if len(steps) > 3:
                gate.wait(10)
            return plain()

        server.engine.step = step
        stream = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
        wait_for(lambda: server.service.open_requests == 0)
        here = len(steps)
        gate.set()
        wait_for(lambda: not server.engine.running)
        assert len(steps) <= here + 2, "the row is free at the next step"


def test_a_client_that_goes_away_without_streaming_frees_its_row(server, http):
    ends, server.engine._ends = server.engine._ends, set()
    try:
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "tiny", "messages": CHAT, "max_tokens": 240}
            http.post("/v1/chat/completions", json=body, timeout=0.02)
        wait_for(lambda: not server.engine.running and not server.engine.waiting)
    finally:
        server.engine._ends = ends


# ------------------------------------------------------------ users


def test_users_and_choices_come_go_and_steer(http):
    made = http.post("/v1/users", json={"name": "a/b ?#é"})
    assert made.status_code == 201 and made.json()["id"] == "a/b ?#é" and made.json()["choices"] == 0
    path = "/v1/users/a%2Fb%20%3F%23%C3%A9"
    assert http.get(path).json()["version"] == 1
    assert http.post("/v1/users", json={"name": "a/b ?#é"}).json()["error"]["code"] == "user_exists"
    added = http.post(path + "/choices", json={"choices": CHOICES})
    assert added.status_code == 201 and added.json()["choices"] == 2
    listed = http.get(path + "/choices").json()["data"]
    assert [{k: one[k] for k in ("prompt", "chosen", "rejected")} for one in listed] == [
        {"prompt": "", **c} for c in CHOICES
    ]
    before = http.get(path + "?latent=true").json()["latent"]
    assert http.delete(f"{path}/choices/{listed[0]['id']}").json()["choices"] == 1
    assert http.get(path + "?latent=true").json()["latent"] != before
    assert http.delete(f"{path}/choices/{listed[0]['id']}").json()["error"]["code"] == "choice_not_found"
    exported = http.get(path + "/export").json()
    assert exported == {"name": "a/b ?#é", "strength": 1.0, "choices": [{"prompt": "", **CHOICES[1]}]}
    assert http.delete(path).json() == {"id": "a/b ?#é", "object": "user", "deleted": True}
    assert http.delete(path).status_code == http.get(path).status_code == http.get(path + "/choices").status_code == 404


def test_users_are_listed_by_pages(http):
    names = [f"page-{i:02}" for i in range(7)]
    for name in names:
        assert http.post("/v1/users", json={"name": name}).status_code == 201
    found, after = [], "page-"
    while True:
        page = http.get("/v1/users", params={"limit": 3, "after": after}).json()
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = found[-1]
    assert found == names
    for name in names:
        http.delete(f"/v1/users/{name}")


def test_a_deleted_user_is_gone_from_disk_before_the_answer(server, http, tmp_path):
    secret = "w40 w41 w42 w43"
    http.post("/v1/users", json={"name": "Forgotten", "choices": [{"chosen": secret, "rejected": "w44"}]})
    assert server.store.get("Forgotten") is not None
    assert http.delete("/v1/users/Forgotten").status_code == 200
    assert server.store.get("Forgotten") is None and server.store.choices("Forgotten") is None


def test_feedback_is_a_choice_of_whom_the_answers_were_for(server, client, http):
    http.post("/v1/users", json={"name": "judge"})
    options = {"model": "tiny", "messages": CHAT, "user": "judge", "max_tokens": 8}
    two = client.chat.completions.create(n=2, seed=1, **options)
    answer = http.post("/v1/feedback", json={"better": two.id, "worse": two.id, "worse_index": 1})
    assert answer.status_code == 201 and answer.json()["user"] == http.get("/v1/users/judge").json()
    stream = list(client.chat.completions.create(seed=9, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert http.post("/v1/feedback", json={"better": stream[0].id, "worse": two.id}).status_code == 201
    choices = [(a.text, b.text, a.prompt) for a, b in server.policy.users.choices("judge")]
    texts = [choice.message.content for choice in two.choices]
    assert choices == [(texts[0], texts[1], "w7 w8 w9"), (text, texts[0], "w7 w8 w9")]

    other = client.chat.completions.create(**options | {"messages": [{"role": "user", "content": "w50"}]})
    for body, code in (
        ({"better": other.id, "worse": two.id}, "different_prompts"),
        ({"better": two.id, "worse": two.id}, "invalid_value"),
        ({"better": "chatcmpl-0", "worse": two.id}, "completion_not_found"),
        ({"better": two.id, "worse": two.id, "worse_index": 2}, "completion_not_found"),
    ):
        assert http.post("/v1/feedback", json=body).json()["error"]["code"] == code
    http.delete("/v1/users/judge")


def test_a_question_is_the_pair_after_which_rows_differ_most(server, http):
    http.post("/v1/users", json={"name": "asked", "choices": CHOICES})
    body = {"prompt": "w7 w8", "candidates": 5, "max_tokens": 6, "seed": 3}
    found = http.post("/v1/users/asked/question", json=body).json()
    texts = [
        server.engine.submit([{"role": "user", "content": "w7 w8"}], "asked", max_new_tokens=6, temperature=1.0,
                             seed=3 + i).result().text
        for i in range(5)
    ]  # fmt: skip
    known = [Choice(c["chosen"], c["rejected"], c.get("prompt", "")) for c in CHOICES]

    alone = make_talking_policy()  # without a store, where latents would be bfloat16

    def distance(a: str, b: str) -> float:
        rows = []
        for number, pair in enumerate(((a, b), (b, a))):
            name = f"trial-{number}"
            alone.users.add(name, [*known, Choice(*pair, "w7 w8")])
            rows.append(alone.bank.modulations[alone.users.slot(name)].clone())
            alone.users.remove(name)
        return float((rows[0] - rows[1]).norm())

    best = max(itertools.combinations(dict.fromkeys(texts), 2), key=lambda pair: distance(*pair))
    assert tuple(one["text"] for one in found["answers"]) == best
    assert found["distance"] == pytest.approx(distance(*best), rel=1e-3)
    better, worse = (one["id"] for one in found["answers"])
    assert http.post("/v1/feedback", json={"better": better, "worse": worse}).json()["user"]["choices"] == 3
    http.delete("/v1/users/asked")


def test_the_map_has_users_where_their_latents_are(http):
    found = http.get("/v1/map").json()
    assert {"alice", "bob"} <= {user["id"] for user in found["users"]}
    for user in found["users"]:
        latent = http.get(f"/v1/users/{user['id']}?latent=true").json()["latent"]
        at = [sum(a * (z - c) for a, z, c in zip(axis, latent, found["center"], strict=True)) for axis in found["axes"]]
        assert user["at"] == pytest.approx(at, abs=1e-4)


def test_an_idempotency_key_writes_once(http):
    headers = {"Idempotency-Key": "one"}
    http.post("/v1/users", json={"name": "once"})
    body = {"choices": CHOICES}
    first = http.post("/v1/users/once/choices", json=body, headers=headers)
    again = http.post("/v1/users/once/choices", json=body, headers=headers)
    assert first.json() == again.json() and again.status_code == 201 and again.headers["idempotency-replayed"] == "true"
    assert http.get("/v1/users/once").json()["choices"] == 2
    other = http.post("/v1/users/once/choices", json={"choices": CHOICES[:1]}, headers=headers)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    failed = {"Idempotency-Key": "two"}
    assert http.delete("/v1/users/nobody-yet", headers=failed).status_code == 404
    http.post("/v1/users", json={"name": "nobody-yet"})
    assert http.delete("/v1/users/nobody-yet", headers=failed).status_code == 200  # a failure may be tried again
    http.delete("/v1/users/once")


def test_choices_added_and_removed_at_once_are_all_there(server, http):
    http.post("/v1/users", json={"name": "busy", "choices": CHOICES})
    gone = http.get("/v1/users/busy/choices").json()["data"][0]["id"]

    def add(number: int) -> None:
        new = {"chosen": f"w{20 + number}", "rejected": f"w{40 + number}"}
        assert httpx.post(f"{server.url}/v1/users/busy/choices", json={"choices": [new]}).status_code == 201

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    http.delete(f"/v1/users/busy/choices/{gone}")
    for thread in threads:
        thread.join()
    assert http.get("/v1/users/busy").json()["choices"] == 9
    http.delete("/v1/users/busy")


def test_create_users_makes_them_by_the_first_choice(tmp_path):
    with tiny_server(tmp_path / "users.db", create_users=True) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": "tiny", "messages": CHAT, "user": "new", "temperature": 0, "max_tokens": 12, "n": 1}
        found = http.post("/v1/chat/completions", json=body).json()
        assert found["choices"][0]["message"]["content"] == by_engine(server, CHAT, PRIOR)
        assert http.get("/v1/users/new").status_code == 404
        other = http.post("/v1/chat/completions", json=body | {"temperature": 1, "seed": 1}).json()
        feedback = {"better": found["id"], "worse": other["id"]}
        assert http.post("/v1/feedback", json=feedback).json()["user"]["choices"] == 1
        assert http.get("/v1/users/new").json()["version"] == 1


# ------------------------------------------------------------ keys and limits


def key(secret: str, **options: Any) -> Key:
    return Key(hashlib.sha256(secret.encode()).hexdigest(), **options)


def test_keys_see_their_own_users_only(tmp_path):
    keys = [key("a", namespace="one"), key("b", namespace="two"), key("root", admin=True)]
    with tiny_server(tmp_path / "users.db", keys) as server:

        def call(secret: str | None, method: str, path: str, **options: Any) -> Any:
            headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
            return httpx.request(method, server.url + path, headers=headers, **options)

        for secret in (None, "c", "ab"):
            assert call(secret, "GET", "/v1/users").status_code == 401
        assert call("a", "POST", "/v1/users", json={"name": "x", "choices": CHOICES[:1]}).status_code == 201
        assert call("b", "POST", "/v1/users", json={"name": "x", "choices": CHOICES[1:]}).status_code == 201
        assert call("a", "POST", "/v1/users", json={"name": "private"}).status_code == 201
        assert [one["id"] for one in call("a", "GET", "/v1/users").json()["data"]] == ["private", "x"]
        assert [one["id"] for one in call("b", "GET", "/v1/users").json()["data"]] == ["x"]
        everybody = [one["id"] for one in call("root", "GET", "/v1/users").json()["data"]]
        assert everybody == ["one/private", "one/x", "two/x"]
        assert [one["id"] for one in call("b", "GET", "/v1/map").json()["users"]] == ["x"]

        def ask(secret: str, **options: Any) -> Any:
            body = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 12, **options}
            return call(secret, "POST", "/v1/chat/completions", json=body)

        assert ask("a", user="x").json()["choices"][0]["message"]["content"] == by_engine(server, CHAT, "one/x")
        assert ask("b", user="x").json()["choices"][0]["message"]["content"] == by_engine(server, CHAT, "two/x")
        for name in ("private", "one/private", "../one/private"):
            for answer in (ask("b", user=name), ask("b", steering={"users": {name: 1.0}})):
                assert answer.status_code == 404 and "one/x" not in answer.text and "two/" not in answer.text
        mine = ask("a", user="x").json()["id"]
        stolen = call("b", "POST", "/v1/feedback", json={"better": mine, "worse": mine})
        assert stolen.json()["error"]["code"] == "completion_not_found"
        assert call("a", "GET", "/metrics").status_code == 403
        figures = call("root", "GET", "/metrics").text
        assert "fssa_choices_total 2.0" in figures and "private" not in figures


def test_prefixes_are_not_shared_between_namespaces(tmp_path):
    keys = [key("a", namespace="one"), key("b", namespace="two")]
    asked = [{"role": "user", "content": " ".join(f"w{10 + i % 40}" for i in range(80))}]
    with tiny_server(tmp_path / "users.db", keys) as server:

        def cached(secret: str, model: str) -> int:
            body = {"model": model, "messages": asked, "max_tokens": 1}
            answer = httpx.post(server.url + "/v1/chat/completions", json=body,
                                headers={"Authorization": f"Bearer {secret}"})  # fmt: skip
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        for model in ("tiny", "tiny:base"):
            assert [cached(secret, model) for secret in "abab"] == [0, 0, 64, 64]


def test_limits_of_a_key(tmp_path):
    keys = [key("r", namespace="r", requests_per_minute=2), key("t", namespace="t", tokens_per_minute=5),
            key("o", namespace="o", open_requests=1)]  # fmt: skip
    with tiny_server(tmp_path / "users.db", keys) as server:

        def ask(secret: str) -> int:
            body = {"model": "tiny:base", "messages": CHAT, "max_tokens": 12}
            answer = httpx.post(server.url + "/v1/chat/completions", json=body,
                                headers={"Authorization": f"Bearer {secret}"})  # fmt: skip
            assert answer.status_code == 200 or int(answer.headers["retry-after"]) > 0
            return answer.status_code

        assert [ask("r") for _ in range(3)] == [200, 200, 429]
        assert [ask("t") for _ in range(2)] == [200, 429]
        with server.service.keys.client("Bearer o").open():
            assert ask("o") == 429
        assert ask("o") == 200


def test_the_file_of_keys(tmp_path):
    path = tmp_path / "keys.json"
    secret = add_key(path, namespace="acme", requests_per_minute=5)
    add_key(path, admin=True)
    assert secret not in path.read_text() and path.stat().st_mode & 0o077 == 0
    acme, admin = read_keys(path)
    assert acme == key(secret, namespace="acme", requests_per_minute=5) and admin.admin
    for bad in ({"namespace": "A"}, {"namespace": "a/b"}, {"namespace": ""}, {"admin": True, "namespace": "a"},
                {"namespace": "a", "open_requests": 0}):  # fmt: skip
        with pytest.raises(ValueError):
            add_key(path, **bad)
    path.write_text('{"keys": [{"key": "plain"}]}')
    with pytest.raises(ValueError, match="expected keys"):
        read_keys(path)


def test_bodies_headers_and_slow_clients_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("fssa_fast.serving.server.HEADER_SECONDS", 0.2)
    with tiny_server(tmp_path / "users.db", body_bytes=2000, body_seconds=0.3) as server:
        long = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "w7 " * 1000}]}).encode()
        kind = {"Content-Type": "application/json"}
        url = server.url + "/v1/chat/completions"
        assert httpx.post(url, content=long, headers=kind).status_code == 413
        pieces = (long[i : i + 500] for i in range(0, len(long), 500))
        assert httpx.post(url, content=pieces, headers=kind).status_code == 413
        head = b"POST /v1/users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for begun, answer in ((head + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408"), (head, b"")):
            with socket.create_connection(("127.0.0.1", server.port)) as slow:
                slow.settimeout(5)
                slow.sendall(begun)
                assert slow.recv(12) == answer
        with socket.create_connection(("127.0.0.1", server.port)) as slow:  # a first request, and a slow second one
            slow.settimeout(5)
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: b"}" in slow.recv(4096))
            slow.sendall(head)
            assert slow.recv(12) == b""
        assert httpx.get(server.url + "/health", headers={"X-Long": "x" * (40 << 10)}).status_code == 431
        assert httpx.get(server.url + "/health", headers={"Host": "evil.example"}).status_code == 400


def test_running_requests_end_and_new_ones_are_refused(tmp_path):
    server = Tiny(tmp_path / "users.db", None, {})
    server.engine._ends = set()
    gate, step = threading.Event(), server.engine.step

    def gated():
        if server.service.draining:
            gate.wait(10)
        return step()

    server.engine.step = gated
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=200, stream=True)
    next(iter(stream))
    server._server.handle_exit(15, None)
    assert httpx.get(server.url + "/health").status_code == 200
    for path in ("/ready", "/v1/models"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
    gate.set()
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    server._thread.join(10)
    assert not server._thread.is_alive()
    server.store.close()


def test_what_is_not_done_in_time_is_told_so(tmp_path):
    """A server that is stopped ends what runs beyond its time of grace: by an error of the stream, or a 503."""
    server = Tiny(tmp_path / "users.db", None, {}, grace=0.3)
    server.engine._ends, gate, step = set(), threading.Event(), server.engine.step
    server.engine.step = lambda: gate.wait(0.05) and False or step()
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 200}
    refused: list[Any] = []
    whole = threading.Thread(target=lambda: refused.append(httpx.post(server.url + "/v1/chat/completions", json=body)))
    whole.start()
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(stream=True, **body)
    next(iter(stream))
    wait_for(lambda: server.engine.running == 2)
    server._server.handle_exit(15, None)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    whole.join(10)
    assert refused[0].status_code == 503 and refused[0].json()["error"]["code"] == "shutting_down"
    server._thread.join(10)
    assert not server._thread.is_alive()
    server.store.close()


def test_a_request_that_fails_is_said_in_openais_form(server, http, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("w99")

    monkeypatch.setattr(server.engine._fused, "forward", fail)
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 2}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "generation_failed"
    streamed = http.post("/v1/chat/completions", json=body | {"stream": True}).text
    assert "generation_failed" in streamed and "[DONE]" not in streamed and "w99" not in answer.text + streamed


def test_figures_for_prometheus(server, http):
    def figures() -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    before = figures()
    body = {"model": "tiny", "user": "bob", "prompt": " ".join(f"w{i % 50}" for i in range(60, 140)), "max_tokens": 3}
    for _ in range(2):
        tokens = http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"]
    after = figures()
    grown = {name: after[name] - before[name] for name in before if after[name] != before[name]}
    assert grown["fssa_prompt_tokens_total"] == 2 * 80 and grown["fssa_cached_tokens_total"] == 64
    assert grown["fssa_first_token_seconds_count"] == 2 and grown["fssa_step_seconds_count"] >= 2 * tokens
    assert grown["fssa_answer_tokens_total"] >= grown.get("fssa_token_seconds_count", 0) + 2
    assert after["fssa_engine_running"] == after["fssa_engine_waiting"] == 0 and after["fssa_bank_slots"] >= 1


def test_traces_go_on_from_the_clients_and_say_no_names(server, http):
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider, found = TracerProvider(), export.InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fssa_fast.serving.traces._tracer", provider.get_tracer("test"))
        parent = {"traceparent": f"00-{7:032x}-{9:016x}-01"}
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 2, "user": "alice", "stream": True}
        http.post("/v1/chat/completions", json=body, headers=parent)
        http.get("/v1/users/alice")
        wait_for(lambda: len(found.get_finished_spans()) == 2)
    asked, user = found.get_finished_spans()
    assert (asked.context.trace_id, asked.parent.span_id) == (7, 9) and user.parent is None
    assert (asked.name, user.name) == ("POST /v1/chat/completions", "GET /v1/users/{name}")
    assert [event.name for event in asked.events] == ["first token", "answered"]
    assert asked.events[1].attributes["gen_ai.usage.output_tokens"] == 2
    assert not any(word in asked.to_json() + user.to_json() for word in ("alice", "w7"))


def test_the_log_has_no_names_and_no_texts(server, http, caplog):
    with caplog.at_level("INFO", logger="fssa_fast.serving"):
        http.post("/v1/users", json={"name": "hidden-name", "choices": CHOICES})
        http.delete("/v1/users/hidden-name")
        http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT, "max_tokens": 2, "user": "alice"})
        wait_for(lambda: len(caplog.records) == 3)  # the line comes after the answer
    found = [json.loads(record.message) for record in caplog.records]
    assert [(line["route"], line["status"]) for line in found] == [
        ("/v1/users", 201), ("/v1/users/{name}", 200), ("/v1/chat/completions", 200)
    ]  # fmt: skip
    assert not any(word in caplog.text for word in ("hidden-name", "alice", "w11", "w7"))


def test_what_is_remembered_has_a_bound_and_an_end():
    kept: Remembered[str] = Remembered(1000.0, 1000)
    for number in range(5):
        kept.put(number, "x", 100)
    assert len(kept) == 2 and kept.get(4) == "x" and kept.get(0) is None
    brief: Remembered[str] = Remembered(0.0, 1000)
    brief.put("a", "x", 1)
    time.sleep(0.001)
    assert brief.get("a") is None
