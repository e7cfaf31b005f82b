"""How fast the phases of a step were, and how much of it each took. Pure: plain numbers in and out."""

from __future__ import annotations

from collections.abc import Mapping

WORKING = ("rollout", "disagreement", "update")
"""Phases that go through every token."""

PEAK_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Floating-point operations a second without sparsity, as NVIDIA's data sheets give them; the first name that fits."""


def speeds(seconds: Mapping[str, float], step_time: float, tokens: Mapping[str, float]) -> dict[str, float]:
    """tokens_per_second/<phase> of the phases in `tokens`, and step_time_share/<phase> of all.

    seconds: of each phase, the slowest rank's. tokens: completion tokens that a phase went through, over all ranks.
    """
    rates = {f"tokens_per_second/{name}": tokens[name] / seconds[name] for name in tokens if seconds.get(name)}
    inside = {name: value for name, value in seconds.items() if name not in ("step", "evaluation")}
    return rates | {f"step_time_share/{name}": value / step_time for name, value in inside.items()}


def peak_of(device: str) -> float | None:
    """Of a GPU's name as torch gives it; None when it is not known here."""
    return next((peak for name, peak in PEAK_BFLOAT16.items() if name in device.replace("-", " ")), None)


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
