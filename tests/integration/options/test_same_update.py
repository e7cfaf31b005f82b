"""One update however it is computed: loss by loss, under every configuration and precision, or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from vdr_cli.config.schema import GrpoConfig

pytestmark = pytest.mark.timeout(1800)

Left = Any
"""The results of the runs (conftest.py)."""
Run = tuple[Any, ...]
"""(name, what differs from BASE in conftest.py), and in some a third: the fault that is planted."""

BY_NAME = ("zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz")
FAULTS = [("inf", 1.0, "zero1"), ("nan", 0.0, "zero2"), ("inf", 1.0, "zero3"), ("nan", 0.0, "zero3")]
"""Losses that are not finite, on one of two ranks (tests/engine has both on one rank under every stage)."""
LOSSES = get_args(GrpoConfig.model_fields["loss"].annotation)
IN_PROPORTION = {"train.adam_epsilon": 1.0, "train.learning_rate": 1.0}
"""AdamW's step is then the gradient's multiple. At 1e-8 it is g / |g|, which is rounding wherever g is all but 0."""
EVERY_TERM = {
    **IN_PROPORTION,
    "grpo.beta": 0.1,
    "grpo.entropy_weight": 0.01,
    "grpo.mask_truncated": True,
    "grpo.num_iterations": 2,
    "train.steps": 2,
}
MINIBATCHES = {**EVERY_TERM, "grpo.num_iterations": 1, "grpo.minibatches": 5, "train.steps": 5}
"""A group to a step: one of the two ranks has none."""
MUON = {"train.optimizer": "muon", "train.muon_learning_rate": 1e-3}
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "micro1": ({"train.micro_batch_size": 1}, ""),
    "shuffled": ({}, "shuffled"),
    "padded": ({}, "padded"),
    "two_passes": ({}, "two_passes"),
    "two_passes4": ({"train.micro_batch_size": 4}, "two_passes"),
    "onednn": ({}, "onednn"),
    "sequence": ({"engine.sequence_parallel": 2}, ""),
    "sequence_micro2": ({"engine.sequence_parallel": 2, "train.micro_batch_size": 2}, "padded"),
}
"""Ways to compute the same update: what differs in the settings, and what is planted."""
SAME_UPDATE = [*[("dapo", how) for how in OTHERWISE], *[("gspo", how) for how in ("two_passes4", "sequence_micro2")]]
"""A token's loss in every way and a sequence's in those that change most; the other losses on one rank, whose
micro-batches differ from those of two ranks (tests/grpo has all ways of each)."""


def training_runs() -> list[Run]:
    consulted = {"disagreement.mode": "end_of_sequence", "grpo.beta": 0.1, "grpo.kl_in": "reward", "train.steps": 2}
    top = {**consulted, **IN_PROPORTION, "disagreement.scope": "last_k", "disagreement.last_k": 2}
    refuse = {**top, "train.max_refused_steps": 2, "train.steps": 4, "engine.ds_config": "zero3"}
    refuse["train.checkpoint_every"] = 100
    muon = {**MUON, "train.steps": 2, "train.checkpoint_every": 1}
    return [
        ("plain", {}),
        *[(f"by_name_{name}", {"engine.ds_config": name}) for name in BY_NAME],
        ("checkpointing", {"model.gradient_checkpointing": True, "grpo.beta": 0.1}),
        ("bfloat16", {"model.dtype": "bfloat16"}),
        *[
            (f"{fault}_{stage}_clip{clip}", {"engine.ds_config": stage, "train.max_grad_norm": clip}, fault)
            for fault, clip, stage in FAULTS
        ],
        ("refused", refuse, "nan"),
        *[
            (f"members{M}", {"train.steps": 3, "disagreement.mode": "per_token", "disagreement.members": M})
            for M in (2, 32)
        ],
        ("members0", {"train.steps": 3}),
        ("recorded", top),
        ("unrecorded", top, "unrecorded"),
        ("muon_two", muon),
        ("muon_two@1", muon),
        ("minibatches_two", MINIBATCHES),
        ("minibatches_micro1", {**MINIBATCHES, "train.micro_batch_size": 1}),
        *[(f"{loss}_two", {**EVERY_TERM, "grpo.loss": loss}) for loss in LOSSES],
        *[
            (f"{loss}_{how}", {**EVERY_TERM, "grpo.loss": loss, **OTHERWISE[how][0]}, OTHERWISE[how][1])
            for loss, how in SAME_UPDATE
        ],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(work_through: Callable[..., Left], chosen: Any, tmp_path_factory: pytest.TempPathFactory) -> Left:
    alone = [
        ("alone", {}),
        ("minibatches_alone", MINIBATCHES),
        ("muon_alone", {**MUON, "train.steps": 2}),
        *[(f"{loss}_alone", {**EVERY_TERM, "grpo.loss": loss}) for loss in LOSSES],
    ]
    return work_through(tmp_path_factory.mktemp("same_update"), chosen(training_runs()), chosen(alone))


def test_every_run_ends_well_but_the_endless_refusal(left: Left) -> None:
    assert {name for name, code in left.ended.items() if code != "0"} == {"refused"} & left.ended.keys()


@pytest.mark.runs("checkpointing")
def test_kl_of_the_unchanged_policy_is_zero_with_gradient_checkpointing_too(left: Left) -> None:
    assert left.metrics("checkpointing")[0]["kl"] == 0.0


@pytest.mark.runs("{loss}_{how}", "{loss}_two")
@pytest.mark.parametrize(("loss", "how"), [*SAME_UPDATE, *[(loss, "alone") for loss in LOSSES]])
def test_the_update_is_the_same_however_it_is_computed(left: Left, loss: str, how: str) -> None:
    """Two optimizer steps on one rollout; one rank has 12 rows, the other 8, of unequal lengths."""
    ours, plain = f"{loss}_{how}", f"{loss}_two"
    assert left.distance(left.gradient(ours), left.gradient(plain)) <= 1e-5
    assert left.distance(left.update(ours), left.update(plain)) <= 1e-5
    for line, other in zip(left.metrics(ours), left.metrics(plain), strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.runs("minibatches_two", "minibatches_micro1", "minibatches_alone")
@pytest.mark.parametrize("how", ["alone", "micro1"])
def test_minibatches_are_the_same_on_any_number_of_ranks(left: Left, how: str) -> None:
    """To rounding: Adam's several steps divide it by small second moments, to just above 1e-5 on some CPUs."""
    ours, plain = f"minibatches_{how}", "minibatches_two"
    assert left.distance(left.gradient(ours), left.gradient(plain)) <= 1e-5
    assert left.distance(left.update(ours), left.update(plain)) <= 1e-4


