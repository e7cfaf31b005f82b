"""LoRA, the reference and the KL in real runs: two ranks, five groups, ZeRO-3 with every parameter partitioned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch

from tests.integration.options.conftest import Left, Run, assert_resumed
from vdr_cli.models.loading import load_causal_lm

pytestmark = pytest.mark.timeout(1800)

PROMPT = torch.tensor([[3, 4, 5, 6, 7, 8]])
LORA = {"rank": 4, "alpha": 8}
PER_TOKEN = {"disagreement.mode": "per_token", "disagreement.members": 4}
KL = [("k2", "loss"), ("k3", "loss"), ("k1", "reward"), ("k2", "reward"), ("k3", "reward")]


def training_runs() -> list[Run]:
    """In order."""
    lora = {**PER_TOKEN, "model.lora": LORA, "grpo.beta": 0.1, "train.steps": 3, "train.checkpoint_every": 1}
    synced = {**PER_TOKEN, "grpo.beta": 0.1, "grpo.sync_reference_every": 2, "train.checkpoint_every": 1}
    synced["train.steps"] = 4
    return [
        ("plain", {}),
        ("plain2", {"train.steps": 2}),
        ("lora", lora, "two_passes"),
        ("lora@2", lora, "two_passes"),
        ("synced", synced),
        ("synced@3", synced),
        *[(f"{kl}_{at}", {"train.steps": 2, "grpo.beta": 0.5, "grpo.kl": kl, "grpo.kl_in": at}) for kl, at in KL],
    ]


@pytest.fixture(scope="module")
def trained(work_through: Callable[..., Left], chosen: Any, tmp_path_factory: pytest.TempPathFactory) -> Left:
    return work_through(tmp_path_factory.mktemp("reference"), chosen(training_runs()))


def test_every_run_ends_well(left: Left) -> None:
    assert set(left.ended.values()) == {"0"}


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
