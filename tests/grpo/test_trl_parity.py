"""The same tensors through TRL's loss and ours, for every variant that both have. docs/losses.md has the differences.

TRL's method is called on an object without its constructor: only what `_compute_loss` reads is there, and the
log-probabilities are given instead of computed.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vdr_cli.config import GrpoConfig
from vdr_cli.grpo.advantages import (
    Moments,
    combine_rewards,
    group_advantages,
    normalised_sum,
    standardise,
)
from vdr_cli.grpo.losses import LossInputs, PolicyOutputs, Totals, entropy_threshold, policy_loss, token_weights

trl = pytest.importorskip("trl.trainer.grpo_trainer")

B, T, T_MAX = 8, 6, 10


def data(seed: int = 0, full: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((B,), T) if full else torch.randint(1, T + 1, (B,), generator=generator)
    logps = -torch.rand(B, T, generator=generator) * 3
    return {
        "logps": logps,
        "old": logps + 0.5 * torch.randn(B, T, generator=generator),
        "ref": logps + 0.4 * torch.randn(B, T, generator=generator),
        "sampler": logps + 0.5 * torch.randn(B, T, generator=generator),
        "entropy": torch.rand(B, T, generator=generator) * 2,
        "advantages": torch.randn(B, generator=generator),
        "mask": torch.arange(T)[None] < lengths[:, None],
    }


def theirs(d: dict[str, Tensor], cfg: GrpoConfig, loss_type: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    """TRL's loss of one optimizer step in one micro-batch on one rank, its gradient by log π, its metrics."""
    logps = d["logps"].clone().requires_grad_()
    args = SimpleNamespace(
        delta=cfg.delta,
        use_bias_correction_kl=False,
        sapo_temperature_pos=cfg.sapo_temperature_positive,
        sapo_temperature_neg=cfg.sapo_temperature_negative,
        steps_per_generation=1,
    )
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **_: x,
        num_processes=1,
    )
    trainer: Any = object.__new__(trl.GRPOTrainer)
    trainer.__dict__.update(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        beta=cfg.beta,
        epsilon_low=cfg.epsilon_low,
        epsilon_high=1 + cfg.epsilon_high if loss_type == "cispo" else cfg.epsilon_high,
        loss_type=loss_type,
        importance_sampling_level="sequence" if cfg.loss == "gspo" else "token",
        top_entropy_quantile=cfg.top_entropy_quantile,
        off_policy_mask_threshold=None,
        use_vllm=cfg.importance_cap is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=T_MAX,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=cfg.entropy_weight != 0,
        use_adaptive_entropy=False,
        entropy_coef=cfg.entropy_weight,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, d["entropy"], None),
    )
    accelerator.sync_gradients = True
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": d["mask"].long(),
        "advantages": d["advantages"],
        "old_per_token_logps": d["old"],
        "ref_per_token_logps": d["ref"],
        "num_items_in_batch": d["mask"].sum(),
    }
    if cfg.importance_cap is not None:
        difference = (d["old"] - d["sampler"]) * d["mask"]
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=cfg.importance_cap)
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logps)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradient, metrics


def ours(d: dict[str, Tensor], cfg: GrpoConfig) -> tuple[Tensor, Tensor, dict[str, float]]:
    logps = d["logps"].clone().requires_grad_()
    totals = Totals(completions=B, tokens=float(d["mask"].sum()))
    selected = None
    if cfg.top_entropy_quantile < 1:
        selected = d["entropy"] >= entropy_threshold(d["entropy"][d["mask"]], cfg.top_entropy_quantile)
    inputs = LossInputs(
        advantages=d["advantages"],
        mask=d["mask"],
        old_logps=d["old"],
        ref_logps=d["ref"],
        sampler_logps=d["sampler"] if cfg.importance_cap is not None else None,
        selected=selected,
        weights=token_weights(cfg.loss, d["mask"], totals, T_MAX),
        entropy_weights=token_weights("dapo", d["mask"], totals, T_MAX),
    )
    output = policy_loss(PolicyOutputs(logps, d["entropy"]), inputs, cfg)
    (gradient,) = torch.autograd.grad(output.loss, logps)
    metrics = {name: float(top / bottom) for name, (top, bottom) in output.metrics.items()}
    return output.loss.detach(), gradient, metrics


