"""Writes the ops as a kernel repository for Hugging Face's `kernels`: ``python -m fssa_fast.kernels.hub OUT``.

OUT becomes what `kernels.get_kernel` loads: a folder a backend in OUT/build, without native code, each a package of the
public ops, their definitions and the Triton kernels. Its imports are relative and its ops have a namespace of their
own, so that it lives beside the installed package and beside other versions of itself. To publish it, upload the folder
as a repository of the hub's type "kernel".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

NAME, VERSION = "fssa-fast", 1  # the version rises where the ops' arguments change
BACKENDS = ("cpu", "cuda", "rocm")  # on a CPU the ops run by their definitions
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # the checkout, or the installed package
LIBRARY = ROOT if (ROOT / "ops").is_dir() else ROOT / "fssa_fast"
FILES = ("arguments.py", "ops/*.py", "backends/__init__.py", "backends/gpus.py", "backends/triton.py")
ALONE = ("aot.py", "hub.py")  # of the kernels' folder: what is not needed to run them
START = '''"""Per-user modulation of language models: lora, film and context (https://arxiv.org/abs/2412.13998)."""

from .backends import BackendError, use_backend
from .ops import ContextWeights, context, context_rows_, film, film_norm, latent_of, lora, lora_

__all__ = [
    "BackendError",
    "ContextWeights",
    "context",
    "context_rows_",
    "film",
    "film_norm",
    "latent_of",
    "lora",
    "lora_",
    "use_backend",
]
'''
CARD = """---
license: apache-2.0
tags: [kernels, triton]
---
`context`, `lora` and `film`: a few choices of a user become a row of numbers, and rows of different users modulate one
batch. Loaded by `kernels.get_kernel`; the same ops as the package fssa_fast, whose documentation describes them.
"""


def sources() -> dict[str, str]:
    """The files of a variant by their path in it, before they get the namespace."""
    found = {path.relative_to(LIBRARY).as_posix(): path for pattern in FILES for path in LIBRARY.glob(pattern)}
    found |= {f"kernels/{path.name}": path for path in PACKAGE.glob("*.py") if path.name not in ALONE}
    return {"__init__.py": START} | {name: relative(found[name].read_text(), name) for name in sorted(found)}


def relative(text: str, name: str) -> str:
    """The text of a file of the package with its imports relative to the variant's folder."""
    dots = "." * (name.count("/") + 1)
    text = re.sub(r"^(\s*)from fssa_fast\.(\S+) import ", rf"\1from {dots}\2 import ", text, flags=re.MULTILINE)
    if re.search(r"^\s*(import|from) fssa_fast\b", text, re.MULTILINE):
        raise ValueError(f"{name}: an import of fssa_fast is not in the form `from fssa_fast.room import name`")
    return text


def write(out: Path) -> None:
    """Writes the repository; what an earlier call wrote there is replaced."""
    files = sources()
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:10]
    shutil.rmtree(out / "build", ignore_errors=True)
    for backend in BACKENDS:
        namespace = f"_{NAME.replace('-', '_')}_{backend}_{unique}"
        folder = out / "build" / f"torch-{backend}"
        for name, text in files.items():
            text = text.replace("torch.ops.fssa", f"torch.ops.{namespace}").replace("fssa::", f"{namespace}::")
            text = text.replace('Library("fssa"', f'Library("{namespace}"')
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "kernels" / "__init__.py").touch()
        metadata = {
            "name": NAME,
            "id": namespace,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "README.md").write_text(CARD)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    write(parser.parse_args().out)
