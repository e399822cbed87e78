"""The policy: what users of the library hold, and how it is loaded, saved and imported."""

from fssa_fast.policy.policy import SteerablePolicy

__all__ = ["SteerablePolicy"]
