"""fssa_fast: per-user steering of language models at the speed of the plain model."""

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
