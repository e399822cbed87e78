"""What a deployment says of its steering: under "fssa" in vLLM's model_loader_extra_config."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

FORMAT = "fssa"
STORE = "FSSA_USERS"


@dataclass(frozen=True)
class Options:
    """policy: the directory of a saved policy. users: the store, a SQLite file or a PostgreSQL URL; None takes
        FSSA_USERS, which may be unset.

    load_format: how the base model's own weights are loaded, as vLLM's --load-format.
    """

    policy: str
    users: str | None = None
    load_format: str = "auto"


def read_options(load_config: Any) -> Options | None:
    """The options of a vLLM's load configuration; None where it does not load with the format `fssa`.

    Raises ValueError for a missing or unknown key, or a value that is not a text.
    """
    if load_config.load_format != FORMAT:
        return None
    extra = load_config.model_loader_extra_config or {}
    own = extra.get(FORMAT) if isinstance(extra, dict) else None
    keys = [field.name for field in fields(Options)]
    if not isinstance(own, dict) or "policy" not in own or not set(own) <= set(keys):
        raise ValueError(f'model_loader_extra_config: expected {{"fssa": an object of some of {keys}}}, got {extra!r}')
    for key, value in own.items():
        if not isinstance(value, str):
            raise ValueError(f"model_loader_extra_config: expected a text for {key!r}, got {value!r}")
    options = Options(**own)
    return replace(options, users=os.environ.get(STORE)) if options.users is None else options


def base_load_config(load_config: Any, options: Options) -> Any:
    """The load configuration of the base model alone."""
    rest = {key: value for key, value in load_config.model_loader_extra_config.items() if key != FORMAT}
    return replace(load_config, load_format=options.load_format, model_loader_extra_config=rest)
