"""GRPO as pure functions: advantages, losses, log-probabilities."""
