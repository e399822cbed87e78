"""Where a model lies: in a folder or on the Hugging Face hub. All is loaded from a folder, and without its code.

A name that the user typed may be asked of the hub. A name that a file holds is somebody else's word: it is only looked
up among the models that were downloaded before. In neither case does code that comes with a model run.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

NO_CODE = {"trust_remote_code": False, "local_files_only": True}
"""What every loader of transformers is called with."""

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})/?$")
# Weights in safetensors only, and what says how to use them; not the same weights in other formats, in folders.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]
_NOT_FILES = ["*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors"]
_OURS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm", None)  # others are code from the hub
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def is_hub_id(name: str) -> bool:
    """Whether the hub could have a model of this name: `model`, or `owner/model`."""
    return _ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def find_folder(argument: str, name: str | os.PathLike[str], *, ask_hub: bool, revision: str | None = None) -> Path:
    """The folder of what `name` names: itself, or what the hub has under it, downloaded first where it is not yet.

    Args:
        argument: what errors call it. ask_hub: whether the user gave the name; one that a file holds is looked for
            among earlier downloads only, without the network. revision: of the hub's, None takes the newest.

    Raises ValueError naming the argument, and what to give instead.
    """
    text = os.fspath(name)
    if text and Path(text).is_dir():
        return Path(text)
    if not is_hub_id(text):
        raise ValueError(f"{argument}: expected a folder or a model's name on the hub, got {text!r}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = text if revision is None else f"{text} (revision {revision})"
    try:
        return Path(snapshot_download(text, revision=revision, local_files_only=not ask_hub, allow_patterns=_FILES,
                                      ignore_patterns=_NOT_FILES))  # fmt: skip
    except (OSError, ValueError, HfHubHTTPError) as error:
        if not ask_hub:
            raise ValueError(
                f"{argument}: expected a model that is on this machine, since a file names it; {wanted!r} is not. "
                f"Give {argument} yourself: {text!r} to load it from the hub, or its folder"
            ) from error
        raise ValueError(
            f"{argument}: expected a folder or a model's name on the hub, got {wanted!r}: there is no such folder, and "
            f" the hub did not give it ({' '.join(str(error).split())[:200]}). Give {argument} the model's folder"
        ) from error


def remember(name_or_path: str, directory: str | os.PathLike[str]) -> tuple[str, str | None]:
    """How a file in `directory` names a model: by the hub's name and revision, or by its path from `directory`.

    A path begins with a dot, which no name of the hub does.
    """
    match = _SNAPSHOT.search(Path(name_or_path).as_posix())
    if match is not None:
        return match["name"].replace("--", "/"), match["revision"]
    if not name_or_path or not Path(name_or_path).is_dir():
        return name_or_path, None
    path = Path(os.path.relpath(Path(name_or_path).resolve(), Path(directory).resolve())).as_posix()
    return path if path.startswith(".") else f"./{path}", None


def recall(name: str, directory: str | os.PathLike[str]) -> str:
    """What `remember` wrote in a file of `directory`, for `find_folder`."""
    return os.fspath((Path(directory) / name).resolve()) if name.startswith(".") else name


def check_folder(folder: Path) -> None:
    """Raises ValueError for a model's folder whose configuration is missing, or asks for code from the hub."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a model's configuration in JSON: {error}") from error
    waiting = [content]
    while waiting:
        value = waiting.pop()
        for key, inner in value.items() if isinstance(value, dict) else ():
            if isinstance(key, str) and key.lstrip("_").startswith(("attn_implementation", "experts_implementation")):
                named = list(inner.values()) if isinstance(inner, dict) else [inner]
                if any(one not in _OURS for one in named):
                    raise ValueError(f"{path}: {key}: expected one of {_OURS}, whose code is here, got {inner!r:.80}")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in a model's folder."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def load_model(kind: Any, folder: Path, **options: Any) -> Any:
    """A model from its folder by one of transformers' classes; no code of the folder's, no network, no question."""
    check_folder(folder)
    return kind.from_pretrained(os.fspath(folder), **options, **NO_CODE)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; no code of the folder's, no network, no question."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.fspath(folder), **NO_CODE)
