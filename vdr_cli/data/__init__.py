"""Datasets to prompts: columns, chat template, order."""
