"""The lines under `vdr train --dry-run`: what a configuration amounts to."""

from __future__ import annotations

import pytest

from vdr_cli.config.load import load_config
from vdr_cli.planning.batches import batch_plan


def lines(processes: int, *overrides: str) -> dict[str, str]:
    return dict(batch_plan(load_config(overrides=["model.name=other", *overrides]), processes))


def test_batches_of_one_process() -> None:
    plan = lines(1, "train.prompts_per_step=8", "rollout.group_size=4", "train.micro_batch_size=5", "train.steps=10",
                 "rollout.max_new_tokens=16")  # fmt: skip
    assert plan["completions per rollout"] == "32 = 8 groups x 4"
    assert plan["micro-batches"].startswith("7 per process"), "the last one is smaller"
    assert plan["completion tokens"] == "at most 512 per rollout, 5,120 in the run"
    assert plan["groups per rollout"] == "8, 8 on a process"


def test_a_rollout_of_several_updates_is_sampled_once() -> None:
    plan = lines(1, "train.steps=10", "grpo.num_iterations=2", "train.prompts_per_step=2", "rollout.group_size=2",
                 "rollout.max_new_tokens=4")  # fmt: skip
    assert plan["steps"] == "10 from 5 rollouts"
    assert plan["completion tokens"] == "at most 16 per rollout, 80 in the run"


def test_minibatches_are_optimizer_steps() -> None:
    plan = lines(1, "train.steps=12", "grpo.num_iterations=2", "grpo.minibatches=3", "train.prompts_per_step=6",
                 "rollout.group_size=4", "train.micro_batch_size=4")  # fmt: skip
    assert plan["steps"] == "12 from 2 rollouts, 3 minibatches of 2 groups each"
    assert plan["micro-batches"].startswith("2 per process and step")


def test_processes_with_fewer_groups_than_minibatches_are_told_to_idle() -> None:
    few = ("grpo.minibatches=4", "train.prompts_per_step=8", "train.steps=8")
    assert "idles" in lines(4, *few)["steps"] and "idles" not in lines(2, *few)["steps"]


def test_groups_are_shared_out_unequally() -> None:
    plan = lines(3, "train.prompts_per_step=8", "rollout.group_size=4", "train.micro_batch_size=8")
    assert plan["groups per rollout"] == "8, 2 or 3 on a process"
    assert plan["micro-batches"].startswith("2 per process"), "of the process with most"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("disagreement.mode=per_token",), "bald, per_token, 8 members through every layer"),
        (("disagreement.last_k=2",), "bald, end_of_sequence, 8 members through the top 2 layers"),
        ((), "bald, end_of_sequence, 8 members through the top quarter of the layers"),
    ],
)
def test_the_bonus_is_described(overrides: tuple[str, ...], expected: str) -> None:
    assert lines(1, *overrides)["bonus"] == f"disagreement ({expected}), additive, weight 0.1"


@pytest.mark.parametrize("override", ["disagreement.mode=none", "bonus.source=none"])
def test_either_switch_is_plain_grpo(override: str) -> None:
    assert lines(1, override)["bonus"] == "none: plain GRPO"


@pytest.mark.parametrize(
    ("steps", "every", "written"), [(10, 5, "2 written, 2 kept"), (11, 5, "3 written, 2 kept"), (10, 0, "1 written")]
)
def test_checkpoints_are_counted(steps: int, every: int, written: str) -> None:
    assert lines(1, f"train.steps={steps}", f"train.checkpoint_every={every}")["checkpoints"].startswith(written)


@pytest.mark.parametrize(("every", "count"), [(0, "none"), (5, "3, each"), (4, "4, each")])
def test_evaluations_are_counted_with_the_first_and_the_last(every: int, count: str) -> None:
    assert lines(1, "train.steps=10", f"train.eval_every={every}")["held-out evaluations"].startswith(count)


def test_members_that_sample_are_named_only_where_they_do() -> None:
    assert "sampling" not in lines(1)
    found = lines(1, "rollout.members=true", "disagreement.scope=full", "bonus.source=none")
    assert found["sampling"] == "each group from one of 8 members through every layer"


def test_resampling_is_named_only_where_it_happens() -> None:
    assert "resampling" not in lines(1)
    assert lines(1, "grpo.resample_groups=2")["resampling"].startswith("up to 2 extra rollouts")