@pytest.mark.runs("muon_two", "muon_alone", "muon_two_resumed")
def test_muon_is_the_same_on_two_ranks_and_after_a_resume(left: Left) -> None:
    """To the rounding of an orthogonalisation in float16 on one and two ranks; to the bit when resumed."""
    assert left.distance(left.gradient("muon_two"), left.gradient("muon_alone")) <= 1e-5
    assert left.distance(left.update("muon_two"), left.update("muon_alone")) <= 5e-2
    assert torch.equal(left.update("muon_two_resumed"), left.update("muon_two"))
    assert left.metrics("muon_two_resumed") == left.metrics("muon_two")[1:]


@pytest.mark.runs("dapo_two", "dapo_alone", "minibatches_two", "minibatches_alone")
@pytest.mark.parametrize("run", ["dapo", "minibatches"])
def test_every_logged_number_is_that_of_the_step_on_any_number_of_ranks(left: Left, run: str) -> None:
    """Ranks hold 8 and 12 completions of unequal lengths, so a mean of the ranks' means would be another number."""
    for two, one in zip(left.metrics(f"{run}_two"), left.metrics(f"{run}_alone"), strict=True):
        assert two.keys() == one.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name


@pytest.mark.runs("dapo_two", "kl_cov_two", "members2")
@pytest.mark.parametrize("run", ["dapo_two", "kl_cov_two", "members2"])
def test_every_logged_number_is_in_the_table_of_the_docs(left: Left, run: str) -> None:
    lines = (left.of(run) / "metrics.jsonl").read_text().splitlines()
    assert [name for name in json.loads(lines[-1]) if not is_documented(name)] == []


