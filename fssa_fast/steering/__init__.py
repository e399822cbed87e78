"""Steering a Hugging Face model: the policy, its configuration, its users."""

from fssa_fast.steering.bank import BankFull
from fssa_fast.steering.choices import Choice
from fssa_fast.steering.config import ConfigError, EncoderConfig, LoraConfig, SteeringConfig
from fssa_fast.steering.embedder import TextEmbedder
from fssa_fast.steering.policy import SteerablePolicy
from fssa_fast.steering.store import SqliteStore, StoreConflict, StoreError, UserStore
from fssa_fast.steering.stored_users import StoredUsers
from fssa_fast.steering.users import BASE, PRIOR, UnknownUser, User

__all__ = [
    "BASE",
    "PRIOR",
    "BankFull",
    "Choice",
    "ConfigError",
    "EncoderConfig",
    "LoraConfig",
    "SqliteStore",
    "SteerablePolicy",
    "SteeringConfig",
    "StoreConflict",
    "StoreError",
    "StoredUsers",
    "TextEmbedder",
    "UnknownUser",
    "User",
    "UserStore",
]
