"""What a steerable policy is made of, as JSON holds it."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fssa_fast.nn.context import EncoderConfig

FORMAT_VERSION = 2


class ConfigError(ValueError):
    """A configuration with an unknown key, a missing one, or a value of the wrong kind."""


@dataclass(frozen=True)
class LoraConfig:
    """One adapter, on every projection whose name ends in one of `targets`.

    modulation: "none" is plain LoRA, one strength a user (PEFT's, for everyone but base rows);
        "scale" gives every user R numbers a projection (gamma), "scale_shift" 2R (gamma and beta).
    """

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 16
    alpha: float = 32.0
    modulation: Literal["none", "scale", "scale_shift"] = "scale_shift"

    def __post_init__(self) -> None:
        named = isinstance(self.targets, tuple) and all(isinstance(name, str) and name for name in self.targets)
        if not named or not self.targets:
            raise ConfigError(f"targets: expected a tuple of projections' names, at least one, got {self.targets!r}")
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank: expected an integer >= 1, got {self.rank!r}")
        if type(self.alpha) not in (int, float) or not math.isfinite(self.alpha):
            raise ConfigError(f"alpha: expected a finite number, got {self.alpha!r}")
        if self.modulation not in ("none", "scale", "scale_shift"):
            raise ConfigError(f"modulation: expected none, scale or scale_shift, got {self.modulation!r}")


@dataclass(frozen=True)
class SteeringConfig:
    """FiLM on the blocks (all, some by index, or none), and any number of adapters; by default one on q and v."""

    encoder: EncoderConfig
    film: bool | tuple[int, ...] = True
    loras: tuple[LoraConfig, ...] = (LoraConfig(),)

    def __post_init__(self) -> None:
        blocks = self.film if isinstance(self.film, tuple) else ()
        if not isinstance(self.film, bool | tuple) or any(type(index) is not int for index in blocks):
            raise ConfigError(f"film: expected True, False, or a tuple of blocks' indices, got {self.film!r}")
        if len(set(blocks)) != len(blocks):
            raise ConfigError(f"film: expected each block once, got {self.film!r}")
        if not isinstance(self.loras, tuple) or not all(isinstance(lora, LoraConfig) for lora in self.loras):
            raise ConfigError(f"loras: expected a tuple of LoraConfig, got {self.loras!r}")
        if not self.film and not self.loras:
            raise ConfigError("film, loras: expected at least one way to steer, got none")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries and lists."""
    return asdict(config)


def from_json(cls: type, data: Any, where: str = "config") -> Any:
    """The dataclass `cls` from plain data; ConfigError names the key, what was expected and what came."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object with keys {[f.name for f in fields(cls)]}, got {data!r}")
    hints = get_type_hints(cls)
    unknown = sorted(str(key) for key in data if key not in hints)
    if unknown:
        hint = did_you_mean(unknown[0], hints)
        raise ConfigError(f"{where}.{unknown[0]}: unknown key{hint}; expected some of {sorted(hints)}")
    try:
        return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """", did you mean ...?" for what is nearly a known name, its initials (`lr`) or a part of it; else nothing."""
    text, names = str(name).lower(), sorted(known)
    found = [one for one in names if "".join(word[:1] for word in one.split("_")) == text]
    found += difflib.get_close_matches(text, names, n=1) + [one for one in names if len(text) > 3 and text in one]
    return f", did you mean {found[0]}?" if found else ""


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _value(option, value, where)
            except ConfigError:
                continue
        raise ConfigError(f"{where}: expected {kind}, got {value!r}")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}: expected one of {args}, got {value!r}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if hasattr(kind, "__dataclass_fields__"):
        return from_json(kind, value, where)
    if type(value) is int and abs(value) >= 1 << 63:
        raise ConfigError(f"{where}: expected an integer of 64 bits, got {str(value)[:20]}...")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
