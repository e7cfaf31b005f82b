"""Every option of the loop in real runs: two ranks, five groups, ZeRO-3 with every parameter partitioned."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from vdr_cli.config import Config
from vdr_cli.grpo.advantages import Moments, normalised_sum, standardise
from vdr_cli.models.loading import load_causal_lm

pytestmark = pytest.mark.timeout(1800)

Left = Any
"""The results of the runs (conftest.py)."""
Run = tuple[Any, ...]
"""(name, what differs from BASE in conftest.py), and in some a third: the fault that is planted."""

PROMPT = torch.tensor([[3, 4, 5, 6, 7, 8]])
LORA = {"rank": 4, "alpha": 8}
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
PER_TOKEN = {"disagreement.mode": "per_token", "disagreement.members": 4}
AHEAD = {
    "rollout.ahead": 1,
    "rollout.backend": "vllm",  # the worker samples in its own process all the same
    "train.learning_rate": 5e-3,
    "train.checkpoint_every": 2,
    "train.steps": 4,
    "train.eval_every": 2,
    "train.eval_prompts": 3,
    "disagreement.mode": "end_of_sequence",
}
REWARDS = """
def flat(completions, **_):
    return [0.5] * len(completions)

def digits(completions, **_):
    return [100.0 * sum(c.isdigit() for c in text) for text in completions]

async def logs(completions, log_metric, log_extra, **_):
    log_metric("mine/length", sum(map(len, completions)) / len(completions))
    if len(completions) == 12:
        log_metric("of_twelve", 3.0)
        log_extra("twelve", completions)
    return [0.0] * len(completions)

def shows(completions, log_extra, **_):
    log_extra("length", list(map(len, completions)))
    return [float(c.count("1")) for c in completions]

class Talk:
    def reset(self, target, **columns):
        self.turns, self.asked = target % 3, 0

    def respond(self, messages):
        self.asked += 1
        return None if self.asked > self.turns else "="

    def get_reward(self):
        return float(self.asked)
"""

KL = [("k2", "loss"), ("k3", "loss"), ("k1", "reward"), ("k2", "reward"), ("k3", "reward")]


def training_runs(folder: Path) -> list[Run]:
    """In order."""
    lora = {**PER_TOKEN, "model.lora": LORA, "grpo.beta": 0.1, "train.steps": 3, "train.checkpoint_every": 1}
    synced = {**PER_TOKEN, "grpo.beta": 0.1, "grpo.sync_reference_every": 2, "train.checkpoint_every": 1}
    synced["train.steps"] = 4
    minibatches = {"train.steps": 10, **MINIBATCHES, "train.checkpoint_every": 5}
    acting = {**ACTING, "train.steps": 3, "train.checkpoint_every": 1}
    adaptive = {**ADAPTIVE, "train.steps": 4, "train.checkpoint_every": 2}
    ahead_turns = {**AHEAD, "train.steps": 3, "train.eval_every": 0, "rollout.environment": f"{folder}/mine.py:Talk"}
    ahead_turns |= {"rollout.max_turns": 3, "rollout.max_new_tokens": 4}
    flat = [{"name": f"{folder}/mine.py:flat"}]
    two = [{"name": "countdown"}, {"name": f"{folder}/mine.py:digits", "weight": 0.5}]
    logging = [{"name": f"{folder}/mine.py:{name}"} for name in ("logs", "shows")]
    ahead_logs = {**AHEAD, "train.steps": 3, "rewards.functions": logging}
    twice = {"train.steps": 2, "grpo.num_iterations": 2}
    return [
        ("plain", {}),
        ("plain2", {"train.steps": 2}),
        ("lora", lora, "two_passes"),
        ("lora@2", lora, "two_passes"),
        ("synced", synced),
        ("synced@3", synced),
        *[(f"{kl}_{at}", {"train.steps": 2, "grpo.beta": 0.5, "grpo.kl": kl, "grpo.kl_in": at}) for kl, at in KL],
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
        ("ahead", AHEAD),
        ("ahead@2", AHEAD),
        ("ahead_turns", ahead_turns),
        ("ahead_turns@2", ahead_turns),
        ("ahead_logs", ahead_logs),
        ("ahead_logs@2", ahead_logs),
        ("unmoved", {"train.steps": 3, "train.learning_rate": 1e-30}),
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


def assert_resumed(left: Left, run: str, step: int) -> None:
    """From this step's checkpoint on, the run is the same to the bit: its metrics, its weights."""
    after = [line for line in left.metrics(run) if line["step"] > step]
    assert after and left.metrics(f"{run}_resumed") == after
    whole, parts = left.weights(run), left.weights(f"{run}_resumed")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


