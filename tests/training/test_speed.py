"""Tokens a second, shares of the step and utilisation of a GPU, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from vdr_cli.engine.gpu import PEAK_BFLOAT16, peak_of
from vdr_cli.training.speed import speeds, utilisation


def test_rates_and_shares() -> None:
    seconds = {"rollout": 2.0, "rewards": 0.5, "update": 4.0, "evaluation": 100.0, "disagreement": 0.0}
    found = speeds(seconds, 8.0, {"rollout": 100.0, "disagreement": 100.0, "update": 200.0})
    assert found["tokens_per_second/rollout"] == 50 and found["tokens_per_second/update"] == 50
    assert found["step_time_share/rewards"] == 0.0625 and found["step_time_share/update"] == 0.5
    assert "tokens_per_second/disagreement" not in found and "step_time_share/evaluation" not in found


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Somebody's GPU", None),
    ],
)
def test_gpus_by_name(device: str, name: str | None) -> None:
    assert peak_of(device) == (PEAK_BFLOAT16[name] if name else None)


def test_utilisation_counts_two_operations_a_parameter_and_token_and_four_more_backward() -> None:
    tokens, seconds = {"rollout": 1e4, "update": 2e4}, {"rollout": 1.0, "update": 2.0}
    whole = utilisation(1e9, True, tokens, seconds, 1e15)
    assert whole["mfu/rollout"] == pytest.approx(0.02) and whole["mfu/update"] == pytest.approx(0.06)
    assert utilisation(1e9, False, tokens, seconds, 1e15)["mfu/update"] == pytest.approx(0.04)
