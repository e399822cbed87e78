"""Two replicas on Ray answer as one process, change their version without a failed request, and lose no choice."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
httpx = pytest.importorskip("httpx")

from databases import Server as Postgres  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402
from serving_versions import save_versions  # noqa: E402
from tiny import EOS  # noqa: E402

from fssa_fast.data.history import read_history  # noqa: E402
from fssa_fast.serving.ray import Arguments, Held, application  # noqa: E402
from fssa_fast.serving.versions import Shelf  # noqa: E402
from fssa_fast.users import open_store  # noqa: E402

pytestmark = pytest.mark.slow

CHOICES = [{"prompt": "w10", "chosen": f"w{i}", "rejected": f"w{i + 20} w31"} for i in range(11, 15)]
NAMES = [f"user {i}" for i in range(3)]


def chat(text: str, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0} | changes


class Cluster:
    """Two replicas behind Serve's proxy, over PostgreSQL."""

    def __init__(self, folder: Path, store: str) -> None:
        self.one, self.two = save_versions(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.history = folder / "history"
        self.store = store
        self.arguments = {
            "policy": str(self.one), "store": store, "name": "tiny", "without_keys": True, "rows": 4,
            "cache_tokens": 1024, "cpus": 0.1, "history": str(self.history), "by_session": True,
        }  # fmt: skip
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self.deploy({"main": {"policy": str(self.one)}})
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def deploy(self, versions: dict[str, Any]) -> None:
        """What `serve deploy` does with a config file; returns when all replicas hold these versions."""
        deployment = {"name": "fssa", "num_replicas": 2, "user_config": {"versions": versions}}
        one = {"name": "default", "import_path": "fssa_fast.serving.ray:app", "args": self.arguments}
        config = {"applications": [one | {"route_prefix": "/", "deployments": [deployment]}]}
        _get_global_client().deploy_apps(ServeDeploySchema(**config))
        end = time.monotonic() + 400
        while (now := serve.status().applications.get("default")) is None or now.status != "RUNNING":
            assert time.monotonic() < end and (now is None or now.status != "DEPLOY_FAILED"), now
            time.sleep(0.1)

    def post(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        answer = self.http.post(path, json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json()

    def completions(self) -> list[set[str | None]]:
        """The ids of the completions that each replica made."""
        return [{line.id for line in read_history([path]) if line.kind == "completion"}
                for path in self.history.glob("*.jsonl")]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        database = Postgres()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    try:
        yield Cluster(tmp_path_factory.mktemp("ray"), database.database().where)
    finally:
        serve.shutdown()
        ray.shutdown()
        database.stop()


class Load:
    """Threads that do something over and over, and what came of it."""

    def __init__(self, count: int, once: Callable[[int, int], None]) -> None:
        self.errors: list[str] = []
        self.done = 0
        self._stop = threading.Event()

        def work(number: int) -> None:
            turn = 0
            while not self._stop.is_set():
                try:
                    once(number, turn)
                    self.done += 1
                except Exception as error:
                    self.errors.append(repr(error)[:300])
                turn += 1

        self._threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def until(self, more: int, seconds: float = 60) -> None:
        """Waits until so many more have been done."""
        want, end = self.done + more, time.monotonic() + seconds
        while self.done < want:
            assert time.monotonic() < end, self.errors[-3:]
            time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def test_two_replicas_answer_as_one_process(cluster: Cluster, tmp_path: Path) -> None:
    engine = {"max_rows": 4, "max_tokens": 1024, "max_waiting": 64, "step_tokens": 256}
    alone = Shelf(cluster.one, None, None, open_store(cluster.store), engine, shared=True).make("main", cluster.one)
    for number, name in enumerate(NAMES):
        cluster.post("/v1/users", {"name": name, "choices": CHOICES[number:]})
    asked = [(f"w{7 + i} w{20 + i}", name) for i in range(5) for name in NAMES]
    expected = alone.engine.run(
        [{"prompt": [{"role": "user", "content": t}], "user": n, "max_new_tokens": 8} for t, n in asked]
    )
    answers = [cluster.post("/v1/chat/completions", chat(text, user=name)) for text, name in asked]
    assert [a["choices"][0]["message"]["content"] for a in answers] == [result.text for result in expected]
    made = cluster.completions()
    assert len(made) == 2 and all(own & {answer["id"] for answer in answers} for own in made)  # both took part
    # Each answer's feedback finds it, whichever replica is asked; a stream comes in pieces.
    by_text: dict[str, list[Any]] = {}
    for (text, _), answer in zip(asked, answers, strict=True):
        by_text.setdefault(text, []).append(answer)
    for better, worse, _ in by_text.values():
        if better["choices"][0]["message"]["content"] != worse["choices"][0]["message"]["content"]:
            cluster.post("/v1/feedback", {"better": better["id"], "worse": worse["id"], "user": "user 2"})
    body = chat("w9 w10", user=NAMES[0], max_tokens=150, logit_bias={str(EOS): -100})
    with cluster.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
        pieces = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    whole = cluster.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert len(pieces) > 4 and "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == whole
    alone.engine.close()


def test_a_session_stays_with_its_replica(cluster: Cluster) -> None:
    for session in ("x", "y", "z"):
        header = {"x-session-id": session}
        ids = {cluster.post("/v1/chat/completions", chat("w9"), **header)["id"] for _ in range(5)}
        assert sorted(len(own & ids) for own in cluster.completions())[:-1] == [0]


def test_a_version_is_changed_under_load_without_a_failed_request(cluster: Cluster) -> None:
    seen: Counter[str] = Counter()

    def once(number: int, turn: int) -> None:
        body = chat(f"w{7 + turn % 50}", user=NAMES[number], stream=True, max_tokens=20)
        with httpx.stream("POST", cluster.url + "/v1/chat/completions", timeout=60, json=body) as answer:
            events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert answer.status_code == 200 and events[-1] == "[DONE]", events[-1:]
        versions = {json.loads(event)["system_fingerprint"] for event in events[:-1]}
        assert len(versions) == 1, versions
        seen[versions.pop()] += 1

    load, same = Load(3, once), replicas()
    load.until(20)
    cluster.deploy({"next": {"policy": str(cluster.two)}})
    before = seen["main"]
    load.until(20)
    load.stop()
    assert load.errors == [] and before >= 20 and seen["next"] >= 10
    assert seen["main"] <= before + 3  # only what was under way
    assert len(same) == 2 and replicas() == same  # made on the base models that were there
    models = [model["id"] for model in cluster.http.get("/v1/models").json()["data"]]
    assert models == ["tiny", "tiny:base"]


def replicas() -> list[int]:
    """Process ids of the replicas that this test has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::ServeReplica") and _is_ours(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _is_ours(process: int) -> bool:
    while process > 1:
        if process == os.getpid():
            return True
        process = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    return False


def test_a_replica_that_is_killed_loses_no_choice_and_the_other_answers_on(cluster: Cluster) -> None:
    acknowledged: dict[str, list[str]] = {f"writer {i}": [] for i in range(3)}
    for name in acknowledged:
        cluster.post("/v1/users", {"name": name})

    def once(number: int, turn: int) -> None:
        name = f"writer {number}"
        choice = {"prompt": f"{name}, {turn}", "chosen": "w11", "rejected": "w12"}
        answer = httpx.post(f"{cluster.url}/v1/users/{name}/choices", json={"choices": [choice]}, timeout=60)
        if answer.status_code == 201:
            acknowledged[name].append(choice["prompt"])
        assert answer.status_code == 201, answer.text
        assert httpx.post(cluster.url + "/v1/chat/completions", json=chat("w7", user=name), timeout=60).is_success

    load = Load(3, once)
    load.until(15)
    victims = replicas()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    load.until(30)
    load.stop()
    # What failed was under way in the one that was killed, or met it before Serve had noticed.
    assert len(load.errors) < 30, load.errors
    store = open_store(cluster.store)
    for name, prompts in acknowledged.items():
        kept = [option.prompt for option, _ in store.choices(name) or ()]
        assert prompts and set(prompts) <= set(kept) and len(kept) == len(set(kept))
    store.close()


def test_what_cannot_be_is_said_before_anything_starts(tmp_path: Path) -> None:
    given = {"policy": "p", "store": "s"}
    with pytest.raises(ValueError, match="api_keys, without_keys: expected one of them"):
        application(Arguments(**given))
    with pytest.raises(ValueError, match="rowz"):
        Arguments(**given, rowz=3)
    for held in ({"versions": {}}, {"versions": {"a": {"policy": "p", "share": -1}}}, {"version": {}}):
        with pytest.raises(ValueError):
            Held(**held)
