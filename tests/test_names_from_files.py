"""Models' names in files are strangers' words: because of them nothing is loaded from a hub, run or asked."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_embedder import make_bert
from test_reference_checkpoint import POLICY
from tiny import make_model, make_policy, make_tokenizer

from fssa_fast import SteerablePolicy, TextEmbedder
from fssa_fast.hub import find_folder, is_hub_id, recall, remember

REVISION = "0123456789abcdef0123456789abcdef01234567"


def save_model(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a base, an embedder, and a policy of them."""
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "base", make_model())
    save_model(tmp_path / "embedder", make_bert())
    embedder = TextEmbedder.from_pretrained(tmp_path / "embedder")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    make_policy(base, embedder=embedder).save_pretrained(tmp_path / "policy")
    return tmp_path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network and nobody at the keyboard: whoever tries is listed, and stopped."""
    tried: list[str] = []

    def stop(*args: Any, **_: Any) -> Any:
        tried.append(str(args))
        raise AssertionError(f"tried to reach {args}")

    monkeypatch.setattr(socket.socket, "connect", stop)
    monkeypatch.setattr(socket, "getaddrinfo", stop)
    monkeypatch.setattr(builtins, "input", stop)
    return tried


def rename(folder: Path, part: str, name: str) -> None:
    content = json.loads((folder / "steering.json").read_text())
    content[part].update(name_or_path=name, revision=None)
    (folder / "steering.json").write_text(json.dumps(content))


@pytest.mark.parametrize("part", ["base", "embedder"])
def test_a_stranger_s_steering_json_makes_nothing_load_from_a_hub(part: str, saved: Path, alone: list[str]) -> None:
    rename(saved / "policy", part, "stranger/model")
    with pytest.raises(ValueError, match=f"^{part}: expected a model that is on this machine.*'stranger/model'"):
        SteerablePolicy.from_pretrained(saved / "policy")
    assert alone == []


def test_a_stranger_s_reference_config_makes_nothing_load_from_a_hub(tmp_path: Path, alone: list[str]) -> None:
    golden = Path(__file__).parent / "golden" / "checkpoint_policy_llama"
    shutil.copytree(golden, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("base"))
    config = yaml.safe_load((golden / "config.yaml").read_text())
    config["model"]["llm_name"] = "stranger/model"
    (tmp_path / "checkpoint" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="^base: .*'stranger/model'"):
        SteerablePolicy.from_reference(tmp_path / "checkpoint")
    config["model"]["llm_name"] = {**POLICY}
    (tmp_path / "checkpoint" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="llm_name: expected a text, got dict"):
        SteerablePolicy.from_reference(tmp_path / "checkpoint")
    assert alone == []


def test_a_run_s_record_makes_nothing_load_from_a_hub(alone: list[str]) -> None:
    from fssa_fast.training.config import DataConfig

    with pytest.raises(ValueError, match="^embedder: expected a model that is on this machine"):
        DataConfig("choices.jsonl", "stranger/model").load_embedder(ask_hub=False)
    assert alone == []


CODE = """
import pathlib
pathlib.Path({path!r}).write_text("ran")
from transformers import LlamaConfig as Own, LlamaForCausalLM as OwnModel, PreTrainedTokenizerFast as OwnTokenizer
"""


@pytest.mark.parametrize("part", ["base", "embedder"])
def test_code_in_a_model_s_folder_does_not_run_and_nobody_is_asked(part: str, saved: Path, alone: list[str]) -> None:
    folder = saved / part
    (folder / "own.py").write_text(CODE.format(path=str(saved / "ran")))
    config = json.loads((folder / "config.json").read_text())
    kinds = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
    config |= {"model_type": "own", "auto_map": kinds}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        SteerablePolicy.from_pretrained(saved / "policy")
    assert alone == [] and not (saved / "ran").exists()


@pytest.mark.parametrize("where", ["attn_implementation", "experts_implementation"])
def test_a_model_s_folder_does_not_name_kernels_of_the_hub(where: str, saved: Path, alone: list[str]) -> None:
    path = saved / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "text_config": {where: {"": "stranger/kernel"}}}))
    with pytest.raises(ValueError, match=rf"config.json: {where}: .*stranger/kernel"):
        SteerablePolicy.from_pretrained(saved / "policy")
    assert alone == []


def test_every_loader_is_called_without_code_and_without_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    calls: list[tuple[str, dict[str, Any]]] = []
    for name in ("AutoModelForCausalLM", "AutoModel", "AutoTokenizer"):
        kind = getattr(transformers, name)

        def load(path: Any, _name: str = name, _own: Any = kind.from_pretrained, **options: Any) -> Any:
            calls.append((_name, options))
            return _own(path, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    SteerablePolicy.from_pretrained(saved / "policy")
    SteerablePolicy.from_pretrained(saved / "policy", saved / "base", embedder=str(saved / "embedder"))
    golden = Path(__file__).parent / "golden" / "checkpoint_policy_llama"
    SteerablePolicy.from_reference(golden)
    assert {name for name, _ in calls} == {"AutoModelForCausalLM", "AutoModel", "AutoTokenizer"} and len(calls) >= 9
    for name, options in calls:
        assert options["trust_remote_code"] is False and options["local_files_only"] is True, name


def test_the_user_s_own_word_may_be_asked_of_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any, bool]] = []
    snapshot = saved / "cache" / "models--org--base" / "snapshots" / REVISION
    shutil.copytree(saved / "base", snapshot)

    def download(name: str, *, revision: Any, local_files_only: bool, **_: Any) -> str:
        asked.append((name, revision, local_files_only))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    policy = SteerablePolicy.from_pretrained(saved / "policy", "org/base")
    assert asked == [("org/base", None, False)] and policy.tokenizer is not None
    policy.save_pretrained(saved / "other")
    base = json.loads((saved / "other" / "steering.json").read_text())["base"]
    assert (base["name_or_path"], base["revision"]) == ("org/base", REVISION)
    shutil.move(saved / "embedder", saved / "other" / "embedder")
    for given, offline in ((None, True), ("org/base", False)):
        asked.clear()
        SteerablePolicy.from_pretrained(saved / "other", given, embedder=str(saved / "other" / "embedder"))
        assert asked == [("org/base", REVISION, offline)]


def test_without_the_hub_the_error_says_so_and_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match="^base: expected a folder or .*no connection.*Give base the model's folder"):
        find_folder("base", "org/model", ask_hub=True)


@pytest.mark.parametrize(
    "name", ["/no/such", "./base", "../base", "a/b/c", "a b", "", "a//b", "-a/b", "a--b", "\ud800", "\0"]
)
def test_what_can_only_be_a_folder_is_not_asked_of_the_hub(name: str, alone: list[str]) -> None:
    with pytest.raises(ValueError, match="^base: expected a folder"):
        find_folder("base", name, ask_hub=True)
    assert not is_hub_id(name) and alone == []


def test_a_policy_moved_with_its_base_finds_it(saved: Path) -> None:
    shutil.move(saved, moved := saved.parent / "moved")
    assert SteerablePolicy.from_pretrained(moved / "policy").tokenizer is not None
    text = (moved / "policy" / "steering.json").read_text()
    assert '"../base"' in text and '"../embedder"' in text and str(saved) not in text
    moved.rename(saved)


def test_a_moved_base_is_found_by_its_new_folder_and_another_refused(saved: Path) -> None:
    shutil.move(saved / "base", saved / "elsewhere")
    with pytest.raises(ValueError, match="^base: expected a folder.*no such folder"):
        SteerablePolicy.from_pretrained(saved / "policy")
    assert SteerablePolicy.from_pretrained(saved / "policy", saved / "elsewhere").tokenizer is not None
    save_model(saved / "base", make_model(seed=3))
    with pytest.raises(ValueError, match="^base: expected the weights of '../base'"):
        SteerablePolicy.from_pretrained(saved / "policy")


def test_names_come_back(tmp_path: Path) -> None:
    (tmp_path / "policy" / "base").mkdir(parents=True)
    for folder in (tmp_path / "policy" / "base", tmp_path, tmp_path / "policy"):
        name, revision = remember(str(folder), tmp_path / "policy")
        assert name.startswith(".") and not is_hub_id(name) and revision is None
        assert Path(recall(name, tmp_path / "policy")).resolve() == folder
    assert remember("org/model", tmp_path) == ("org/model", None) and recall("org/model", tmp_path) == "org/model"
    assert remember(f"/c/models--org--a-b/snapshots/{REVISION}", tmp_path) == ("org/a-b", REVISION)


def test_a_file_does_not_say_how_much_its_fingerprint_may_differ(saved: Path) -> None:
    path = saved / "policy" / "steering.json"
    content = json.loads(path.read_text())
    content["embedder"]["fingerprint"] = [1e9] * 8
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="^embedder: expected the weights of"):
        SteerablePolicy.from_pretrained(saved / "policy")


def test_a_broken_tokenizer_is_not_taken_for_none(saved: Path) -> None:
    (saved / "base" / "tokenizer.json").write_text("{")
    with pytest.raises(Exception, match="property name"):
        SteerablePolicy.from_pretrained(saved / "policy")
    for path in saved.glob("base/*token*"):
        path.unlink()
    assert SteerablePolicy.from_pretrained(saved / "policy").tokenizer is None
