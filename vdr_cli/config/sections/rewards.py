"""Reward functions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vdr_cli.config.sections.base import Section


class RewardFunction(Section):
    name: str
    """A built-in, `module:function`, or `file.py:function`."""
    weight: float = 1.0
    """Weight of this function's reward in the sum."""


class RewardsConfig(Section):
    functions: list[RewardFunction] = []
    """Reward functions; each gets every column of the data by name. Empty: a bed uses its own; other data
    must name a function."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds one call of one function may take before the run stops and names it."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes of each rank in which functions that are not async are called, so that what they compute in Python does
    not hold up sampling; each imports the functions for itself. 0: on a thread of the rank."""
    solved_at: float = 1.0
    """A completion whose weighted task reward reaches this counts as solved in pass@k."""
