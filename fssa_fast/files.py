"""Files of a saved model: a configuration in JSON and tensors in safetensors, checked before anything is allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fssa_fast.arguments import DTYPES

MAX_CONFIG_BYTES = 1 << 20
MAX_WIDTH = 1 << 20


class CheckpointError(ValueError):
    """A file of a saved model is missing, damaged, foreign, or not what its configuration says; names the file."""


def read_text(path: Path) -> str:
    """The text of a small configuration file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected text in UTF-8, got other bytes") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, got more")
    return text


def check_fields(where: str, fields: Any, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises CheckpointError unless `fields` is a mapping that has every name of `types`, with a value of that type.

    An integer is also a float, a bool is never a number, and integers are in [1, 2**20].
    """
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: expected a mapping of names to values, got {type(fields).__name__}")
    for name, wanted in types.items():
        if name not in fields:
            raise CheckpointError(f"{where}: {name!r} is missing")
        value = fields[name]
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"{where}: {name!r}: expected {names}, got {str(value)[:80]!r}")
        if kinds == (int,) and not 1 <= value <= MAX_WIDTH:
            raise CheckpointError(f"{where}: {name!r}: expected 1 to {MAX_WIDTH}, got {str(value)[:80]}")


def read_config(path: Path, version: int) -> dict[str, Any]:
    """A configuration in JSON that has that "version", without it."""
    try:
        config = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    check_fields(str(path), config, {"version": int})
    found = config.pop("version")
    if found != version:
        raise CheckpointError(f"{path}: expected version {version}, got {found}")
    return config


def check_tensors(where: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless `shapes` has the names and shapes of `expected`, no more and no fewer."""
    for name in sorted(set(expected) - set(shapes)):
        raise CheckpointError(f"{where}: tensor {name!r} is missing")
    for name in sorted(set(shapes) - set(expected)):
        raise CheckpointError(f"{where}: tensor {name[:120]!r} is not expected")
    for name, want in expected.items():
        if tuple(shapes[name]) != tuple(want.shape):
            raise CheckpointError(f"{where}: {name!r}: expected shape {list(want.shape)}, got {list(shapes[name])}")


def check_dtypes(where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless floating tensors share one supported dtype and the others have the expected one."""
    first: Tensor | None = None
    for name, want in expected.items():
        tensor = tensors[name]
        if not want.is_floating_point():
            if tensor.dtype != want.dtype:
                raise CheckpointError(f"{where}: {name!r}: expected dtype {want.dtype}, got {tensor.dtype}")
            continue
        first = tensor if first is None else first
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            allowed = first.dtype if first.dtype in DTYPES else [str(dtype) for dtype in DTYPES]
            raise CheckpointError(f"{where}: {name!r}: expected dtype {allowed}, got {tensor.dtype}")


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names and shapes of `expected` (meta tensors)."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_tensors(str(path), shapes, expected)
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    check_dtypes(str(path), tensors, expected)
    return tensors


def write_pair(config_path: Path, config: Mapping[str, Any], weights_path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a configuration and its tensors, each file in one step: a reader never sees half of one."""
    parts = [path.with_name(f".{path.name}.part") for path in (weights_path, config_path)]
    config_path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, parts[0])
    parts[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(parts[0], weights_path)
    os.replace(parts[1], config_path)