# ---- completions of the step before --------------------------------------------------------------------------------


@pytest.mark.runs("ahead", "ahead_resumed")
def test_ahead_resumes_bit_for_bit(left: Left) -> None:
    assert_resumed(left, "ahead", 2)
    for step in (3, 4):
        assert left.table("ahead", step) == left.table("ahead_resumed", step)


@pytest.mark.runs("ahead_turns", "ahead_turns_resumed")
def test_episodes_played_ahead_are_played_again_by_a_resumed_run(left: Left) -> None:
    """The environments' rewards follow from turns that the first process had played."""
    assert_resumed(left, "ahead_turns", 2)
    table = left.table("ahead_turns", 3)
    assert table == left.table("ahead_turns_resumed", 3)
    assert max(table["turns"]) > 1 and max(table["rewards/Talk"]) > 0


@pytest.mark.runs("ahead_logs", "ahead_logs_resumed")
def test_what_reward_functions_log_is_of_all_ranks_and_the_same_after_a_resume(left: Left) -> None:
    """One rank has 8 completions, the other 12: as in TRL a metric is the mean over calls, here one to a rank."""
    assert_resumed(left, "ahead_logs", 2)
    for line in left.metrics("ahead_logs")[1:]:
        table = left.table("ahead_logs", line["step"])
        assert table["length"] == [len(text) for text in table["completion"]]
        assert table["twelve"] == [None] * 8 + table["completion"][8:]
        of_ranks = [sum(lengths) / len(lengths) for lengths in (table["length"][:8], table["length"][8:])]
        assert line["mine/length"] == pytest.approx(sum(of_ranks) / 2)
        assert line["of_twelve"] == 3.0
    assert left.table("ahead_logs", 3) == left.table("ahead_logs_resumed", 3)


@pytest.mark.runs("ahead", "unmoved")
def test_ahead_samples_under_the_weights_before_and_corrects_for_it(left: Left) -> None:
    """The second step's completions are the start model's, though the first step moved it far."""
    assert left.table("ahead", 2)["completion_ids"] == left.table("unmoved", 2)["completion_ids"]
    assert left.table("ahead", 3)["completion_ids"] != left.table("unmoved", 3)["completion_ids"]
    _, first, second, *_ = left.metrics("ahead")  # the first line is the evaluation at the start
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(second["sampling/importance_sampling_ratio/mean"] - 1.0) > 1e-3
    assert second["sampling/sampling_logp_difference/max"] > 0.1
    assert second["ratio/max"] == 1.0  # the clip compares with the policy of now


# ---- LoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.runs("lora", "lora_resumed")
def test_lora_resumes_bit_for_bit(left: Left) -> None:
    assert_resumed(left, "lora", 2)
    assert left.update("lora").norm() > 0


@pytest.mark.runs("lora")
def test_lora_checkpoint_holds_no_frozen_weight(left: Left) -> None:
    folder = left.of("lora") / "checkpoints" / "step_000003" / "engine"
    size = sum(file.stat().st_size for file in folder.glob("*model_states.pt"))
    whole = sum(tensor.numel() * 4 for tensor in left.start_weights().values())
    assert 0 < size < whole / 2


