"""A run directory: the trained model, its checkpoints, and run.json, which says how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fssa_fast.files import read_config
from fssa_fast.records import write_json

RUN_NAME, VERSION = "run.json", 1


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
