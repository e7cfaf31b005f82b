"""Settings that would do nothing, or do not work together, within a section or across sections."""

from __future__ import annotations

from typing import Any

import pytest

from vdr_cli.config import Config, GrpoConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "cispo", "delta": 2.0}, "delta"),
        ({"loss": "sapo", "delta": 2.0}, "delta"),
        ({"loss": "kl_cov", "minibatches": 2, "delta": 2.0}, "delta"),
        ({"entropy_target": 0.2, "entropy_weight": 0.1}, "remove one of them"),
        ({"loss": "kl_cov"}, "no effect with one update per rollout"),
        ({"loss": "clip_cov", "clip_cov_low": 2.0, "clip_cov_high": 2.0}, "clip_cov_low 2 is not below"),
        ({"delta": 1.2}, "above 1"),
        ({"multi_reward": "normalise_then_sum", "scale_rewards": "batch"}, "scale_rewards batch"),
        ({"multi_reward": "normalise_then_sum", "scale_rewards": "none"}, "scale_rewards none"),
        ({"advantage": "pass_at_k", "scale_rewards": "none"}, "scale_rewards has no meaning"),
        ({"advantage": "maxrl", "multi_reward": "normalise_then_sum"}, "multi_reward has no meaning"),
        ({"advantage": "maxrl", "overlong_cache": 3}, "make negative"),
        ({"advantage": "maxrl", "beta": 0.1, "kl_in": "reward"}, "make negative"),
        ({"pass_k": 1}, "pass_k"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GrpoConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": {"steps": 3}, "grpo": {"num_iterations": 2}}, "train.steps 3 is not a multiple"),
        (
            {"train": {"steps": 8, "prompts_per_step": 6}, "grpo": {"num_iterations": 3, "minibatches": 2}},
            "train.steps 8 is not a multiple of grpo.num_iterations 3 x grpo.minibatches 2",
        ),
        (
            {"train": {"steps": 4, "prompts_per_step": 6}, "grpo": {"minibatches": 4}},
            "train.prompts_per_step 6 is not a multiple of grpo.minibatches 4",
        ),
        ({"rollout": {"members": True, "backend": "vllm"}}, "members is true but backend is vllm"),
        ({"rollout": {"members": True}, "disagreement": {"mask_sharing": "token"}}, "mask_sharing member"),
        ({"rollout": {"ahead": 1}}, "ahead is 1 but backend is transformers"),
        (
            {"rollout": {"group_size": 1}, "grpo": {"scale_rewards": "none"}, "disagreement": {"mode": "none"}},
            "rollout.group_size is 1",
        ),
        ({"grpo": {"beta": 0.1, "sync_reference_every": 5}, "model": {"lora": {}}}, "sync_reference_every needs"),
    ],
)
def test_impossible_combinations_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config(**settings)
