"""Environments and tools: the other side of completions that take several turns (docs/environments.md)."""
