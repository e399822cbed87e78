"""The YAML files that `fssa train` reads: unknown keys, and values of the wrong type, are named by their key."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from transformers import TrainingArguments

from fssa_fast.files import CheckpointError, parse_yaml, read_text
from fssa_fast.hub import find_folder, is_hub_id
from fssa_fast.policy.policy import MODULATION_MEAN, MODULATION_STD
from fssa_fast.steering.config import ConfigError, EncoderConfig, LoraConfig, SteeringConfig, did_you_mean, from_json
from fssa_fast.training.fit import ExamplesConfig, RewardConfig
from fssa_fast.training.policy import NPDPOArguments
from fssa_fast.training.reward import RewardArguments
from fssa_fast.users.embedder import TextEmbedder


@dataclass(frozen=True)
class DataConfig:
    """Where the choices are, what embeds their texts (None where they are features), how users are split.

    The embedder, a folder or a name of the hub, is any model of Hugging Face with hidden states: a text encoder, or a
    language model with pooling "last", whose state at an answer's last token then stands for the answer.
    """

    path: str
    embedder: str | None = None
    pooling: Literal["mean", "first", "last"] = "mean"
    split_seed: int = 0
    shares: tuple[float, ...] = (0.7, 0.1, 0.2)

    def load_embedder(self, *, ask_hub: bool = True) -> TextEmbedder | None:
        """The embedder, or None where options are features; without `ask_hub`, from a folder or an earlier download."""
        if self.embedder is None:
            return None
        folder = find_folder("embedder", self.embedder, ask_hub=ask_hub)
        return TextEmbedder.from_pretrained(folder, pooling=self.pooling)


@dataclass(frozen=True)
class RewardRun:
    """What `fssa train reward` does. training: `RewardArguments` by name."""

    data: DataConfig
    output: str
    model: RewardConfig = field(default_factory=RewardConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    training: dict = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class PolicyExamplesConfig:
    """The examples drawn for training a policy; see `PreferenceData`, and `OpposedData` for opposed ones."""

    min_context: int = 0
    max_context: int = 10
    targets: int = 1
    max_tokens: int = 256
    opposed: bool = False


@dataclass(frozen=True)
class PolicyRun:
    """What `fssa train policy` does.

    Args:
        base: the base model's folder, or its name on the hub; dtype: what it is computed in.
        reward: a reward run whose context encoder the policy takes over, and keeps as it is.
        latent_width: H, of a fresh encoder. modulation_std, modulation_mean: as of `SteerablePolicy`.
        chat: whether prompts given as texts are told as chats; auto: where the tokenizer has a template. The policy
            remembers it, and is asked so ever after.
        training: `NPDPOArguments` by name.
        patience: training ends after so many evaluations on the validation users without a lower loss; None: after
            max_steps. samples: of so many validation users an answer is written at each evaluation.
    """

    base: str
    data: DataConfig
    output: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    reward: str | None = None
    latent_width: int = EncoderConfig.latent_width
    film: bool | tuple[int, ...] = SteeringConfig.film
    loras: tuple[LoraConfig, ...] = SteeringConfig.loras
    modulation_std: float = MODULATION_STD
    modulation_mean: float = MODULATION_MEAN
    chat: bool | Literal["auto"] = "auto"
    examples: PolicyExamplesConfig = field(default_factory=PolicyExamplesConfig)
    training: dict = field(default_factory=dict)
    patience: int | None = None
    samples: int = 2
    seed: int = 0


Run = TypeVar("Run", RewardRun, PolicyRun)


def read_run_config(cls: type[Run], path: str | os.PathLike[str], settings: Sequence[str] = ()) -> Run:
    """A configuration from a YAML file, with `a.b=c` settings over it; relative paths in it start at the file.

    Raises: ConfigError naming the file and the key; CheckpointError where the file cannot be read.
    """
    content = _yaml(read_text(Path(path)), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(content).__name__}")
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set: expected key=value, got {setting!r}")
        place = content
        *parents, last = name.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {setting}: {parent!r} has no keys, it is {place!r}")
        place[last] = _yaml(value, f"--set {setting}")
    config: Run = from_json(cls, content, str(path))
    arguments = RewardArguments if cls is RewardRun else NPDPOArguments
    checked = check_training(config.training, arguments, f"{path}.training")
    home = Path(path).resolve().parent
    data = replace(config.data, path=_at(home, config.data.path), embedder=_model_at(home, config.data.embedder))
    config = replace(config, data=data, output=_at(home, config.output), training=checked)
    if isinstance(config, PolicyRun):
        config = replace(config, base=_model_at(home, config.base), reward=_at(home, config.reward))
    return config


def check_training(settings: dict[str, Any], cls: type[TrainingArguments], where: str) -> dict[str, Any]:
    """Settings of a trainer, checked by name and, where it is a plain one, by type."""
    hints, names = get_type_hints(cls), {f.name for f in fields(cls) if f.init} - {"output_dir", "seed"}
    found = {}
    for name, value in settings.items():
        if name not in names:
            raise ConfigError(f"{where}.{name}: unknown key{did_you_mean(name, names)}")
        kind = hints[name]
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                value = float(value)  # YAML 1.1 reads 3e-4 as a text
            except (ValueError, OverflowError) as error:
                raise ConfigError(f"{where}.{name}: expected a number, got {str(value)[:80]!r}") from error
        if kind in (bool, int, float, str) and type(value) is not kind:
            raise ConfigError(f"{where}.{name}: expected {kind.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}.{name}: expected a finite number, got {value}")
        if type(value) is int and abs(value) >= 1 << 63:
            raise ConfigError(f"{where}.{name}: expected an integer of 64 bits, got {str(value)[:20]}...")
        found[name] = value
    return found


def _yaml(text: str, where: str) -> Any:
    try:
        return parse_yaml(text, where)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _at(home: Path, path: str | None) -> Any:
    return None if path is None else str(home / path)


def _model_at(home: Path, name: str | None) -> Any:
    """A model's folder, or, where there is none of that name, its name on the hub."""
    return name if name is not None and is_hub_id(name) and not (home / name).is_dir() else _at(home, name)
