"""Saving over an older model is one step: readers get one or the other whole, writers do not break each other."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_loras, make_model, make_policy, shake

from fssa_fast import EncoderConfig, SteerablePolicy, SteeringConfig
from fssa_fast.files import write_pair
from fssa_fast.nn import BTL, NPBTL, RewardModel

fork = multiprocessing.get_context("fork")


def reward(kind: int) -> RewardModel:
    """Models that differ in configuration and tensors; every number of one says which it is."""
    model = BTL(3, 8 + kind) if kind % 2 else NPBTL(3, 8 * kind + 8, heads=2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(kind)
    return model


def kind_of(model: RewardModel) -> int:
    kinds = {int(tensor.flatten()[0]) for tensor in model.state_dict().values()}
    assert len(kinds) == 1, "tensors of two models"
    (kind,) = kinds
    assert model.config == reward(kind).config, "one model's configuration and another's tensors"
    return kind


def save_for_ever(save: Callable[[int], None], kinds: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    while True:
        for kind in kinds:
            save(kind)


def start(save: Callable[[int], None], kinds: tuple[int, ...]) -> Any:
    process = fork.Process(target=save_for_ever, args=(save, kinds), daemon=True)
    process.start()
    return process


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_reward_models_are_loaded_whole_while_two_processes_save(tmp_path: Path) -> None:
    reward(0).save_pretrained(tmp_path)
    models = {kind: reward(kind) for kind in range(5)}
    writers = [start(lambda kind: models[kind].save_pretrained(tmp_path), kinds) for kinds in ((1, 2, 1), (3, 4))]
    seen = set()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            seen.add(kind_of(RewardModel.from_pretrained(tmp_path)))
        assert all(process.is_alive() for process in writers)
    finally:
        for process in writers:
            kill(process)
    assert {1, 2, 3, 4} <= seen
    reward(0).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left of those that were killed


def test_kill_9_in_the_middle_of_saving_leaves_one_of_the_two(tmp_path: Path) -> None:
    draw = random.Random(0)
    models = {kind: reward(kind) for kind in (1, 2)}
    reward(1).save_pretrained(tmp_path)
    for _ in range(20):
        process = start(lambda kind: models[kind].save_pretrained(tmp_path), (2, 1))
        time.sleep(draw.uniform(0.01, 0.06))
        kill(process)
        assert kind_of(RewardModel.from_pretrained(tmp_path)) in (1, 2)


@pytest.mark.parametrize("after", range(1, 7))
def test_an_end_after_any_step_of_saving_leaves_one_of_the_two(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the folder, in turn, is the last one."""
    reward(1).save_pretrained(tmp_path)
    steps = 0

    def counted(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == after:
                raise KeyboardInterrupt
            return own(*args, **options)

        return call

    monkeypatch.setattr("fssa_fast.files.save_file", counted(save_file))
    for name in ("replace", "fsync"):
        monkeypatch.setattr(f"fssa_fast.files.os.{name}", counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    with pytest.raises(KeyboardInterrupt):
        reward(2).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert kind_of(RewardModel.from_pretrained(tmp_path)) == (2 if after == 6 else 1)
    reward(3).save_pretrained(tmp_path)
    assert kind_of(RewardModel.from_pretrained(tmp_path)) == 3


def small_policy(kind: int) -> SteerablePolicy:
    if kind == 1:
        return make_policy()
    model = make_model()
    config = SteeringConfig(EncoderConfig(8, 16, heads=4), (0,), make_loras(model, "scale"))
    return shake(SteerablePolicy(model, config), 2)


def test_policies_are_loaded_whole_while_two_processes_save(tmp_path: Path) -> None:
    policies = {kind: small_policy(kind) for kind in (1, 2)}
    biases = {kind: policy.modulator.bias.clone() for kind, policy in policies.items()}
    policies[1].save_pretrained(tmp_path)
    writers = [start(lambda kind: policies[kind].save_pretrained(tmp_path), kinds) for kinds in ((1, 2), (2, 1))]
    seen = set()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            loaded = SteerablePolicy.from_pretrained(tmp_path, make_model())
            (kind,) = [kind for kind, policy in policies.items() if policy.steering == loaded.steering]
            assert torch.equal(loaded.modulator.bias, biases[kind])
            seen.add(kind)
    finally:
        for process in writers:
            kill(process)
    assert seen == {1, 2}


def test_a_policy_saved_while_the_base_loads_is_the_one_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fssa_fast.policy import storage

    small_policy(1).save_pretrained(tmp_path)
    load = storage.load_base

    def slow(*args: Any, **options: Any) -> Any:
        small_policy(2).save_pretrained(tmp_path)
        return load(*args, **options)

    monkeypatch.setattr(storage, "load_base", slow)
    assert SteerablePolicy.from_pretrained(tmp_path, make_model()).steering == small_policy(2).steering


def test_what_is_saved_can_be_read_by_a_human(tmp_path: Path) -> None:
    reward(1).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    told = {"version": 2, "model": "btl", "standardized": False, "weights": content["weights"]}
    assert content == {**told, **reward(1).config}
    assert set(load_file(tmp_path / content["weights"])) == set(reward(1).state_dict())


def test_only_the_tensors_of_the_pair_are_cleared_away(tmp_path: Path) -> None:
    others = ["model-notes.safetensors", "other-0123456789abcdef.safetensors", "model.txt"]
    for name in others:
        (tmp_path / name).write_text("kept")
    for kind in (1, 2):
        write_pair(tmp_path / "config.json", {}, "model.safetensors", {"a": torch.full((1,), kind)})
    assert len(list(tmp_path.iterdir())) == len(others) + 2
