"""One set of defaults: what a configuration in YAML leaves out is what the same call in Python leaves out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest

from fssa_fast import EncoderConfig, SteerablePolicy, SteeringConfig, TextEmbedder
from fssa_fast.data.choices import ChoiceExamples, split_users
from fssa_fast.nn import NPBTL, ContextEncoder
from fssa_fast.training import PreferenceData
from fssa_fast.training.config import DataConfig, PolicyExamplesConfig, PolicyRun, RewardRun
from fssa_fast.training.fit import ExamplesConfig, RewardConfig, fit_reward


def defaults(of: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(of).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def configured(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


@pytest.mark.parametrize(
    ("python", "yaml", "shared"),
    [
        (ContextEncoder, EncoderConfig, {"inner", "pooling", "heads", "dropout", "sampled"}),
        (NPBTL, RewardConfig, {"inner", "pooling", "heads", "dropout", "sampled"}),
        (EncoderConfig, RewardConfig, {"latent_width", "inner", "pooling", "heads", "dropout", "sampled"}),
        (EncoderConfig, PolicyRun, {"latent_width"}),
        (SteerablePolicy, PolicyRun, {"modulation_std", "modulation_mean"}),
        (SteeringConfig, PolicyRun, {"film", "loras"}),
        (ChoiceExamples, ExamplesConfig, {"max_context", "targets"}),
        (PreferenceData, PolicyExamplesConfig, {"min_context", "max_context", "targets", "max_tokens"}),
        (TextEmbedder, DataConfig, {"pooling"}),
        (split_users, DataConfig, {"shares"}),
        (fit_reward, RewardRun, {"seed"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_python_and_yaml_begin_alike(python: Callable[..., Any], yaml: type, shared: set[str]) -> None:
    here, there = defaults(python), configured(yaml)
    assert {name: here[name] for name in shared} == {name: there[name] for name in shared}


def test_a_policy_begins_alike_by_command_and_in_python() -> None:
    """The encoder that `fssa train policy` makes is the one that EncoderConfig is."""
    assert EncoderConfig(8) == EncoderConfig(8, PolicyRun.latent_width)
    assert ContextEncoder(8, EncoderConfig(8).latent_width).config == vars(EncoderConfig(8))
