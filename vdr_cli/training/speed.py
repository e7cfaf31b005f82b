"""Speed and share of each phase of a step. Pure: plain numbers in and out."""

from __future__ import annotations

from collections.abc import Mapping

WORKING = ("rollout", "disagreement", "update")
"""Phases that go through every token."""


def speeds(seconds: Mapping[str, float], step_time: float, tokens: Mapping[str, float]) -> dict[str, float]:
    """tokens_per_second/<phase> of the phases in `tokens`, and step_time_share/<phase> of all.

    seconds: of each phase, the slowest rank's. tokens: completion tokens that a phase went through, over all ranks.
    """
    rates = {f"tokens_per_second/{name}": tokens[name] / seconds[name] for name in tokens if seconds.get(name)}
    inside = {name: value for name, value in seconds.items() if name not in ("step", "evaluation")}
    return rates | {f"step_time_share/{name}": value / step_time for name, value in inside.items()}


def utilisation(
    parameters: float, trainable: bool, tokens: Mapping[str, float], seconds: Mapping[str, float], peak: float
) -> dict[str, float]:
    """mfu/rollout and mfu/update: 2 operations a parameter and token forward, 2 more for each gradient (Kaplan 2020).

    parameters: those in matrix products. trainable: their own gradients are computed too (not with adapters). tokens:
    prompts, once a group, and completions. peak: of all GPUs together.
    """
    each = {"rollout": 2.0, "update": 6.0 if trainable else 4.0}
    return {
        f"mfu/{name}": factor * parameters * tokens[name] / (seconds[name] * peak)
        for name, factor in each.items()
        if seconds.get(name)
    }
