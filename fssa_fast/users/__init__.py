"""From a user's choices to a row of the bank: choices, embedder, bank, users, and their stores."""

from fssa_fast.users.bank import BankFull
from fssa_fast.users.choices import Choice
from fssa_fast.users.embedder import TextEmbedder
from fssa_fast.users.open_store import open_store
from fssa_fast.users.sqlite_store import SqliteStore
from fssa_fast.users.store import StoreConflict, StoreError, UserStore
from fssa_fast.users.stored_users import StoredUsers
from fssa_fast.users.users import BASE, PRIOR, UnknownUser, User, Users

__all__ = [
    "BASE",
    "PRIOR",
    "BankFull",
    "Choice",
    "SqliteStore",
    "StoreConflict",
    "StoreError",
    "StoredUsers",
    "TextEmbedder",
    "UnknownUser",
    "User",
    "UserStore",
    "Users",
    "open_store",
]
