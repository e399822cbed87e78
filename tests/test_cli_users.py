"""`fssa generate`, `fssa users` and `fssa chat`, with a tiny model, embedder and policy on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import VOCABULARY, WIDTH, make_model, make_policy, make_tokenizer
from transformers import BertConfig, BertModel
from typer.testing import CliRunner, Result

from fssa_fast import Choice, SteerablePolicy, TextEmbedder, cli
from fssa_fast.users import SqliteStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, bert/ and policy/ in one folder."""
    root = tmp_path_factory.mktemp("policy")
    make_model(max_position_embeddings=256).save_pretrained(root / "base")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(root / "bert")
    for name in ("base", "bert"):
        make_tokenizer().save_pretrained(root / name)
    base = make_model(max_position_embeddings=256)
    base.config.name_or_path = str(root / "base")
    embedder = TextEmbedder.from_pretrained(str(root / "bert"))
    make_policy(base, embedder=embedder).save_pretrained(root / "policy")
    return root


def run(*arguments: Any, typed: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=typed)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


CHOICES = [
    {"prompt": "w7", "chosen": "w8 w9", "rejected": "w10"},
    {"chosen": [0.5] * WIDTH, "rejected": [-0.25] * WIDTH},
]


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    """A database with alice, who has two choices, and bob, who has none."""
    choices = write(tmp_path / "choices.jsonl", *CHOICES)
    path = tmp_path / "users.db"
    users = write(
        tmp_path / "users.jsonl",
        {"name": "alice", "choices": lines(choices)},
        {"name": "bob", "choices": [], "strength": 0.5},
    )
    result = run("users", "import", folder / "policy", users, "--store", path)
    assert result.exit_code == 0, result.output
    return path


# ---------------------------------------------------------------- users


def test_users_are_added_shown_and_removed(folder: Path, tmp_path: Path, store: Path) -> None:
    choices = write(tmp_path / "more.jsonl", CHOICES[0])
    result = run("users", "add", folder / "policy", "carol", "--store", store, "--choices", choices)
    assert result.stdout == "carol: version 1, 1 choices\n"
    result = run("users", "add", folder / "policy", "alice", "--store", store, "--choices", choices)
    assert result.stdout == "alice: version 2, 3 choices\n"
    shown = run("users", "show", "--store", store).stdout.splitlines()
    assert shown == [
        "alice: version 2, strength 1, 3 choices",
        "bob: version 1, strength 0.5, 0 choices",
        "carol: version 1, strength 1, 1 choices",
    ]
    shown = run("users", "show", "carol", "--store", store).stdout.splitlines()
    assert shown[1:] == [json.dumps(CHOICES[0])]
    assert run("users", "remove", "bob", "--store", store).exit_code == 0
    for command in ("show", "remove"):
        result = run("users", command, "bob", "--store", store)
        assert isinstance(result.exception, ValueError) and "'bob'" in str(result.exception)
    result = run("users", "show", "--store", tmp_path / "none.db")
    assert isinstance(result.exception, FileNotFoundError) and not (tmp_path / "none.db").exists()


def test_users_are_exported_and_imported(folder: Path, tmp_path: Path, store: Path) -> None:
    out, again = tmp_path / "out.jsonl", tmp_path / "again.db"
    assert run("users", "export", out, "--store", store).exit_code == 0
    assert lines(out) == [
        {"name": "alice", "strength": 1.0, "choices": CHOICES},
        {"name": "bob", "strength": 0.5, "choices": []},
    ]
    for _ in range(2):  # the second time all are there
        result = run("users", "import", folder / "policy", out, "--store", again)
        assert result.exit_code == 0 and f"{again}: 2 users" in result.output
    one, two = SqliteStore(store), SqliteStore(again)
    for name in ("alice", "bob"):
        mine, theirs = one.get(name), two.get(name)
        assert mine is not None and theirs is not None
        assert torch.equal(mine.latent, theirs.latent) and mine.strength == theirs.strength


@pytest.mark.parametrize(
    "line, message",
    [
        ("no json", "users.jsonl, line 2: not JSON"),
        ("[1]", "users.jsonl, line 2: expected an object"),
        ('{"name": "x"}', "users.jsonl, line 2: expected a 'choices'"),
        ('{"name": "x", "choices": 3}', "users.jsonl, line 2: expected a list of choices"),
        ('{"name": "x", "choices": [{"chosen": "w7"}]}', "users.jsonl, line 2: expected a 'rejected'"),
        ('{"name": "x", "choices": [{"chosen": "w7", "rejected": "w7"}]}', "users.jsonl, line 2: .*two different"),
        ('{"name": "x", "choices": [], "age": 7}', "users.jsonl, line 2: .*got 'age'"),
    ],
)
def test_bad_lines_are_named(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"name": "a", "choices": []}\n' + line + "\n")
    result = run("users", "import", folder / "policy", path, "--store", tmp_path / "users.db")
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise result.exception
    assert not (tmp_path / "users.db").exists()


# ---------------------------------------------------------------- generate


def requests(tmp_path: Path) -> Path:
    return write(
        tmp_path / "in.jsonl",
        {"prompt": "w7 w8", "user": "alice"},
        {"prompt": [{"role": "user", "content": "w9"}], "user": "bob", "id": "b", "max_new_tokens": 3},
        {"prompt": "w7 w8", "user": "__base__", "temperature": 1.0},
        {"prompt": "w7 w8", "user": {"alice": 0.5, "bob": 0.5}, "strength": 0.5},
        {"prompt": "w7 w8", "user": "__base__"},
    )


