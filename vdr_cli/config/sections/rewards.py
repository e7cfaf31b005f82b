"""Reward functions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vdr_cli.config.sections.base import Section

Extract = Literal["whole", "answer_tags", "boxed"]


class RewardFunction(Section):
    name: str
    """A built-in, `module:function`, `file.py:function`, or `model:PATH`, a sequence-classification model (directory
    or hub id) whose logit is the reward."""
    weight: float = 1.0
    """Weight of this function's reward in the sum."""
    label: Annotated[int, Field(ge=0)] | None = None
    """The index of the label whose logit is the reward, for a reward model with several."""


class RewardsConfig(Section):
    functions: list[RewardFunction] = []
    """Reward functions; each gets every column of the data by name. Empty: a bed and a reasoning_gym suite use their
    own; other data must name a function."""
    extract: Extract = "whole"
    """The answer that `reasoning_gym` and `exact_match` judge: the whole completion, what stands in its last
    `<answer>...</answer>`, or in its last `\\boxed{...}`. Other functions see the completion."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds one call of one function may take before the run stops and names it."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes of each rank in which functions that are not async are called, so that what they compute in Python does
    not hold up sampling; each imports the functions for itself. 0: on a thread of the rank."""
    solved_at: float = 1.0
    """A completion whose weighted task reward reaches this counts as solved in pass@k."""