@pytest.mark.runs("lora")
def test_lora_disagrees_and_its_reference_is_the_base_model_to_the_bit(left: Left) -> None:
    lines = left.metrics("lora")
    assert lines[0]["disagreement/mean"] > 0
    assert lines[0]["kl"] == 0.0 and lines[1]["kl"] > 0.0
    with torch.no_grad():
        base = load_causal_lm("starter")(input_ids=PROMPT).logits
    for probe in left.probes("lora"):
        assert torch.equal(probe["reference"], base)
        assert not torch.equal(probe["logits"], base)


@pytest.mark.runs("{run}")
@pytest.mark.parametrize("run", ["plain", "lora"])
def test_export_has_the_logits_of_the_trained_model(left: Left, run: str) -> None:
    from transformers import AutoModelForCausalLM

    path = left.of(run) / "model"
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path)(input_ids=PROMPT).logits
        ours = load_causal_lm(str(path))(input_ids=PROMPT).logits
    tolerance = 1e-5 if run == "lora" else 0.0  # merging adapters rounds
    for probe in left.probes(run):
        torch.testing.assert_close(ours, probe["logits"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(theirs, probe["logits"], rtol=1e-5, atol=1e-5)  # other matrix products


# ---- reference -----------------------------------------------------------------------------------------------------


@pytest.mark.runs("{kind}_{place}", "plain2")
@pytest.mark.parametrize(("kind", "place"), KL)
def test_kl_of_the_unchanged_policy_is_exactly_zero(left: Left, kind: str, place: str) -> None:
    first, second = left.metrics(f"{kind}_{place}")
    assert first["kl"] == 0.0
    assert second["kl"] != 0.0
    assert first["loss"] == pytest.approx(left.metrics("plain2")[0]["loss"], abs=1e-9)


@pytest.mark.runs("plain2", *(f"{kind}_{place}" for kind, place in KL))
def test_every_kl_acts_and_differs(left: Left) -> None:
    runs = ["plain2", *[f"{kind}_{place}" for kind, place in KL]]
    for one, other in combinations(runs, 2):
        assert left.distance(left.update(one), left.update(other)) > 1e-4, (one, other)


@pytest.mark.runs("k1_reward", "plain2")
def test_kl_in_the_reward_is_in_the_advantages(left: Left) -> None:
    def of(run: str, step: int) -> list[float]:
        return left.table(run, step)["advantage"]

    assert of("k1_reward", 1) == of("plain2", 1)
    assert of("k1_reward", 2) != of("plain2", 2)


@pytest.mark.runs("synced", "synced_resumed")
def test_synchronised_reference_is_the_policy_and_survives_a_resume(left: Left) -> None:
    kl = [line["kl"] for line in left.metrics("synced")]
    assert kl[0] == 0.0 and kl[1] > 0.0 and kl[2] == 0.0 and kl[3] > 0.0
    assert_resumed(left, "synced", 3)
    for whole, parts in zip(left.probes("synced"), left.probes("synced_resumed"), strict=True):
        assert torch.equal(whole["logits"], parts["logits"])
        assert torch.equal(whole["reference"], parts["reference"])
    checkpoints = left.of("synced") / "checkpoints"
    assert (checkpoints / "step_000002" / "reference.safetensors").is_file()


# ---- options of the loss and the batch -----------------------------------------------------------------------------


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


@pytest.mark.runs("ahead")
def test_every_phase_has_its_speed_and_share(left: Left) -> None:
    line = json.loads((left.of("ahead") / "metrics.jsonl").read_text().splitlines()[1])
    for phase in ("rollout", "disagreement", "update"):
        rate = line["step_tokens"] / line[f"time/{phase}"]
        assert line[f"tokens_per_second/{phase}"] == pytest.approx(rate)
        assert line[f"step_time_share/{phase}"] == pytest.approx(line[f"time/{phase}"] / line["step_time"])


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
