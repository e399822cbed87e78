"""Small files that unfold into endless ones, and texts and numbers that are none: an error that says where."""

from __future__ import annotations

import csv
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reference_checkpoint import POLICY, policy_state
from tiny import make_choices

from fssa_fast import Choice, ConfigError
from fssa_fast.data.files import read_choices
from fssa_fast.data.lines import DataError
from fssa_fast.data.make import make_choices as make
from fssa_fast.files import CheckpointError, parse_yaml
from fssa_fast.policy.reference_checkpoint import read_reference
from fssa_fast.training.config import PolicyRun, RewardRun, read_run_config

LAUGHS = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))
YAML = {
    "aliases": (LAUGHS, "line 2: expected no alias, got \\*a0"),
    "an alias of itself": ("a: &a [*a]", "line 1: expected no alias"),
    "depth": ("a: " + "[" * 500_000, "line 1: expected at most 10000 values, 32 deep"),
    "many": ("a: [" + "1," * 400_000 + "]", "expected at most 10000 values"),
    "base 60": ("a: " + "1:" * 250_000 + "1", "line 1: expected values of at most 4096 characters"),
    "digits": ("a: " + "9" * 4_000 + "." * 90 + "\nb: " + "9" * 4_000 + "1" * 90 + "00" * 3, "got|missing|integer"),
    "a date that is none": ("a: 2020-99-99", "not plain YAML"),
    "a key that is none": ("? [a]\n: b", "not plain YAML"),
    "code": ("a: !!python/object/apply:os.system [ls]", "not plain YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_bombs_are_refused_before_they_are_expanded(case: str, tmp_path: Path) -> None:
    text, message = YAML[case]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.yaml.*({message})"):
        read_reference(tmp_path)
    with pytest.raises(ConfigError, match=f"config.yaml.*({message}|unknown key)"):
        read_run_config(RewardRun, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="--set a=.*alias"):
        (tmp_path / "plain.yaml").write_text("output: o")
        read_run_config(RewardRun, tmp_path / "plain.yaml", ["a=[&x y, *x]"])


def checkpoint(folder: Path, data: bytes) -> Path:
    """A policy's checkpoint of the reference whose pickle is `data`."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": POLICY}))
    path = folder / "model_best.pt"
    torch.save(policy_state(), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return folder


def nested(levels: int) -> Any:
    bomb: Any = ()
    for _ in range(levels):
        bomb = (bomb, bomb)
    return bomb


def deep(levels: int) -> bytes:
    return b"\x80\x02}" + b")" + b"\x85" * levels + b"K\x01s."


PICKLES = {
    "a key of nested tuples": (
        b"\x80\x02}" + pickle.dumps(nested(60), 2)[2:-1] + b"K\x01s.",
        "one container in several places",
    ),
    "a value of nested tuples": (pickle.dumps({"a": nested(60)}, 2), "one container in several places"),
    "lists within lists": (pickle.dumps({"a": [b := [1], [b, b]]}, 2), "one container in several places"),
    "a deep key": (deep(1_000_000), "nests more than 16 containers"),
    "much of it": (pickle.dumps({"a" * (5 << 20): 1}, 2), "expected at most 4194304 bytes"),
    "an empty stack": (b"\x80\x02s.", "not a whole file of torch.save"),
    "half of one": (b"\x80\x02}X", "not a whole file of torch.save"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickle_bombs_are_refused_before_they_are_built(case: str, tmp_path: Path) -> None:
    data, message = PICKLES[case]
    with pytest.raises(CheckpointError, match=f"model_best.pt: .*{message}"):
        read_reference(checkpoint(tmp_path, data))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_reference_checkpoints_with_nan_are_refused(number: float, tmp_path: Path) -> None:
    state = policy_state()
    name = next(iter(state))
    state[name].view(-1)[1] = number
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": POLICY}))
    torch.save(state, tmp_path / "model_best.pt")
    with pytest.raises(CheckpointError, match=f"'{name}': expected finite numbers, got NaN or infinity"):
        read_reference(tmp_path)


def test_reference_checkpoints_of_meta_tensors_are_refused(tmp_path: Path) -> None:
    state = policy_state()
    name = next(iter(state))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": POLICY}))
    torch.save({**state, name: state[name].to("meta")}, tmp_path / "model_best.pt")
    with pytest.raises(CheckpointError, match=f"'{name}': expected numbers, got a tensor on meta"):
        read_reference(tmp_path)


def test_a_state_of_many_tensors_is_no_bomb(tmp_path: Path) -> None:
    from fssa_fast.policy.reference_checkpoint import _read_state

    torch.save({f"layer.{i}.weight": torch.zeros(1) for i in range(6_000)}, tmp_path / "m.pt")
    assert len(_read_state(tmp_path / "m.pt")) == 6_000


LINES = {
    "a deep line": ("[" * 100_000, "not JSON"),
    "a lone surrogate": ('{"user": "a", "chosen": "b\\ud800", "rejected": "c"}', "half of a surrogate pair"),
    "a lone surrogate in a name": ('{"user": "\\udfff", "chosen": "b", "rejected": "c"}', "half of a surrogate pair"),
    "10**400": ('{"user": "a", "chosen": [1' + "0" * 400 + '], "rejected": [1]}', "list of finite numbers"),
    "10**5000": ('{"user": "a", "chosen": [1' + "0" * 5000 + '], "rejected": [1]}', "not JSON"),
    "NaN": ('{"user": "a", "chosen": [NaN], "rejected": [1]}', "list of finite numbers"),
}


@pytest.mark.parametrize("case", LINES)
def test_choices_that_are_none_are_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    line, message = LINES[case]
    path = tmp_path / "choices.jsonl"
    path.write_text('\n{"user": "a", "chosen": [1], "rejected": [2]}\n' + line + "\n")
    with pytest.raises(DataError, match=f"choices.jsonl, line 3: .*{message}"):
        read_choices(path)


def test_csv_fields_that_are_too_long_are_named_by_file_and_line(tmp_path: Path) -> None:
    field = "x" * (csv.field_size_limit() + 1)
    path = tmp_path / "pairs.csv"
    path.write_text(f"user,chosen,rejected\na,b,c\na,{field},c\n")
    with pytest.raises(DataError, match="pairs.csv, line 3: not CSV: field larger than field limit"):
        make(path, tmp_path / "out", "pairs")


@pytest.mark.parametrize("name", ["chosen", "rejected", "prompt"])
def test_half_of_a_surrogate_pair_in_a_choice_is_named(name: str) -> None:
    texts = {"chosen": "a", "rejected": "b", "prompt": "c", name: "x\ud800"}
    with pytest.raises(ValueError, match=f"^choice: expected Unicode for {name}, got half of a surrogate pair"):
        Choice(**texts)
    assert make_choices(1)


@pytest.mark.parametrize("setting", ["seed", "training.learning_rate", "training.max_steps", "data.split_seed"])
def test_numbers_of_400_digits_are_named_by_their_key(setting: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\noutput: o\ndata: {path: d}\n")
    with pytest.raises(ConfigError, match=rf"run.yaml\.{setting}: expected"):
        read_run_config(PolicyRun, path, [f"{setting}=1{'0' * 400}"])
    with pytest.raises(ConfigError, match="learning_rate: expected a finite number"):
        read_run_config(PolicyRun, path, ["training.learning_rate=.nan"])


@pytest.mark.parametrize(
    ("setting", "meant"),
    [("training.lr=1", "learning_rate"), ("training.epochs=1", "num_train_epochs"), ("ouput=x", "output")],
)
def test_an_unknown_key_says_what_was_meant(setting: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output: o\ndata: {path: d}\n")
    with pytest.raises(ConfigError, match=f"unknown key, did you mean {meant}"):
        read_run_config(RewardRun, path, [setting])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(max_size=80), st.text("&*a[]{}:,- \n0123456789.!|>\"'#%@?~<=x", max_size=80)))
def test_any_text_is_yaml_or_an_error_that_names_it(text: str) -> None:
    try:
        parse_yaml(text, "here")
    except CheckpointError as error:
        assert str(error).startswith("here")


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
NESTED = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=3), one, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(value=NESTED)
def test_any_line_is_choices_or_an_error_that_names_it(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(json.dumps({"user": "a", "chosen": value, "rejected": "b"}) + "\n")
    try:
        read_choices(path)
    except DataError as error:
        assert "fuzz.jsonl, line 1" in str(error)
