"""Commands start without what they do not use: it is modules that are counted, since seconds depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fssa_fast

HEAVY = {"torch", "transformers", "accelerate", "safetensors", "matplotlib", "huggingface_hub", "datasets", "fastapi"}

PROGRAM = """
import json, sys
from fssa_fast.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_by(*arguments: object) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "policy", "--help"], ["--version"]], ids=" ".join)
def test_help_waits_for_no_heavy_module(arguments: list[str]) -> None:
    assert not loaded_by(*arguments) & (HEAVY | {"numpy"})


def test_make_choices_waits_for_no_heavy_module(tmp_path: Path) -> None:
    rows = [f"u{user},w{item},{(user + 1) * item % 7}\n" for user in range(3) for item in range(6)]
    (tmp_path / "ratings.csv").write_text("user,item,value\n" + "".join(rows))
    loaded = loaded_by("data", "make-choices", tmp_path / "ratings.csv", tmp_path / "out", "--kind", "ratings")
    assert (tmp_path / "out" / "choices.jsonl").exists() and not loaded & HEAVY


def test_every_public_name_is_there() -> None:
    for name in fssa_fast.__all__:
        assert getattr(fssa_fast, name) is not None and name in dir(fssa_fast)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        fssa_fast.Nothing  # noqa: B018
