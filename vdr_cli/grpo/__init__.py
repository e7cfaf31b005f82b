"""GRPO as pure functions: advantages and losses."""
