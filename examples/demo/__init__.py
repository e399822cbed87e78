"""A small NP-DPO demonstration: SmolLM2-135M-Instruct answers different users in different style."""
