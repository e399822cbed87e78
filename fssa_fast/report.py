"""The environment report: `python -m fssa_fast`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch


def environment() -> str:
    """What a bug report needs: versions, machine, and for every backend whether it runs here or why not."""
    from fssa_fast import __version__
    from fssa_fast.backends import ORDER, load_backend

    lines = [
        ("fssa_fast", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),  # which build, too; the package's metadata may leave that out
        *((name, _version(name)) for name in ("transformers", "triton", "peft")),
        ("flash-attn", _version("flash-attn", "not installed: attention is PyTorch's, and our own when fused")),
        ("platform", f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("FSSA_BACKEND", os.environ.get("FSSA_BACKEND", "not set (auto)")),
        *((f"backend {name}", load_backend(name)[1] or "available") for name in ORDER),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(package: str, without: str = "not installed") -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return without
