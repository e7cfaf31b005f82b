"""Reward functions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vdr_cli.config.sections.base import Section

Extract = Literal["whole", "answer_tags", "boxed"]


class RewardFunction(Section):
    name: str
    """A built-in function, `module:function`, `file.py:function`, or `model:PATH`: a sequence-classification model
    (directory or hub id) whose logit is the reward."""
    weight: float = 1.0
    """Weight of this function's reward in the sum."""
    label: Annotated[int, Field(ge=0)] | None = None
    """Index of the label whose logit is the reward, for a reward model with several labels."""


class RewardsConfig(Section):
    functions: list[RewardFunction] = []
    """Reward functions; each gets every column of the data by name. Empty: beds and reasoning_gym suites use their own
    reward; with other data you must name a function."""
    extract: Extract = "whole"
    """The part of the completion that `reasoning_gym` and `exact_match` judge: all of it (whole), the text inside its
    last `<answer>...</answer>` (answer_tags), or inside its last `\\boxed{...}` (boxed). Other functions always see the
    whole completion."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one call of a reward function may take; after that the run stops and names the function."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Worker processes per rank for functions that are not async, so that their Python code does not hold up sampling.
    Each worker imports the functions itself. 0: call them on a thread of the rank."""
    solved_at: float = 1.0
    """A completion counts as solved when its weighted task reward is at least this, give or take rounding."""
