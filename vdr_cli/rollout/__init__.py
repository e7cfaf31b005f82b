"""Prompts to completions: one protocol, backends behind it."""
