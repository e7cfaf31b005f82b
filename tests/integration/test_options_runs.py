"""Every option of the loop in real runs: two ranks, five groups, ZeRO-3 with every parameter partitioned.

One pair of processes works through all runs (options_worker.py); the tests read what they left.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.config.schema import GrpoConfig
from vdr_cli.grpo.advantages import Moments, normalised_sum, standardise
from vdr_cli.models.loading import load_causal_lm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

WORKER = Path(__file__).with_name("options_worker.py")
PROMPT = torch.tensor([[3, 4, 5, 6, 7, 8]])
BASE = {
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 7,
    "train.learning_rate": 2e-4,
    "train.prompts_per_step": 5,
    "train.micro_batch_size": 8,
    "train.steps": 1,
    "disagreement.mode": "none",
    "observe.tensorboard": False,
    "observe.completions_every": 1,
    "observe.report": False,
    "observe.live": "off",
}
LORA = {"rank": 4, "alpha": 8}
PER_TOKEN = {"disagreement.mode": "per_token", "disagreement.members": 4}
AHEAD = {
    "rollout.ahead": 1,
    "train.learning_rate": 5e-3,
    "train.checkpoint_every": 2,
    "train.eval_every": 2,
    "train.eval_prompts": 3,
    "disagreement.mode": "end_of_sequence",
}
REWARDS = """
def flat(completions, **_):
    return [0.5] * len(completions)

def digits(completions, **_):
    return [100.0 * sum(c.isdigit() for c in text) for text in completions]