def test_generate_and_go_on(folder: Path, tmp_path: Path, store: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = ["generate", folder / "policy", "--input", requests(tmp_path), "--output", out, "--store", store]
    command += ["--max-new-tokens", "6", "--rows", "2", "--cache-tokens", "128", "--seed", "3"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    answers = {line["id"]: line for line in lines(out)}
    assert set(answers) == {0, "b", 2, 3, 4} and answers["b"]["tokens"] <= 3
    policy = SteerablePolicy.from_pretrained(folder / "policy")
    policy.use_store(store)
    with policy.engine(max_rows=1, background=False) as engine:
        own = engine.run([{"prompt": "w7 w8", "user": name, "max_new_tokens": 6} for name in ("alice", "__base__")])
    assert [answers[0]["text"], answers[4]["text"]] == [result.text for result in own]
    text = out.read_text().splitlines()
    out.write_text("\n".join(text[:2]) + "\n" + text[2][:10])  # killed while it wrote the third
    assert run(*command).exit_code == 0
    assert {line["id"]: line for line in lines(out)} == answers and len(lines(out)) == 5
    result = run(*command)
    assert result.exit_code == 0 and "all 5 answers are there" in result.output
    result = run(*command, "--temperature", "0.5")
    assert isinstance(result.exception, ValueError) and "name a new output" in str(result.exception)


def test_generate_from_arguments_and_what_fails(folder: Path, tmp_path: Path, store: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = ["generate", folder / "policy", "--output", out, "--store", store, "--max-new-tokens", "4"]
    result = run(*command, "--prompt", "w7", "--user", "alice", "--user", "nobody")
    assert result.exit_code == 1 and "1 of 2 requests failed" in result.output and "'nobody'" in result.output
    assert [line["user"] for line in lines(out)] == ["alice"]
    for extra, message in (
        ([], "input, prompt: expected one"),
        (["--prompt", "w7"], "user: expected at least one"),
        (["--input", requests(tmp_path), "--user", "alice"], "user: expected in the lines"),
        (
            ["--input", write(tmp_path / "twice.jsonl", *[{"prompt": "w7", "user": "bob", "id": 1}] * 2)],
            "got one twice",
        ),
    ):
        result = run(*command, *extra)
        assert isinstance(result.exception, ValueError) and message in str(result.exception)


# ---------------------------------------------------------------- chat


def test_chat_makes_choices(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "users.db"
    typed = "/up\nw7\n/up\n/two w8\n1\n/nothing\n/new\n/help\n/two w9\n0\n/quit\n"
    result = run(
        "chat", folder / "policy", "--user", "dora", "--store", path, "--max-new-tokens", "5", "--seed", "1",
        "--temperature", "1.5", typed=typed,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "nothing has been said yet" in result.output and "got '/nothing'" in result.output
    store = SqliteStore(path)
    user, choices = store.get("dora"), store.choices("dora")
    assert user is not None and choices is not None
    assert [chosen.prompt for chosen, _ in choices] == ["w7", "w8"] and user.version == 3
    assert all(chosen.text != rejected.text for chosen, rejected in choices)


def test_chat_ends_with_its_input(folder: Path, tmp_path: Path) -> None:
    arguments = ["chat", folder / "policy", "--user", "dora", "--store", tmp_path / "users.db"]
    result = run(*arguments, "--max-new-tokens", "300", typed="w7\n")
    assert result.exit_code == 0 and "/new begins a new conversation" in result.output


# ---------------------------------------------------------------- without the language model


def test_users_come_from_the_file_that_training_reads_and_without_the_language_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents are those that the whole policy gives."""
    told = [CHOICES[0], {"prompt": "w7", "chosen": "w11", "rejected": "w12 w9"}]
    trained_on = write(
        tmp_path / "choices.jsonl",
        *({"user": user, "group": "g", **choice} for user in ("ann", "ben") for choice in told),
    )
    policy = SteerablePolicy.from_pretrained(folder / "policy")
    policy.users.add("ann", [Choice(**choice) for choice in told])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    store = tmp_path / "few.db"
    result = run("users", "import", folder / "policy", "--choices", trained_on, "--store", store)
    assert result.exit_code == 0 and f"{store}: 2 users" in result.output, result.output
    result = run("users", "add", folder / "policy", "cleo", "--choices", trained_on, "--store", store)
    assert isinstance(result.exception, ValueError) and "expected choices of user 'cleo', got one of 'ann'" in str(
        result.exception
    )
    found = SqliteStore(store).get("ann")
    latent = policy.users["ann"].latent
    assert found is not None and latent is not None and torch.equal(found.latent, latent.bfloat16())
    for arguments in ((), (trained_on, "--choices", trained_on)):
        result = run("users", "import", folder / "policy", *arguments, "--store", store)
        assert isinstance(result.exception, ValueError) and "expected one of them" in str(result.exception)


def test_models_run_where_they_are_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    told = ("generate", folder / "policy", "--prompt", "w7 w8", "--user", "__base__", "--max-new-tokens", 2, "--output")
    result = run(*told, out, "--device", "cuda:7" if not torch.cuda.is_available() else "none")
    assert isinstance(result.exception, ValueError) and "--device: expected one that is here" in str(result.exception)
    assert run(*told, out, "--device", "cpu", "--dtype", "bfloat16").exit_code == 0
    policy = SteerablePolicy.from_pretrained(folder / "policy", device_map="cpu", dtype=torch.bfloat16)
    assert policy.model.dtype == policy.bank.rows.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype: expected None, since base is a model already"):
        SteerablePolicy.from_pretrained(folder / "policy", policy.detach(), dtype=torch.float32)
