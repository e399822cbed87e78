"""Training: objectives as pure functions."""
