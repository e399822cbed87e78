"""fssa_fast: per-user steering of language models at the speed of the plain model."""

from fssa_fast.backends import BackendError, use_backend
from fssa_fast.steering import (
    BASE,
    PRIOR,
    BankFull,
    Choice,
    ConfigError,
    EncoderConfig,
    LoraConfig,
    SqliteStore,
    SteerablePolicy,
    SteeringConfig,
    StoreError,
    TextEmbedder,
    UnknownUser,
)

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
