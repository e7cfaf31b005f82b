"""Datasets to prompts, and the files that a run keeps: saved completions and metrics."""
