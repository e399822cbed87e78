"""How something was made: versions, machine, the hash of a file; and JSON that a reader never sees half of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

PACKAGES = ("fssa-fast", "torch", "transformers", "accelerate", "numpy")


def environment() -> dict[str, Any]:
    """Versions and machine, for a record of what torch computed."""
    import torch

    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, Any]:
    """The same without what torch says, which takes seconds to load."""
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
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