"""

Run = tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], str]
KL = [("k2", "loss"), ("k3", "loss"), ("k1", "reward"), ("k2", "reward"), ("k3", "reward")]
STAGES = ("zero1", "zero2", "zero3")
BY_NAME = (*STAGES, "zero3_offload")
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
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "micro1": ({"train.micro_batch_size": 1}, ""),
    "micro2": ({"train.micro_batch_size": 2}, ""),
    "micro4": ({"train.micro_batch_size": 4}, ""),
    "shuffled": ({}, "shuffled"),
    "padded": ({}, "padded"),
}
"""Ways to compute the same update: what differs in the settings, and what is planted."""
SAME_UPDATE = [(loss, how) for loss in LOSSES for how in OTHERWISE if how == "micro1" or loss in ("dapo", "gspo")]
"""Every loss in other micro-batches; a token's and a sequence's in every way (tests/grpo has all of each)."""


def training_runs(folder: Path) -> list[Run]:
    """(run directory, what differs from BASE) in order; the same directory again: resumed. Third: a planted fault."""
    lora = {**PER_TOKEN, "model.lora": LORA, "grpo.beta": 0.1}
    synced = {**PER_TOKEN, "grpo.beta": 0.1, "grpo.sync_reference_every": 2, "train.checkpoint_every": 2}
    flat = [{"name": f"{folder}/mine.py:flat"}]
    two = [{"name": "countdown"}, {"name": f"{folder}/mine.py:digits", "weight": 0.5}]
    twice = {"train.steps": 2, "grpo.num_iterations": 2}
    consulted = {"disagreement.mode": "end_of_sequence", "grpo.beta": 0.1, "grpo.kl_in": "reward", "train.steps": 2}
    refuse = {"train.max_refused_steps": 2, "train.steps": 4, "engine.ds_config": "zero3"}
    return [
        ("plain", {}),
        ("plain2", {"train.steps": 2}),
        ("lora", {**lora, "train.steps": 3, "train.checkpoint_every": 2}),
        ("lora_parts", {**lora, "train.steps": 2}),
        ("lora_parts", {**lora, "train.steps": 3}),
        ("synced", {**synced, "train.steps": 4}),
        ("synced_parts", {**synced, "train.steps": 3}),
        ("synced_parts", {**synced, "train.steps": 4}),
        *[(f"{kl}_{at}", {"train.steps": 2, "grpo.beta": 0.5, "grpo.kl": kl, "grpo.kl_in": at}) for kl, at in KL],
        ("iterations", twice),
        ("resample", {"grpo.resample_groups": 3}),
        ("quantile", {"grpo.top_entropy_quantile": 0.2}),
        ("entropy", {**twice, "grpo.entropy_weight": 1.0, "rewards.functions": flat}),
        ("no_entropy", {"rewards.functions": flat}),
        ("truncated", {"grpo.mask_truncated": True, "rollout.max_new_tokens": 6, "grpo.top_entropy_quantile": 0.3}),
        ("overlong", {"grpo.overlong_cache": 3}),
        ("capped", {"grpo.importance_cap": 0.5, "train.max_grad_norm": 0.0}),
        ("ahead", {**AHEAD, "train.steps": 4}),
        ("ahead_parts", {**AHEAD, "train.steps": 2}),
        ("ahead_parts", {**AHEAD, "train.steps": 4}),
        ("unmoved", {"train.steps": 3, "train.learning_rate": 1e-30}),
        ("normalised", {"grpo.multi_reward": "normalise_then_sum", "rewards.functions": two}),
        ("masked", {}, "masked"),
        *[(f"by_name_{name}", {"engine.ds_config": name}) for name in BY_NAME],
        ("checkpointing", {"model.gradient_checkpointing": True, "grpo.beta": 0.1}),
        ("bfloat16", {"model.dtype": "bfloat16"}),
        *[
            (f"{fault}_{stage}_clip{clip}", {"engine.ds_config": stage, "train.max_grad_norm": clip}, fault)
            for fault, clip in (("nan", 0.0), ("inf", 1.0))
            for stage in STAGES
        ],
        ("refused", refuse, "nan"),
        *[
            (f"members{M}", {"train.steps": 3, "disagreement.mode": "per_token", "disagreement.members": M})
            for M in (2, 8, 32)
        ],
        ("members0", {"train.steps": 3}),
        ("whole_copy", {**consulted, **IN_PROPORTION}),
        ("by_layers", {**consulted, **IN_PROPORTION, "engine.copy_of_weights": "layers"}),
        *[(f"{loss}_two", {**EVERY_TERM, "grpo.loss": loss}) for loss in LOSSES],
        *[
            (f"{loss}_{how}", {**EVERY_TERM, "grpo.loss": loss, **OTHERWISE[how][0]}, OTHERWISE[how][1])
            for loss, how in SAME_UPDATE
        ],
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work_through(folder: Path, runs: list[Run], ranks: int) -> dict[str, str]:
    """All runs in order, on so many ranks; run → its exit code, or its error."""
    seen: set[str] = set()
    entries = []
    for name, settings, *rest in runs:
        full = {**BASE, "engine.ds_config": f"{folder}/sharded.json", **settings, "train.output": f"{folder}/{name}"}
        plant = rest[0] if rest else None
        entries.append({"name": name, "settings": full, "resume": "auto" if name in seen else None, "plant": plant})
        seen.add(name)
    listed = folder / f"runs_{ranks}.json"
    listed.write_text(json.dumps(entries))
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in place.items()}}
        log = (folder / f"log_{ranks}_{rank}").open("w")
        command = [sys.executable, str(WORKER), str(listed)]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=1700) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"log_{ranks}_{rank}").read_text() for rank in range(ranks)]
    assert not any(codes), "\n".join(log[-4000:] for log in logs)
    lines = [line.split(" ", 2) for line in logs[0].splitlines() if line.startswith("ended ")]
    return {name: code for _, name, code in lines}


class Left:
    """What the runs left."""

    def __init__(self, folder: Path, ended: dict[str, str]) -> None:
        self.folder, self.ended = folder, ended

    def metrics(self, run: str) -> list[dict[str, Any]]:
        clocked = ("time/", "step_time", "tokens_per_second", "memory")
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines]

    def weights(self, run: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / run / "model" / "model.safetensors")

    def update(self, run: str) -> Tensor:
        """Every weight's change, in one vector."""
        start, after = start_weights(), self.weights(run)
        return torch.cat([(after[name].double() - start[name].double()).flatten() for name in start])

    def gradient(self, run: str) -> Tensor:
        """Of the first step, over all ranks and before clipping, in one vector."""
        gradient = self.probes(run, ranks=1)[0]["gradient"]
        return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])

    def probes(self, run: str, ranks: int = 2) -> list[dict[str, Any]]:
        return [torch.load(self.folder / run / f"probe_rank{rank}.pt") for rank in range(ranks)]

    def table(self, run: str, step: int = 1) -> dict[str, list[Any]]:
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / run / "completions" / f"step_{step:06d}.parquet").to_pydict()

    def state(self, run: str, step: int = 1) -> dict[str, Any]:
        return json.loads((self.folder / run / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())


def start_weights() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from vdr_cli.starter.paths import model_path

    return {name: tensor.float() for name, tensor in load_file(model_path() / "model.safetensors").items()}


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: with two a product's last bit may be another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("options")
    (folder / "mine.py").write_text(REWARDS)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    autos = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    (folder / "sharded.json").write_text(json.dumps({"zero_optimization": {**zero, **autos}}))
    ended = work_through(folder, training_runs(folder), ranks=2)
    alone = [(f"{loss}_alone", {**EVERY_TERM, "grpo.loss": loss}) for loss in LOSSES]
    ended |= work_through(folder, [("alone", {}), *alone], ranks=1)
    return Left(folder, ended)


def test_every_run_ends_well_but_the_endless_refusal(left: Left) -> None:
    assert {name for name, code in left.ended.items() if code != "0"} == {"refused"}


# ---- completions of the step before -----------------------------------------------------------------------------


def test_ahead_resumes_bit_for_bit(left: Left) -> None:
    assert left.metrics("ahead") == left.metrics("ahead_parts")
    for step in range(1, 5):
        assert left.table("ahead", step) == left.table("ahead_parts", step)
    whole, parts = left.weights("ahead"), left.weights("ahead_parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_ahead_samples_under_the_weights_before_and_corrects_for_it(left: Left) -> None:
    """The second step's completions are the start model's, though the first step moved it far."""
    assert left.table("ahead", 2)["completion_ids"] == left.table("unmoved", 2)["completion_ids"]
    assert left.table("ahead", 3)["completion_ids"] != left.table("unmoved", 3)["completion_ids"]
    _, first, second, *_ = left.metrics("ahead")  # the first line is the evaluation at the start
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(second["sampling/importance_sampling_ratio/mean"] - 1.0) > 1e-3
    assert second["sampling/sampling_logp_difference/max"] > 0.1
    assert second["ratio/max"] == 1.0  # the clip compares with the policy of now


# ---- LoRA ----------------------------------------------------------------------------------------------------


def test_lora_resumes_bit_for_bit(left: Left) -> None:
    assert left.metrics("lora") == left.metrics("lora_parts")
    whole, parts = left.weights("lora"), left.weights("lora_parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert left.update("lora").norm() > 0


def test_lora_checkpoint_holds_no_frozen_weight(left: Left) -> None:
    folder = left.folder / "lora" / "checkpoints" / "step_000003" / "engine"
    size = sum(file.stat().st_size for file in folder.glob("*model_states.pt"))
    whole = sum(tensor.numel() * 4 for tensor in start_weights().values())
    assert 0 < size < whole / 2


def test_lora_disagrees_and_its_reference_is_the_base_model_to_the_bit(left: Left) -> None:
    lines = left.metrics("lora")
    assert lines[0]["disagreement/mean"] > 0
    assert lines[0]["kl"] == 0.0 and lines[1]["kl"] > 0.0
    with torch.no_grad():
        base = load_causal_lm("starter")(input_ids=PROMPT).logits
    for probe in left.probes("lora"):
        assert torch.equal(probe["reference"], base)
        assert not torch.equal(probe["logits"], base)


@pytest.mark.parametrize("run", ["plain", "lora"])
def test_export_has_the_logits_of_the_trained_model(left: Left, run: str) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(left.folder / run / "model")
    with torch.no_grad():
        logits = loaded(input_ids=PROMPT).logits
    tolerance = 1e-5 if run == "lora" else 0.0  # merging adapters rounds
    for probe in left.probes(run):
        torch.testing.assert_close(logits, probe["logits"], rtol=tolerance, atol=tolerance)


# ---- reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "place"), KL)
def test_kl_of_the_unchanged_policy_is_exactly_zero(left: Left, kind: str, place: str) -> None:
    first, second = left.metrics(f"{kind}_{place}")
    assert first["kl"] == 0.0
    assert second["kl"] != 0.0
    assert first["loss"] == pytest.approx(left.metrics("plain2")[0]["loss"], abs=1e-9)


def test_kl_of_the_unchanged_policy_is_zero_with_gradient_checkpointing_too(left: Left) -> None:
    assert left.metrics("checkpointing")[0]["kl"] == 0.0


def test_every_kl_acts_and_differs(left: Left) -> None:
    runs = ["plain2", *[f"{kind}_{place}" for kind, place in KL]]
    for one, other in combinations(runs, 2):
        assert distance(left.update(one), left.update(other)) > 1e-4, (one, other)


def test_kl_in_the_reward_is_in_the_advantages(left: Left) -> None:
    def of(run: str, step: int) -> list[float]:
        return left.table(run, step)["advantage"]

    assert of("k1_reward", 1) == of("plain2", 1)
    assert of("k1_reward", 2) != of("plain2", 2)


def test_synchronised_reference_is_the_policy_and_survives_a_resume(left: Left) -> None:
    kl = [line["kl"] for line in left.metrics("synced")]
    assert kl[0] == 0.0 and kl[1] > 0.0 and kl[2] == 0.0 and kl[3] > 0.0
    assert left.metrics("synced") == left.metrics("synced_parts")
    for whole, parts in zip(left.probes("synced"), left.probes("synced_parts"), strict=True):
        assert torch.equal(whole["logits"], parts["logits"])
        assert torch.equal(whole["reference"], parts["reference"])
    checkpoints = left.folder / "synced" / "checkpoints"
    assert (checkpoints / "step_000002" / "reference.safetensors").is_file()


# ---- options of the loss and the batch -------------------------------------------------------------------------


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


def test_resampling_leaves_fewer_groups_without_signal(left: Left) -> None:
    (with_it,), (without,) = left.metrics("resample"), left.metrics("plain")
    assert with_it["frac_reward_zero_std"] < without["frac_reward_zero_std"]
    assert left.state("resample")["loop"]["drawn"] > 5
    assert len(left.table("resample")["prompt"]) == 20


def test_top_entropy_quantile_keeps_the_share_of_highest_entropy(left: Left) -> None:
    calls = [call for probe in left.probes("quantile") for call in probe["calls"]]
    mask = torch.cat([call["mask"].flatten() for call in calls])
    selected = torch.cat([call["selected"].flatten() for call in calls])[mask]
    entropy = torch.cat([call["entropy"].flatten() for call in calls])[mask]
    threshold, share = entropy[selected].min(), round(0.2 * int(mask.sum()))
    assert threshold > entropy[~selected].max()
    assert int((entropy > threshold).sum()) < share <= int(selected.sum())  # equal completions give ties
    assert distance(left.update("quantile"), left.update("plain")) > 1e-3


def test_entropy_weight_raises_entropy_without_any_reward(left: Left) -> None:
    assert left.update("no_entropy").norm() == 0.0

    calls = [probe["calls"] for probe in left.probes("entropy")]  # two iterations on the same completions
    before = sum(float(call["entropy"].sum()) for each in calls for call in each[: len(each) // 2])
    after = sum(float(call["entropy"].sum()) for each in calls for call in each[len(each) // 2 :])
    assert after > before * 1.001


def test_truncated_completions_give_no_gradient(left: Left) -> None:
    truncated = sum(left.table("truncated")["truncated"])
    assert 0 < truncated < 20
    masks = [call["mask"] for probe in left.probes("truncated") for call in probe["calls"]]
    counted = torch.cat([mask.any(dim=1) for mask in masks])
    assert int(counted.sum()) == 20 - truncated


def test_the_share_of_high_entropy_is_of_the_tokens_that_are_trained_on(left: Left) -> None:
    calls = [call for probe in left.probes("truncated") for call in probe["calls"]]
    mask, selected, entropy = (
        torch.cat([call[name].flatten() for call in calls]) for name in ("mask", "selected", "entropy")
    )
    highest = entropy[mask].sort(descending=True).values
    smallest = highest[round(0.3 * len(highest)) - 1]
    assert torch.equal(selected[mask], entropy[mask] >= smallest)


def test_overlong_completions_are_penalised(left: Left) -> None:
    table = left.table("overlong")
    for ids, reward, task in zip(table["completion_ids"], table["reward"], table["rewards/countdown"], strict=True):
        assert reward - task == pytest.approx(min(0.0, max(-1.0, (7 - 3 - len(ids)) / 3)), abs=1e-6)
    assert any(reward != task for reward, task in zip(table["reward"], table["rewards/countdown"], strict=True))


def test_importance_cap_scales_the_gradient(left: Left) -> None:
    (capped,), (plain,) = left.metrics("capped"), left.metrics("plain")
    assert capped["grad_norm"] == pytest.approx(0.5 * plain["grad_norm"], rel=1e-4)
    assert capped["sampling/importance_sampling_ratio/mean"] == pytest.approx(0.5)


def test_normalise_then_sum_is_its_formula(left: Left) -> None:
    table = left.table("normalised")
    rewards = torch.tensor([table["rewards/countdown"], table["rewards/digits"]]).T
    scores = normalised_sum(rewards, torch.tensor([1.0, 0.5]), 4)
    expected = standardise(scores, Moments.of(scores))
    torch.testing.assert_close(torch.tensor(table["advantage"]), expected, rtol=1e-5, atol=1e-6)


def test_a_rank_with_only_masked_micro_batches_stays_in_step(left: Left) -> None:
    first, second = left.probes("masked")
    assert not any(bool(call["mask"].any()) for call in first["calls"])
    assert any(bool(call["mask"].any()) for call in second["calls"])
    assert torch.equal(first["logits"], second["logits"])
    assert left.update("masked").norm() > 0


# ---- ZeRO stages, precision, invariances ------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "how"), [*SAME_UPDATE, *[(loss, "alone") for loss in LOSSES]])
def test_the_update_is_the_same_however_it_is_computed(left: Left, loss: str, how: str) -> None:
    """Of two optimizer steps on one rollout; one rank has 12 rows, the other 8, of unequal lengths."""
    ours, plain = f"{loss}_{how}", f"{loss}_two"
    assert distance(left.gradient(ours), left.gradient(plain)) <= 1e-5
    assert distance(left.update(ours), left.update(plain)) <= 1e-5
    for line, other in zip(left.metrics(ours), left.metrics(plain), strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("run", [*[f"by_name_{name}" for name in BY_NAME], "alone"])
def test_the_update_is_the_same_under_every_configuration(left: Left, run: str) -> None:
    assert distance(left.update(run), left.update("plain")) <= 1e-5
    assert left.metrics(run)[0]["grad_norm"] == pytest.approx(left.metrics("plain")[0]["grad_norm"], rel=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient(left: Left) -> None:
    assert distance(left.gradient("checkpointing"), left.gradient("plain")) <= 1e-5


def test_completions_do_not_depend_on_the_number_of_ranks(left: Left) -> None:
    one, two = left.table("alone"), left.table("plain")
    assert one["completion_ids"] == two["completion_ids"] and one["row"] == two["row"]


def test_every_phase_has_its_speed_and_share(left: Left) -> None:
    line = json.loads((left.folder / "ahead" / "metrics.jsonl").read_text().splitlines()[1])
    for phase in ("rollout", "disagreement", "update"):
        rate = line["step_tokens"] / line[f"time/{phase}"]
        assert line[f"tokens_per_second/{phase}"] == pytest.approx(rate)
        assert line[f"step_time_share/{phase}"] == pytest.approx(line[f"time/{phase}"] / line["step_time"])


def test_bfloat16_trains(left: Left) -> None:
    (line,) = left.metrics("bfloat16")
    assert line["refused_steps"] == 0 and line["ratio/max"] == 1.0
    assert next(iter(left.weights("bfloat16").values())).dtype == torch.bfloat16
    assert left.update("bfloat16").norm() > 0


def test_gathers_do_not_depend_on_the_number_of_members(left: Left) -> None:
    """Nor their bytes; without a bonus there may be one gather less, of one copy of the weights at most."""

    def last_step(run: str) -> tuple[int, int]:
        (counts, other) = (probe["gathers"] for probe in left.probes(run))
        assert counts == other
        return counts[-1][0] - counts[-2][0], counts[-1][1] - counts[-2][1]

    two, eight, many, none = (last_step(f"members{M}") for M in (2, 8, 32, 0))
    assert two == eight == many
    assert none[0] > 0 and many[0] - none[0] <= 1
    weights = sum(tensor.nbytes for tensor in left.weights("members8").values())
    assert none[1] > weights and many[1] - none[1] <= 1.1 * weights


def test_one_layer_at_a_time_is_the_same_run(left: Left) -> None:
    """Sampling, ensemble, reference and log-probabilities where no copy of the weights is ever whole."""
    whole, layers = left.table("whole_copy"), left.table("by_layers")
    assert layers["completion"] == whole["completion"]
    torch.testing.assert_close(
        torch.tensor(layers["advantage"]), torch.tensor(whole["advantage"]), rtol=1e-3, atol=1e-4
    )
    assert distance(left.gradient("by_layers"), left.gradient("whole_copy")) <= 1e-5
    assert max(abs(bonus) for bonus in layers["bonus"]) > 0
    assert left.ended["by_layers"] == "0"
    assert distance(left.update("by_layers"), left.update("whole_copy")) <= 1e-5


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["nan_{}_clip0.0", "inf_{}_clip1.0"])
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_weight(left: Left, fault: str, stage: str) -> None:
    run = fault.format(stage)
    (line,) = left.metrics(run)
    assert line["refused_steps"] == 1 and line["grad_norm"] is None  # infinite
    assert left.update(run).norm() == 0.0


def test_refusals_without_end_stop_the_run_and_save_the_batch(left: Left) -> None:
    assert left.ended["refused"].startswith("DataError: 2 steps in a row")
    assert len(left.metrics("refused")) == 2
    for rank in range(2):
        saved = torch.load(left.folder / "refused" / f"refused_batch_rank{rank}.pt", weights_only=False)
        assert len(saved["batch"]) in (8, 12)
    assert (left.folder / "refused" / "checkpoints" / "step_000002").is_dir()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": {"steps": 3}, "grpo": {"num_iterations": 2}}, "train.steps 3 is not a multiple"),
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
