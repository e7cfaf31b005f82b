"""What a run says of its first step."""

from __future__ import annotations

import pytest

from vdr_cli.config import Config
from vdr_cli.training.run_log import counters, sampler_warning
from vdr_cli.training.state import LoopState

APART = {"sampling/sampling_logp_difference/mean": 0.2}


def test_a_sampler_that_is_not_the_policy_is_reported_with_the_number() -> None:
    assert "0.200 nats per token apart with the same weights" in str(sampler_warning(Config(), 1, APART))


@pytest.mark.parametrize(
    ("settings", "step", "metrics"),
    [
        ({}, 1, {"sampling/sampling_logp_difference/mean": 0.007}),
        ({}, 1, {"sampling/sampling_logp_difference/mean": float("nan")}),
        ({}, 1, {}),
        ({}, 2, APART),
        ({"grpo": {"num_iterations": 2}, "train": {"steps": 2}}, 1, APART),
        ({"rollout": {"members": True}}, 1, APART),
    ],
    ids=["rounding", "refused", "not measured", "later", "several updates", "members"],
)
def test_what_other_weights_or_rounding_explain_is_not(settings: dict, step: int, metrics: dict) -> None:
    assert sampler_warning(Config.model_validate(settings), step, metrics) is None


def test_tokens_are_counted_as_trl_counts_them() -> None:
    """Prompt and completion tokens of every completion; an epoch is a pass over the rows."""
    state = LoopState(drawn=30, tokens=7, prompt_tokens=50)
    assert counters(state, rows=20) == {"num_tokens": 57.0, "sampled_tokens": 7.0, "epoch": 1.5}
