"""Files of a saved model: a configuration in JSON and tensors in safetensors, checked before anything is allocated.

The configuration names its tensors' file, whose name is that of its content: `model-<hash>.safetensors`. Replacing the
configuration is the one step in which a model is saved over another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fssa_fast.arguments import DTYPES
from fssa_fast.records import file_hash

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


def read_config(path: Path, *versions: int) -> dict[str, Any]:
    """A configuration in JSON that has one of these as its "version", without it."""
    config = read_json(path)
    check_fields(str(path), config, {"version": int})
    found = config.pop("version")
    if found not in versions:
        raise CheckpointError(f"{path}: expected version {' or '.join(map(str, versions))}, got {found}")
    return config


def read_json(path: Path) -> Any:
    """What a small file of JSON holds."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


MAX_NODES, MAX_DEPTH, MAX_SCALAR = 10_000, 32, 4096


def parse_yaml(text: str, where: str) -> Any:
    """What a small text in YAML holds; `where` names it in the CheckpointError for what is none.

    Nodes and depth are counted before anything is built. Aliases are refused: a few lines of them are a document of any
    size. Scalars are short, since a number's digits cost their square.
    """
    import yaml

    try:
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            line = f"{where}, line {event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent):
                raise CheckpointError(f"{line}: expected no alias, got *{event.anchor[:80]}: write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or number > MAX_NODES:
                raise CheckpointError(f"{line}: expected at most {MAX_NODES} values, {MAX_DEPTH} deep, got more")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
                raise CheckpointError(f"{line}: expected values of at most {MAX_SCALAR} characters, got more")
        return yaml.safe_load(text)
    except CheckpointError:
        raise
    except Exception as error:  # of dates, numbers and keys that are none, PyYAML raises what it comes upon
        raise CheckpointError(f"{where}: not plain YAML: {error}") from error


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


def read_tensors(path: Path, expected: Mapping[str, Tensor], *, others: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names and shapes of `expected` (meta tensors).

    others: whether it may hold more, which is left there. A file named by its content must have that content.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name in expected or not others]
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            check_tensors(str(path), shapes, expected)
            tensors = {name: file.get_tensor(name) for name in expected}
        check_dtypes(str(path), tensors, expected)
        named = _NAMED.search(path.name)
        if named is not None and file_hash(path)[:DIGITS] != named[1]:
            raise CheckpointError(f"{path}: damaged: its content is not that which its name says")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: gone since it was looked for
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    return tensors


# ---------------------------------------------------------------- a configuration and its tensors, as one

DIGITS = 16
_NAMED = re.compile(rf"-([0-9a-f]{{{DIGITS}}})\.safetensors$")
Read = TypeVar("Read")


def weights_path(config_path: Path, default: str, name: Any) -> Path:
    """The file of tensors that a configuration names: `default`, as older ones had it, or that named by its content."""
    if name != default and not (isinstance(name, str) and _NAMED.sub(".safetensors", name) == default):
        raise CheckpointError(f"{config_path}: 'weights': expected {default}, or with its hash, got {name!r:.80}")
    return config_path.with_name(name)


def read_pair(config_path: Path, read: Callable[[], Read]) -> Read:
    """`read()`, which reads a configuration and the tensors it names; again where another was saved meanwhile."""
    while True:
        before = written(config_path)
        try:
            return read()
        except CheckpointError:
            if written(config_path) == before:
                raise


def written(path: Path) -> tuple[int, int] | None:
    """What tells one writing of a file from another; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def write_pair(config_path: Path, config: Mapping[str, Any], default: str, weights: Mapping[str, Tensor]) -> None:
    """Writes a configuration, with the name of its tensors' file as "weights", and its tensors, in one step.

    Whoever reads the folder meanwhile, and whatever ends this process, finds this pair or the one before. Processes
    that write the same pair take turns; on a file system without locks there must be only one.
    """
    folder, stem = config_path.parent, default.removesuffix(".safetensors")
    with _alone(folder):
        part = folder / f".{stem}.part"
        _save(weights, part)
        name = f"{stem}-{file_hash(part)[:DIGITS]}.safetensors"
        os.replace(part, folder / name)
        _write_text(config_path, json.dumps({**config, "weights": name}, indent=2) + "\n")
        for other in (folder / default, *folder.glob(f"{stem}-*.safetensors")):
            if other.name != name and (other.name == default or _NAMED.sub("", other.name) == stem):
                other.unlink(missing_ok=True)


def write_files(config_path: Path, config: Mapping[str, Any], weights: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes both under names that somebody else's format fixes: each file is whole, and writers take turns, but a
    reader may find the new tensors beside the configuration before."""
    with _alone(config_path.parent):
        part = weights.with_name(f".{weights.name}.part")
        _save(tensors, part)
        os.replace(part, weights)
        _write_text(config_path, json.dumps(config, indent=2) + "\n")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and waits until no other process writes a pair there; a process that ends lets it go."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield
        return
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(place)
