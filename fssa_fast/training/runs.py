"""A run directory: the trained model, its checkpoints, and run.json, which says how it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fssa_fast.nn.files import CheckpointError, read_config

RUN_NAME, VERSION = "run.json", 1
PACKAGES = ("fssa-fast", "torch", "transformers", "accelerate", "numpy")


def environment() -> dict[str, Any]:
    """Versions and machine, for a record."""
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file; of a directory, of its files' hashes in the order of their names."""
    if Path(path).is_dir():
        hashes = [f"{file.name} {file_hash(file)}\n" for file in sorted(Path(path).iterdir()) if file.is_file()]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON in one step: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_run(directory: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes run.json."""
    write_json(Path(directory) / RUN_NAME, {"version": VERSION, **content})


def read_run(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What run.json says. Raises CheckpointError for a missing, damaged or newer one, naming the file."""
    return read_config(Path(directory) / RUN_NAME, VERSION)


def last_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run that has all its files, or None.

    trainer_state.json is what transformers writes last; a run killed while writing leaves a checkpoint without it.
    """

    def whole(path: Path) -> bool:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return True

    found = [path for path in Path(directory).glob("checkpoint-*") if whole(path)]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


__all__ = ["CheckpointError", "environment", "file_hash", "last_checkpoint", "read_run", "write_json", "write_run"]
