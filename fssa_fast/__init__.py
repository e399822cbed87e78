"""fssa_fast: per-user steering of language models at the speed of the plain model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fssa_fast.backends import BackendError, use_backend
    from fssa_fast.policy import SteerablePolicy
    from fssa_fast.steering import ConfigError, EncoderConfig, LoraConfig, SteeringConfig
    from fssa_fast.users import BASE, PRIOR, BankFull, Choice, SqliteStore, StoreError, TextEmbedder, UnknownUser

__version__ = "0.1.0"

__all__ = [
    "BASE",
    "PRIOR",
    "BackendError",
    "BankFull",
    "Choice",
    "ConfigError",
    "EncoderConfig",
    "LoraConfig",
    "SqliteStore",
    "SteerablePolicy",
    "SteeringConfig",
    "StoreError",
    "TextEmbedder",
    "UnknownUser",
    "__version__",
    "use_backend",
]

_ROOM = {"BackendError": "backends", "use_backend": "backends", "SteerablePolicy": "policy"}
_ROOM |= dict.fromkeys(("ConfigError", "EncoderConfig", "LoraConfig", "SteeringConfig"), "steering")


def __getattr__(name: str) -> Any:
    """A public name, imported when first asked for: a command's help waits for neither torch nor transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"fssa_fast.{_ROOM.get(name, 'users')}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
