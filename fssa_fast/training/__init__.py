"""Training: objectives as pure functions, data, and the trainer of policies."""

from fssa_fast.training.data import OpposedData, Preference, PreferenceData
from fssa_fast.training.policy import NPDPOArguments, NPDPOTrainer, policy_log_probs

__all__ = ["NPDPOArguments", "NPDPOTrainer", "OpposedData", "Preference", "PreferenceData", "policy_log_probs"]
