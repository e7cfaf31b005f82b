"""Options of the loss and the batch in real runs: two ranks, five groups, ZeRO-3 with every parameter partitioned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.options.conftest import Left, Run, assert_resumed
from vdr_cli.grpo.advantages import Moments, normalised_sum, standardise

pytestmark = pytest.mark.timeout(1800)

ACTING = {
    "rollout.members": True,
    "disagreement.mode": "end_of_sequence",
    "disagreement.dropout": 0.3,
    "disagreement.scope": "last_k",
    "disagreement.last_k": 2,
}
ADAPTIVE = {"grpo.entropy_target": 9.0, "grpo.entropy_delta": 0.25, "grpo.entropy_max": 0.5}
MINIBATCHES = {"grpo.minibatches": 5, "disagreement.mode": "end_of_sequence", "train.micro_batch_size": 3}
"""A group each: of every minibatch one rank has no group."""
REWARDS = """
def flat(completions, **_):
    return [0.5] * len(completions)

def digits(completions, **_):
    return [100.0 * sum(c.isdigit() for c in text) for text in completions]
"""


def training_runs(folder: Path) -> list[Run]:
    """In order."""
    minibatches = {"train.steps": 10, **MINIBATCHES, "train.checkpoint_every": 5}
    acting = {**ACTING, "train.steps": 3, "train.checkpoint_every": 1}
    adaptive = {**ADAPTIVE, "train.steps": 4, "train.checkpoint_every": 2}
    flat = [{"name": f"{folder}/mine.py:flat"}]
    two = [{"name": "countdown"}, {"name": f"{folder}/mine.py:digits", "weight": 0.5}]
    twice = {"train.steps": 2, "grpo.num_iterations": 2}
    return [
        ("plain", {}),
        ("iterations", {**twice, "train.checkpoint_every": 2}),
        ("minibatches", minibatches),
        ("minibatches@5", minibatches),
        ("resample", {"grpo.resample_groups": 3, "train.checkpoint_every": 1}),
        ("quantile", {"grpo.top_entropy_quantile": 0.2}),
        ("entropy", {**twice, "grpo.entropy_weight": 1.0, "rewards.functions": flat}),
        ("acting", acting),
        ("acting@2", acting),
        ("adaptive", adaptive),
        ("adaptive@2", adaptive),
        ("no_entropy", {"rewards.functions": flat}),
        ("truncated", {"grpo.mask_truncated": True, "rollout.max_new_tokens": 6, "grpo.top_entropy_quantile": 0.3}),
        ("overlong", {"grpo.overlong_cache": 3}),
        ("capped", {"grpo.importance_cap": 0.5, "train.max_grad_norm": 0.0}),
        ("normalised", {"grpo.multi_reward": "normalise_then_sum", "rewards.functions": two}),
        ("masked", {}, "masked"),
    ]


@pytest.fixture(scope="module")
def trained(work_through: Callable[..., Left], chosen: Any, tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("options")
    (folder / "mine.py").write_text(REWARDS)
    return work_through(folder, chosen(training_runs(folder)), chosen([("acting_alone", ACTING)]))


def test_every_run_ends_well(left: Left) -> None:
    assert set(left.ended.values()) == {"0"}


@pytest.mark.runs("minibatches", "minibatches_resumed")
def test_minibatches_take_a_step_each_and_resume_bit_for_bit(left: Left) -> None:
    assert_resumed(left, "minibatches", 5)
    assert [line["step"] for line in left.metrics("minibatches")] == [5, 10]
    line = left.metrics("minibatches")[0]
    assert line["denominator/completions"] == 4.0 and line["denominator/tokens"] == line["step_tokens"] / 5
    assert line["ratio/max"] > 1.0 and line["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.runs("acting", "acting_resumed", "plain")
def test_members_act_and_resume_bit_for_bit(left: Left) -> None:
    lines = left.metrics("acting")
    assert_resumed(left, "acting", 2)
    assert left.table("acting")["completion_ids"] != left.table("plain")["completion_ids"]
    assert lines[0]["sampling/sampling_logp_difference/mean"] > 1e-2
    assert lines[0]["sampling/importance_sampling_ratio/max"] <= 2.0 and lines[0]["ratio/max"] == 1.0


@pytest.mark.runs("acting_alone", "acting")
def test_members_act_alike_on_any_number_of_ranks(left: Left) -> None:
    one, two = left.table("acting_alone"), left.table("acting")
    assert one["completion_ids"] == two["completion_ids"] and one["row"] == two["row"]


@pytest.mark.runs("adaptive", "adaptive_resumed")
def test_the_adaptive_entropy_bonus_rises_and_resumes(left: Left) -> None:
    assert_resumed(left, "adaptive", 2)
    assert [line["entropy_coef"] for line in left.metrics("adaptive")] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.runs("minibatches")
def test_the_old_log_probabilities_are_those_of_the_sampler(left: Left) -> None:
    """In the first minibatch the ratio is 1 to the bit; later ones compare with the same policy."""
    calls = [call for probe in left.probes("minibatches") for call in probe["calls"][:2]]  # one minibatch's
    trained = [call for call in calls if bool(call["mask"].any())]
    assert trained and all(torch.equal(call["logps"], call["old_logps"]) for call in trained)
    for call in (call for probe in left.probes("minibatches") for call in probe["calls"]):
        apart = (call["old_logps"] - call["sampler_logps"])[call["mask"]]
        assert not apart.numel() or float(apart.abs().max()) < 1e-4


@pytest.mark.runs("iterations", "plain")
def test_several_iterations_are_off_policy_after_the_first(left: Left) -> None:
    (line,) = left.metrics("iterations")
    assert line["step"] == 2 and line["ratio/max"] > 1.0
    assert left.metrics("plain")[0]["ratio/max"] == 1.0
    assert left.state("iterations", 2)["loop"]["drawn"] == 5
    first, second = (probe["calls"] for probe in left.probes("iterations"))
    for calls in (first, second):
        half = len(calls) // 2
        for early, late in zip(calls[:half], calls[half:], strict=True):
            assert torch.equal(early["logps"], early["old_logps"])
            assert torch.equal(late["old_logps"], early["logps"])
            moved = not torch.equal(late["logps"], early["logps"])
            assert moved == bool(early["mask"].any())  # the last of the rank with fewer rows is empty


@pytest.mark.runs("resample", "plain")
def test_resampling_leaves_fewer_groups_without_signal(left: Left) -> None:
    (with_it,), (without,) = left.metrics("resample"), left.metrics("plain")
    assert with_it["frac_reward_zero_std"] < without["frac_reward_zero_std"]
    assert left.state("resample")["loop"]["drawn"] > 5
    assert len(left.table("resample")["prompt"]) == 20


@pytest.mark.runs("quantile", "plain")
def test_top_entropy_quantile_keeps_the_share_of_highest_entropy(left: Left) -> None:
    calls = [call for probe in left.probes("quantile") for call in probe["calls"]]
    mask = torch.cat([call["mask"].flatten() for call in calls])
    selected = torch.cat([call["selected"].flatten() for call in calls])[mask]
    entropy = torch.cat([call["entropy"].flatten() for call in calls])[mask]
    threshold, share = entropy[selected].min(), round(0.2 * int(mask.sum()))
    assert threshold > entropy[~selected].max()
    assert int((entropy > threshold).sum()) < share <= int(selected.sum())  # equal completions give ties
    assert left.distance(left.update("quantile"), left.update("plain")) > 1e-3


@pytest.mark.runs("entropy", "no_entropy")
def test_entropy_weight_raises_entropy_without_any_reward(left: Left) -> None:
    assert left.update("no_entropy").norm() == 0.0

    calls = [probe["calls"] for probe in left.probes("entropy")]  # two iterations on the same completions
    before = sum(float(call["entropy"].sum()) for each in calls for call in each[: len(each) // 2])
    after = sum(float(call["entropy"].sum()) for each in calls for call in each[len(each) // 2 :])
    assert after > before * 1.001


@pytest.mark.runs("truncated")
def test_truncated_completions_give_no_gradient(left: Left) -> None:
    truncated = sum(left.table("truncated")["truncated"])
    assert 0 < truncated < 20
    masks = [call["mask"] for probe in left.probes("truncated") for call in probe["calls"]]
    counted = torch.cat([mask.any(dim=1) for mask in masks])
    assert int(counted.sum()) == 20 - truncated


@pytest.mark.runs("truncated")
def test_the_share_of_high_entropy_is_of_the_tokens_that_are_trained_on(left: Left) -> None:
    calls = [call for probe in left.probes("truncated") for call in probe["calls"]]
    mask, selected, entropy = (
        torch.cat([call[name].flatten() for call in calls]) for name in ("mask", "selected", "entropy")
    )
    highest = entropy[mask].sort(descending=True).values
    smallest = highest[round(0.3 * len(highest)) - 1]
    assert torch.equal(selected[mask], entropy[mask] >= smallest)


@pytest.mark.runs("overlong")
def test_overlong_completions_are_penalised(left: Left) -> None:
    table = left.table("overlong")
    for ids, reward, task in zip(table["completion_ids"], table["reward"], table["rewards/countdown"], strict=True):
        assert reward - task == pytest.approx(min(0.0, max(-1.0, (7 - 3 - len(ids)) / 3)), abs=1e-6)
    assert any(reward != task for reward, task in zip(table["reward"], table["rewards/countdown"], strict=True))


@pytest.mark.runs("capped", "plain")
def test_importance_cap_scales_the_gradient(left: Left) -> None:
    (capped,), (plain,) = left.metrics("capped"), left.metrics("plain")
    assert capped["grad_norm"] == pytest.approx(0.5 * plain["grad_norm"], rel=1e-4)
    assert capped["sampling/importance_sampling_ratio/mean"] == pytest.approx(0.5)


@pytest.mark.runs("normalised")
def test_normalise_then_sum_is_its_formula(left: Left) -> None:
    table = left.table("normalised")
    rewards = torch.tensor([table["rewards/countdown"], table["rewards/digits"]]).T
    scores = normalised_sum(rewards, torch.tensor([1.0, 0.5]), 4)
    expected = standardise(scores, Moments.of(scores))
    torch.testing.assert_close(torch.tensor(table["advantage"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.runs("masked")
def test_a_rank_with_only_masked_micro_batches_stays_in_step(left: Left) -> None:
    first, second = left.probes("masked")
    assert not any(bool(call["mask"].any()) for call in first["calls"])
    assert any(bool(call["mask"].any()) for call in second["calls"])
    assert torch.equal(first["logits"], second["logits"])
    assert left.update("masked").norm() > 0