def is_documented(metric: str) -> bool:
    """True when the table of docs/metrics.md names it: in full, with <phase> or <name>, or by its end (`.../max`)."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page[page.index("| metric") : page.index("## Early")]
    named = {span for line in table.splitlines() for span in re.findall(r"`([^`]+)`", line.split(" | ")[0])}
    prefix, _, end = metric.rpartition("/")
    families = {f"{prefix}/<phase>", f"{prefix}/<name>", re.sub(r"^rewards/.*/", "rewards/<name>/", metric)}
    return bool(named & {metric, f".../{end}", *families}) or (f"{prefix}/..." in named and end in named)


@pytest.mark.runs("{run}", "plain")
@pytest.mark.parametrize("run", [*[f"by_name_{name}" for name in BY_NAME], "alone"])
def test_the_update_is_the_same_under_every_configuration(left: Left, run: str) -> None:
    assert left.distance(left.update(run), left.update("plain")) <= 1e-5
    assert left.metrics(run)[0]["grad_norm"] == pytest.approx(left.metrics("plain")[0]["grad_norm"], rel=1e-5)


@pytest.mark.runs("checkpointing", "plain")
def test_gradient_checkpointing_gives_the_same_gradient(left: Left) -> None:
    assert left.distance(left.gradient("checkpointing"), left.gradient("plain")) <= 1e-5


@pytest.mark.runs("alone", "plain")
def test_completions_do_not_depend_on_the_number_of_ranks(left: Left) -> None:
    one, two = left.table("alone"), left.table("plain")
    assert one["completion_ids"] == two["completion_ids"] and one["row"] == two["row"]


@pytest.mark.runs("bfloat16")
def test_bfloat16_trains(left: Left) -> None:
    (line,) = left.metrics("bfloat16")
    assert line["refused_steps"] == 0 and line["ratio/max"] == 1.0
    assert next(iter(left.weights("bfloat16").values())).dtype == torch.bfloat16
    assert left.update("bfloat16").norm() > 0


@pytest.mark.runs(*(f"members{M}" for M in (2, 32, 0)))
def test_gathers_do_not_depend_on_the_number_of_members(left: Left) -> None:
    """Nor their bytes; without a bonus there may be one gather less, of one copy of the weights at most."""

    def last_step(run: str) -> tuple[int, int]:
        (counts, other) = (probe["gathers"] for probe in left.probes(run))
        assert counts == other
        return counts[-1][0] - counts[-2][0], counts[-1][1] - counts[-2][1]

    two, many, none = (last_step(f"members{M}") for M in (2, 32, 0))
    assert two == many
    assert none[0] > 0 and many[0] - none[0] <= 1
    weights = sum(tensor.nbytes for tensor in left.weights("members2").values())
    assert none[1] > weights and many[1] - none[1] <= 1.1 * weights


@pytest.mark.runs("recorded", "unrecorded")
def test_states_recorded_while_sampling_are_those_of_a_pass_of_their_own(left: Left) -> None:
    recorded, again = left.table("recorded"), left.table("unrecorded")
    assert recorded["completion"] == again["completion"]
    torch.testing.assert_close(torch.tensor(recorded["bonus"]), torch.tensor(again["bonus"]), rtol=1e-3, atol=1e-4)
    assert max(abs(bonus) for bonus in recorded["bonus"]) > 0
    assert left.distance(left.update("recorded"), left.update("unrecorded")) <= 1e-5


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.runs("{fault}_{stage}_clip{clip}")
@pytest.mark.parametrize(("fault", "clip", "stage"), FAULTS)
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_weight(
    left: Left, fault: str, clip: float, stage: str
) -> None:
    run = f"{fault}_{stage}_clip{clip}"
    (line,) = left.metrics(run)
    assert line["refused_steps"] == 1 and line["grad_norm"] is None  # infinite
    assert left.update(run).norm() == 0.0


@pytest.mark.runs("refused")
def test_refusals_without_end_stop_the_run_and_save_the_batch(left: Left) -> None:
    assert left.ended["refused"].startswith("DataError: 2 steps in a row")
    assert len(left.metrics("refused")) == 2
    for rank in range(2):
        saved = torch.load(left.of("refused") / f"refused_batch_rank{rank}.pt", weights_only=False)
        assert len(saved["batch"]) in (8, 12)
    assert (left.of("refused") / "checkpoints" / "step_000002").is_dir()