NAMES = {
    "grpo": "grpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "cispo": "cispo",
    "gspo": "grpo",
    "sapo": "sapo",
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"delta": 1.5},
    {"beta": 0.3},
    {"importance_cap": 1.2},
    {"entropy_weight": 0.1},
    {"epsilon_high": 0.2, "beta": 0.2, "importance_cap": 2.0},
    {"epsilon_high": 0.2, "delta": 1.6, "beta": 0.2, "importance_cap": 2.0},
]


def shared(loss: str, settings: dict[str, Any]) -> bool:
    return not (loss in ("cispo", "sapo") and "delta" in settings)


@pytest.mark.parametrize(
    ("loss", "settings"), [(loss, each) for loss in NAMES for each in SETTINGS if shared(loss, each)]
)
def test_loss_and_gradient_equal_trls(loss: str, settings: dict[str, Any]) -> None:
    cfg = GrpoConfig(loss=loss, **settings)
    for seed in range(3):
        d = data(seed)
        expected, expected_gradient, _ = theirs(d, cfg, NAMES[loss])
        value, gradient, _ = ours(d, cfg)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        if loss == "gspo" and cfg.importance_cap is not None:
            continue  # on purpose: a token's correction scales that token's gradient, not the sequence's
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("loss", list(NAMES))
def test_top_entropy_selection_equals_trls(loss: str) -> None:
    cfg = GrpoConfig(loss=loss, beta=0.1, top_entropy_quantile=0.2)
    d = data(0, full=True)
    expected, expected_gradient, _ = theirs(d, cfg, NAMES[loss])
    value, gradient, _ = ours(d, cfg)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    if loss != "gspo":  # on purpose: ours is the gradient of the selected tokens, theirs of the whole sequence
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_metrics_equal_trls(loss: str) -> None:
    cfg = GrpoConfig(loss=loss, beta=0.1)
    _, _, expected = theirs(data(1), cfg, loss)
    _, _, metrics = ours(data(1), cfg)
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


def test_trls_bnpo_depends_on_the_micro_batches() -> None:
    """dapo stands in for it: TRL divides each micro-batch by its own tokens, so its step depends on the split."""
    d, cfg = data(2), GrpoConfig(loss="dapo")
    halves = [{name: value[part] for name, value in d.items()} for part in (slice(0, 4), slice(4, 8))]
    whole = theirs(d, cfg, "bnpo")[0]
    assert abs(sum(theirs_part(half, cfg) for half in halves) / 2 - whole) > 1e-4


def theirs_part(d: dict[str, Tensor], cfg: GrpoConfig) -> Tensor:
    padded = {name: torch.cat([value, value]) for name, value in d.items()}
    padded["mask"][4:] = False
    return theirs(padded, cfg, "bnpo")[0]


def test_advantages_equal_trls_formulas() -> None:
    """sum_then_normalize and normalize_then_sum as GRPOTrainer._generate_and_score_completions writes them."""
    from trl.trainer.utils import nanstd

    rewards = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    rewards[3, 1] = torch.nan
    rewards[5] = torch.nan
    weights = torch.tensor([1.0, 0.5])
    total = (rewards * weights).nansum(1)
    total[5] = torch.nan
    grouped = total.view(-1, 4)
    centred = (grouped - grouped.nanmean(1, keepdim=True)).flatten()
    by_group = centred / (nanstd(grouped, dim=1).repeat_interleave(4) + 1e-4)
    by_batch = centred / (nanstd(total) + 1e-4)
    combined = combine_rewards(rewards, weights)
    for scale, expected in (("group", by_group), ("batch", by_batch), ("none", centred)):
        value = group_advantages(combined, 4, scale, Moments.of(combined).std)
        torch.testing.assert_close(value, expected.nan_to_num(0.0))

    blocks = rewards.view(3, 4, 2)
    scores = (blocks - blocks.nanmean(1, keepdim=True)) / (nanstd(blocks, dim=1, keepdim=True) + 1e-4)
    summed = (scores.view(12, 2) * weights).nansum(1)
    summed[5] = torch.nan
    expected = ((summed - summed.nanmean()) / (nanstd(summed) + 1e-4)).nan_to_num(0.0)
    values = normalised_sum(rewards, weights, 4)
    torch.testing.assert_close(standardise(values, Moments.of(values)), expected)
