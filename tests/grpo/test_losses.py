"""Every loss, aggregation, clip and KL against the papers' loops (paper.py), value and gradient; and invariances."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.grpo.paper import T_MAX, B, T, make, paper_kl, paper_loss
from vdr_cli.grpo.losses import (
    VARIANTS,
    LossInputs,
    LossOutput,
    LossSettings,
    PolicyOutputs,
    Totals,
    policy_loss,
    token_weights,
)

LOSSES = list(VARIANTS)


def tensors(
    data: dict[str, np.ndarray], dtype: torch.dtype, selected: np.ndarray | None = None
) -> tuple[PolicyOutputs, LossInputs]:
    flags = {"mask": data["mask"], "covariant": data["covariant"].astype(bool)}
    made = {name: torch.tensor(value).to(dtype) for name, value in data.items() if name not in flags}
    policy = PolicyOutputs(made.pop("logps").requires_grad_(), made.pop("entropy").requires_grad_())
    inputs = LossInputs(
        **made,
        **{name: torch.tensor(value) for name, value in flags.items()},
        selected=None if selected is None else torch.tensor(selected),
    )
    return policy, inputs


def step_totals(mask: Tensor) -> Totals:
    return Totals(completions=len(mask), tokens=float(mask.sum()))


def ours(policy: PolicyOutputs, inputs: LossInputs, cfg: LossSettings, totals: Totals | None = None) -> LossOutput:
    totals, dtype = totals or step_totals(inputs.mask), policy.logps.dtype
    weights, entropy_weights = (token_weights(loss, inputs.mask, totals, T_MAX, dtype) for loss in (cfg.loss, "dapo"))
    return policy_loss(policy, replace(inputs, weights=weights, entropy_weights=entropy_weights), cfg)


# ---- against the papers --------------------------------------------------------------------------------------


def check_against_paper(cfg: LossSettings, dtype: torch.dtype = torch.float64, selected: bool = False) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for seed in range(4):
        data = make(seed)
        if dtype == torch.float32:
            data = {k: v.astype(np.float32).astype(np.float64) if v.dtype != bool else v for k, v in data.items()}
        chosen = data["entropy"] > 0.8 if selected else None
        policy, inputs = tensors(data, dtype, chosen)
        loss = ours(policy, inputs, cfg).loss
        (gradient,) = torch.autograd.grad(loss, policy.logps)
        expected, expected_gradient = paper_loss(data, cfg, chosen)
        scale = max(abs(expected), 0.05)
        assert abs(loss.item() - expected) <= tolerance * scale
        error = np.linalg.norm(gradient.numpy() - expected_gradient)
        assert error <= tolerance * np.linalg.norm(expected_gradient)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"epsilon_low": 0.1, "epsilon_high": 0.4},
    {"delta": 1.5},
    {"beta": 0.3, "kl": "k1"},
    {"beta": 0.3, "kl": "k2"},
    {"beta": 0.3, "kl": "k3"},
    {"beta": 0.3, "kl": "k3", "kl_in": "reward"},
    {"entropy_weight": 0.2},
    {"importance_cap": 1.2},
    {"kl_cov_weight": 0.3},
    {"beta": 0.1, "entropy_weight": 0.1, "importance_cap": 1.3, "sapo_temperature_negative": 2.0},
    {"delta": 1.6, "beta": 0.1, "entropy_weight": 0.1, "importance_cap": 1.3},
]


def possible(loss: str, settings: dict[str, Any]) -> bool:
    unclipped = loss in ("cispo", "sapo", "kl_cov")
    return not (unclipped and "delta" in settings) and (loss == "kl_cov" or "kl_cov_weight" not in settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss", "settings"), [(loss, each) for loss in LOSSES for each in SETTINGS if possible(loss, each)]
)
def test_equals_the_paper(loss: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    check_against_paper(LossSettings(loss=loss, **settings), dtype)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "gspo"])
def test_only_selected_tokens_make_the_policy_term(loss: str) -> None:
    check_against_paper(LossSettings(loss=loss, beta=0.1), selected=True)


def test_entropy_bonus_raises_entropy() -> None:
    policy, inputs = tensors(make(), torch.float64)
    loss = ours(policy, inputs, LossSettings(entropy_weight=0.2)).loss
    (gradient,) = torch.autograd.grad(loss, policy.entropy)
    expected = -0.2 * inputs.mask.double() / inputs.mask.sum()
    torch.testing.assert_close(gradient, expected)


def test_gspo_takes_an_advantage_per_token() -> None:
    """GSPO-token, eq. 14: the gradient of token t is s A_t / |y| inside the clip."""
    data = make()
    data["old_logps"] = data["logps"] + 0.01
    data["advantages"] = np.random.default_rng(5).normal(size=(B, T))
    policy, inputs = tensors(data, torch.float64)
    (gradient,) = torch.autograd.grad(ours(policy, inputs, LossSettings(loss="gspo")).loss, policy.logps)
    lengths = data["mask"].sum(1, keepdims=True)
    expected = -np.exp(-0.01) * data["advantages"] * data["mask"] / lengths / B
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10)


def test_on_policy_old_logps_may_be_left_out() -> None:
    data = make()
    data["old_logps"] = data["logps"]
    policy, inputs = tensors(data, torch.float64)
    with_old = ours(policy, inputs, LossSettings())
    without = ours(policy, replace(inputs, old_logps=None), LossSettings())
    assert torch.equal(with_old.loss, without.loss)
    assert without.maxima["ratio/max"] == 1.0


# ---- invariances ---------------------------------------------------------------------------------------------


def rows(data: dict[str, np.ndarray], index: Any) -> dict[str, np.ndarray]:
    return {name: value[index] for name, value in data.items()}


def gradient_by_parts(data: dict[str, np.ndarray], cfg: LossSettings, parts: list[Any]) -> tuple[float, np.ndarray]:
    """Loss and gradient of a step that is split into these micro-batches."""
    totals = step_totals(torch.tensor(data["mask"]))
    loss, gradient = 0.0, np.zeros(data["logps"].shape)
    for part in parts:
        policy, inputs = tensors(rows(data, part), torch.float64)
        output = ours(policy, inputs, cfg, totals)
        loss += output.loss.item()
        gradient[part] += torch.autograd.grad(output.loss, policy.logps)[0].numpy()
    return loss, gradient


def check_split(loss: str) -> None:
    data, cfg = make(1), LossSettings(loss=loss, beta=0.1, entropy_weight=0.1)
    whole = gradient_by_parts(data, cfg, [slice(0, B)])
    for parts in (2, 4, 8, "unequal"):
        cuts = [0, 1, 6, 8] if parts == "unequal" else list(range(0, B + 1, B // int(parts)))
        split = gradient_by_parts(data, cfg, [slice(a, b) for a, b in pairwise(cuts)])
        np.testing.assert_allclose(split[0], whole[0], rtol=1e-10)
        np.testing.assert_allclose(split[1], whole[1], rtol=1e-10)


def check_padding(loss: str) -> None:
    """Columns of padding, filled with anything, change nothing."""
    data, cfg = make(2), LossSettings(loss=loss, beta=0.1, entropy_weight=0.1, importance_cap=2.0)
    plain = gradient_by_parts(data, cfg, [slice(0, B)])
    for junk in (7.0, np.inf, np.nan):
        padded = {
            name: np.concatenate([value, np.full((B, 3), False if name == "mask" else junk)], axis=1)
            for name, value in data.items()
        }
        loss_value, gradient = gradient_by_parts(padded, cfg, [slice(0, B)])
        np.testing.assert_allclose(loss_value, plain[0], rtol=1e-12)
        np.testing.assert_allclose(gradient[:, :T], plain[1], rtol=1e-12)
        assert (gradient[:, T:] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_do_not_matter(loss: str) -> None:
    check_split(loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_does_not_matter(loss: str) -> None:
    check_padding(loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_order_does_not_matter(loss: str) -> None:
    data, cfg = make(3), LossSettings(loss=loss, beta=0.1)
    order = np.random.default_rng(0).permutation(B)
    plain = gradient_by_parts(data, cfg, [slice(0, B)])
    shuffled = gradient_by_parts(rows(data, order), cfg, [slice(0, 3), slice(3, B)])
    np.testing.assert_allclose(shuffled[0], plain[0], rtol=1e-12)
    np.testing.assert_allclose(shuffled[1], plain[1][order], rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_masked_is_exactly_zero(loss: str) -> None:
    data = make()
    data["mask"][:] = False
    policy, inputs = tensors(data, torch.float32)
    output = ours(policy, inputs, LossSettings(loss=loss, beta=0.1, entropy_weight=0.1, importance_cap=2.0))
    (gradient,) = torch.autograd.grad(output.loss, policy.logps)
    assert output.loss == 0
    assert (gradient == 0).all()
    assert all(torch.isfinite(part) for pair in output.metrics.values() for part in pair)


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_advantages_are_exactly_zero(loss: str) -> None:
    data = make()
    data["advantages"][:] = 0.0
    data["covariant"][:] = False
    policy, inputs = tensors(data, torch.float32)
    output = ours(policy, inputs, LossSettings(loss=loss))
    (gradient,) = torch.autograd.grad(output.loss, policy.logps)
    assert output.loss == 0
    assert (gradient == 0).all()


# ---- metrics -------------------------------------------------------------------------------------------------


def test_metrics_are_sums_that_add_up() -> None:
    data, cfg = make(1), LossSettings(beta=0.1)
    mask = data["mask"]
    ratio, advantages = np.exp(data["logps"] - data["old_logps"]), data["advantages"]
    high = ((ratio > 1.28) & (advantages > 0) & mask).sum() / mask.sum()
    low = ((ratio < 0.8) & (advantages < 0) & mask).sum() / mask.sum()
    kl = sum(paper_kl(x, "k3")[0] for x in (data["logps"] - data["ref_logps"])[mask]) / mask.sum()
    gap = np.abs(data["old_logps"] - data["sampler_logps"])[mask]
    expected = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "kl": kl,
        "entropy": data["entropy"][mask].mean(),
        "ratio/mean": ratio[mask].mean(),
        "sampling/sampling_logp_difference/mean": gap.mean(),
    }
    outputs = [ours(*tensors(rows(data, part), torch.float64), cfg) for part in (slice(0, 3), slice(3, B))]
    for name, value in expected.items():
        numerator = sum(float(output.metrics[name][0]) for output in outputs)
        denominator = sum(float(output.metrics[name][1]) for output in outputs)
        assert numerator / denominator == pytest.approx(value, rel=1e-6), name
    assert max(float(output.maxima["ratio/max"]) for output in outputs) == pytest.approx(ratio[mask].max())
    assert max(float(output.maxima["sampling/sampling_logp_difference/max"]) for output in outputs) == pytest.approx(
        gap.max()
    )


def test_extremes_look_at_valid_tokens_alone() -> None:
    """All ratios are below 1 here; padding's, which is 1, does not count. Clipped shares are a completion's."""
    data = make(4)
    data["old_logps"] = data["logps"] + np.random.default_rng(2).uniform(0.05, 0.9, (B, T))
    data["advantages"] = -np.abs(data["advantages"])
    mask, cfg = data["mask"].copy(), LossSettings()
    mask[2] = False  # a completion without tokens
    data["mask"] = mask
    ratio = np.exp(data["logps"] - data["old_logps"])
    shares = [(ratio[b][mask[b]] < 0.8).mean() for b in range(B) if mask[b].any()]
    weight = np.exp(data["old_logps"] - data["sampler_logps"])[mask]
    outputs = [ours(*tensors(rows(data, part), torch.float64), cfg) for part in (slice(0, 2), slice(2, 3), slice(3, B))]

    def largest(name: str) -> float:
        return max(float(output.maxima[name]) for output in outputs)

    def smallest(name: str) -> float:
        return min(float(output.minima[name]) for output in outputs)

    assert largest("ratio/max") == pytest.approx(ratio[mask].max()) and largest("ratio/max") < 1.0
    assert 0 < min(shares) < max(shares)
    assert smallest("clip_ratio/low_min") == pytest.approx(min(shares)) and largest("clip_ratio/high_max") == 0.0
    assert smallest("sampling/importance_sampling_ratio/min") == pytest.approx(weight.min())
    assert largest("sampling/importance_sampling_ratio/max") == pytest.approx(weight.max())
    assert outputs[1].maxima["ratio/max"] == -torch.inf and outputs[1].minima["clip_ratio/low_min"] == torch.inf
