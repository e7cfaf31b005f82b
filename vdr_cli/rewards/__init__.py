"""Reward functions: the protocol, the built-ins, loading and calling them."""
