"""Versions over one base: each answers as it does alone, users are split between them, and all is recorded."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")

from serving_tiny import Running  # noqa: E402
from serving_versions import save_versions  # noqa: E402
from tiny import make_choices  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from fssa_fast import PRIOR, SqliteStore, SteerablePolicy, cli  # noqa: E402
from fssa_fast.data.history import History, digest, read_history  # noqa: E402
from fssa_fast.generation import FusedModel  # noqa: E402
from fssa_fast.policy.sharing import share_parameters  # noqa: E402
from fssa_fast.serving import Settings, make_app  # noqa: E402
from fssa_fast.serving.versions import Shelf, Version, Versions  # noqa: E402

CHAT: list[Any] = [{"role": "user", "content": "w7 w8 w9"}]
GREEDY = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 0}
ENGINE = {"max_rows": 4, "max_tokens": 1024, "step_tokens": 32}
CHOICES = [{"prompt": "w10", "chosen": f"w{i}", "rejected": f"w{i + 20} w31"} for i in range(11, 15)]


class Served:
    """A server of two versions: where it is, and what it is made of."""

    def __init__(self, url: str, versions: Versions, history: Path, saved: tuple[Path, Path]) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        self.versions, self.history, self.saved = versions, history, saved
        self.one, self.two = versions

    def post(self, path: str, body: Any) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def ask(self, **changes: Any) -> dict[str, Any]:
        return self.post("/v1/chat/completions", GREEDY | changes)

    def user_of(self, version: Version, but: str = "") -> str:
        """A name that the split gives to a version."""
        return next(n for n in (f"user {i}" for i in range(99)) if self.versions.of(n) is version and n != but)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def served(saved: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    store = SqliteStore(folder / "users.db")
    shelf = Shelf(saved[0], None, None, store, ENGINE, shared=True)
    versions = Versions([shelf.make("one", saved[0]), shelf.make("two", saved[1])], "autumn")
    app = make_app(versions, store, Settings("tiny"), history=(history := History(folder / "history.jsonl", "autumn")))
    server = Running(app)
    yield Served(server.url, versions, history.path, saved)
    server.stop()
    history.close()
    store.close()


def lines(served: Served, kind: str) -> list[Any]:
    return [line for line in read_history([served.history]) if line.kind == kind]


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- one base


def test_versions_share_what_no_adapter_is_packed_into(served: Served) -> None:
    one, two = served.one.policy, served.two.policy
    for (name, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters(), strict=True):
        assert (a is b) == (".fssa." not in name)
    forms = one.fused, two.fused
    assert forms[0] is not None and forms[1] is not None and forms[0].turn is forms[1].turn
    packed = [{w.data.data_ptr() for w in form._packed.values()} for form in forms]
    assert packed[0] == packed[1] and forms[0].head.data.data_ptr() in packed[0]
    assert forms[0].blocks[0].qkv.weight.data.data_ptr() != forms[1].blocks[0].qkv.weight.data.data_ptr()
    with pytest.raises(ValueError, match="base model without steering"):
        share_parameters(one.model)


def test_a_form_is_not_made_beside_one_whose_parameters_have_changed(saved: tuple[Path, Path]) -> None:
    policy = SteerablePolicy.from_pretrained(saved[0])
    fused = policy.fuse()
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="parameters that were fused"):
        FusedModel(policy, beside=fused)
    fresh = policy.fuse()
    assert fresh.head.data.data_ptr() != fused.head.data.data_ptr()


def test_each_version_answers_as_alone_whoever_shares_the_base(served: Served, saved: tuple[Path, Path]) -> None:
    """Both at once, in threads, against policies that were loaded by themselves."""
    prompts = [f"w{7 + i} w8 w{20 + i}" for i in range(4)]
    served.post("/v1/users", {"name": "everybody's", "choices": CHOICES})
    stored = served.one.policy.users.choices("everybody's")
    found: dict[str, list[Any]] = {}

    def answer(version: Version) -> None:
        requests = [{"prompt": p, "user": "everybody's", "max_new_tokens": 8} for p in prompts]
        found[version.name] = [result.tokens for result in version.engine.run(requests)]

    threads = [threading.Thread(target=answer, args=(version,)) for version in served.versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name, directory in zip(("one", "two"), saved, strict=True):
        alone = SteerablePolicy.from_pretrained(directory)
        pairs = torch.stack([torch.stack([a.embedding, b.embedding]) for a, b in stored])
        latents = alone.encoder.latents(pairs, torch.zeros(len(pairs), dtype=torch.long), torch.tensor([0, len(pairs)]))
        row = alone.rows(latents.bfloat16().float())[0]
        with alone.engine(**ENGINE, background=False) as engine, alone.bank.take() as (slot,):
            alone.bank.rows[slot] = row.detach()
            alone.users.slots = lambda names, slot=slot: _held(slot)  # the same row, without a store
            assert found[name] == [engine.submit(p, PRIOR, max_new_tokens=8).result().tokens for p in prompts]
    assert found["one"] != found["two"]


class _held:
    def __init__(self, slot: int) -> None:
        self.slot = slot

    def __enter__(self) -> torch.Tensor:
        return torch.tensor([self.slot], dtype=torch.int32)

    def __exit__(self, *exception: object) -> None:
        pass


# ---------------------------------------------------------------- the split


def test_the_split_is_stable_and_as_stated() -> None:
    policy = engine = None

    def split(*shares: float, experiment: str = "") -> list[str]:
        versions = Versions(
            [Version(name, policy, engine, share) for name, share in zip("abc", shares, strict=False)],  # type: ignore
            experiment,
        )
        assert versions.of(None) is versions.first
        return [versions.of(f"user {i}").name for i in range(4000)]

    even = split(1, 2, 1)
    counts = Counter(even)
    assert even == split(1, 2, 1) == split(0.25, 0.5, 0.25)
    assert abs(counts["a"] - 1000) < 140 and abs(counts["b"] - 2000) < 160  # five deviations
    other = split(1, 2, 1, experiment="another")
    assert abs(sum(a == b for a, b in zip(even, other, strict=True)) - 1500) < 160  # drawn again
    assert set(split(1, 0)) == {"a"}
    # A share that grows takes users from the other one, and gives it none.
    moved = [(a, b) for a, b in zip(split(0.9, 0.1), split(0.6, 0.4), strict=True) if a != b]
    assert set(moved) == {("a", "b")}
    for names, shares, message in ((["a", "a"], [1, 1], "each name once"), (["base"], [1], "not 'base'"),
                                   (["a"], [0], "above 0"), (["a"], [-1], "at least 0"), (["a b"], [1], "letters")):
        with pytest.raises(ValueError, match=message):
            Versions([Version(n, policy, engine, s) for n, s in zip(names, shares, strict=True)])  # type: ignore


def test_a_user_is_answered_by_one_version_or_by_the_one_named(served: Served) -> None:
    for version in served.versions:
        name = served.user_of(version)
        served.post("/v1/users", {"name": name, "choices": CHOICES})
        expected = {v.name: v.engine.submit(CHAT, name, max_new_tokens=8).result().text for v in served.versions}
        answer = served.ask(user=name)
        assert text_of(answer) == expected[version.name] and answer["system_fingerprint"] == version.name
        for other in served.versions:
            pinned = served.ask(user=name, model=f"tiny@{other.name}")
            assert text_of(pinned) == expected[other.name] and pinned["system_fingerprint"] == other.name
        # A choice written by the first version's encoder is seen by both, at the next request.
        served.post(f"/v1/users/{name}/choices", {"choices": [CHOICES[0] | {"chosen": "w40 w41"}]})
        after = served.ask(user=name)
        assert after["steering"]["latent"] == answer["steering"]["latent"] + 1 == 2
        latent = version.policy.users[name].latent
        pairs = torch.stack([torch.stack([a.embedding, b.embedding]) for a, b in version.policy.users.choices(name)])
        nothing, ends = torch.zeros(len(pairs), dtype=torch.long), torch.tensor([0, len(pairs)])
        with torch.no_grad():
            expected_latent = version.policy.encoder.latents(pairs, nothing, ends)[0]
        torch.testing.assert_close(latent, expected_latent, rtol=0.01, atol=0.01)
    names = [model["id"] for model in served.http.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny:base", "tiny@one", "tiny@two"]
    assert served.http.post("/v1/chat/completions", json=GREEDY | {"model": "tiny@three"}).status_code == 404


# ---------------------------------------------------------------- what is recorded


def test_completions_and_choices_carry_how_they_were_made(served: Served) -> None:
    name = served.user_of(served.two, but=served.user_of(served.two))
    served.post("/v1/users", {"name": name, "choices": CHOICES[:2]})
    asked = {"user": name, "temperature": 0.7, "top_p": 0.9, "messages": [{"role": "user", "content": "w33 w34"}]}
    mine = next(answer for _ in range(100) if text_of(answer := served.ask(**asked)))  # some end at once
    other = served.ask(**asked, model="tiny@one", seed=3)
    base = served.ask(user=name, model="tiny:base", messages=asked["messages"])
    assert mine["steering"]["version"] == "two" and mine["steering"]["latent"] == 1
    assert mine["steering"]["sampling"].keys() >= {"temperature", "top_p", "seed"}
    again = served.ask(**asked, seed=mine["steering"]["sampling"]["seed"])
    assert text_of(again) == text_of(mine)  # what is recorded is enough to make it again
    served.post("/v1/feedback", {"better": mine["id"], "worse": other["id"]})
    served.post("/v1/feedback", {"better": mine["id"], "worse": base["id"]})
    recorded = {line.id: line for line in lines(served, "completion")}
    for answer, version, latent in ((mine, "two", 1), (other, "one", 1), (base, "base", None)):
        line = recorded[answer["id"]]
        assert (line.made.version, line.made.latent, line.user) == (version, latent, digest(name))
        assert line.experiment == "autumn" and line.made.sampling == answer["steering"]["sampling"]
    assert recorded[other["id"]].made.sampling["seed"] == 3
    choices = [line for line in lines(served, "choice") if line.user == digest(name)]
    assert [(line.latent, line.choices, line.version) for line in choices] == [
        (1, 1, "two"), (1, 2, "two"), (2, 3, "two"), (3, 4, "two")]  # fmt: skip
    sides = [(line.better.version, line.worse.version) for line in choices[2:]]
    assert sides == [("two", "one"), ("two", "base")] and choices[1].better is None
    assert choices[2].choice == digest("w33 w34", text_of(mine), text_of(other))
    words = served.history.read_text()
    assert name not in words and text_of(mine) not in words and "w33" not in words
    metrics = served.http.get("/metrics").text
    assert "fssa_engine_running 0.0" in metrics


def test_the_report_of_a_servers_history(served: Served, tmp_path: Path) -> None:
    name = served.user_of(served.one, but=served.user_of(served.one))
    served.post("/v1/users", {"name": name, "choices": CHOICES})
    for i in range(12):
        pair = [served.ask(user=name, model=f"tiny@{v}", messages=[{"role": "user", "content": f"w{20 + i}"}])
                for v in ("one", "two")]  # fmt: skip
        if text_of(pair[0]) != text_of(pair[1]):
            served.post("/v1/feedback", {"better": pair[1]["id"], "worse": pair[0]["id"]})
    out = tmp_path / "report.json"
    where = served.one.policy.users._at_rest.path  # type: ignore[attr-defined]
    done = CliRunner().invoke(
        cli.app,
        ["experiment", "report", str(served.history), "--experiment", "autumn", "--store", str(where), "--periods", "2",
         "--version", f"one={served.saved[0]}", "--version", f"two={served.saved[1]}", "--json", str(out)],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    between = next(duel for duel in found["duels"] if (duel["a"], duel["b"]) == ("one", "two"))
    assert between["n"] > 5 and between["low"] <= between["wins"] < 0.5 and "one against two" in done.output
    assert len(found["drift"]["columns"]) == 3 and set(found["foreseen"]) == {"one", "two"}
    assert sum(map(len, found["foreseen"].values())) == len(lines(served, "choice"))  # all are still in the database


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    history = History(path, "x")
    history.choice("alice", "one", ("a", "b", "c"), 1, 1)
    history.close()
    (line,) = read_history([path])
    assert (line.user, line.choice, line.latent) == (digest("alice"), digest("a", "b", "c"), 1)
    assert path.stat().st_mode & 0o777 == 0o600
    for bad in ('{"kind": "choice"}', '{"kind": "vote", "time": 1, "experiment": "", "version": "a"}', '{"made": {}}'):
        path.write_text(bad)
        with pytest.raises(ValueError, match="line 1: expected a line of a server's history"):
            read_history([path])


def test_policies_with_encoders_of_their_own_share_a_store(saved: tuple[Path, Path], tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "users.db")
    one, two = (SteerablePolicy.from_pretrained(where) for where in saved)
    one.use_store(store)
    one.users.add("a", make_choices(0))
    with pytest.raises(RuntimeError, match="another's"):
        two.use_store(store)
    two.use_store(store, shared=True)
    before = two.users["a"].latent
    two.users.add_choices("a", make_choices(1))  # at rest it is now two's latent; one makes its own
    assert one.users["a"].version == two.users["a"].version == 2
    assert not torch.equal(two.users["a"].latent, before)
    fresh = SteerablePolicy.from_pretrained(saved[0])
    fresh.users.add("a", make_choices(0) + make_choices(1))
    torch.testing.assert_close(one.users["a"].latent, fresh.users["a"].latent, rtol=0.01, atol=0.01)
    store.close()
