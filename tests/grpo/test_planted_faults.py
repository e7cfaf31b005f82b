"""Tests that cannot fail prove nothing: each fault is planted alone, and exactly these checks must turn red."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdr_cli.grpo import losses
from vdr_cli.grpo.losses import LossSettings, Terms, TokenLoss, Totals, Variant

HERE = Path(__file__).parent
LOSS = "dapo"
PLAIN = losses.VARIANTS[LOSS]


def checks() -> dict[str, Callable[[], None]]:
    """The check functions of the other test files, by name, for one loss."""
    of_losses = runpy.run_path(str(HERE / "test_losses.py"))
    of_learning = runpy.run_path(str(HERE / "test_learning.py"))
    return {
        "paper": lambda: of_losses["check_against_paper"](LossSettings(loss=LOSS, delta=1.5, beta=0.3)),
        "micro_batches": lambda: of_losses["check_split"](LOSS),
        "padding": lambda: of_losses["check_padding"](LOSS),
        "learning": lambda: of_learning["check_learns"](LOSS),
    }


def negated(terms: Terms, cfg: LossSettings) -> TokenLoss:
    return TokenLoss(-PLAIN.token_loss(terms, cfg).value)


def clip_swapped(terms: Terms, cfg: LossSettings) -> TokenLoss:
    swapped = replace(cfg, epsilon_low=cfg.epsilon_high, epsilon_high=cfg.epsilon_low)
    return PLAIN.token_loss(terms, swapped)


def max_for_min(terms: Terms, cfg: LossSettings) -> TokenLoss:
    value = PLAIN.token_loss(terms._replace(advantages=-terms.advantages), cfg).value
    return TokenLoss(-value)


def ratio_detached(terms: Terms, cfg: LossSettings) -> TokenLoss:
    return PLAIN.token_loss(terms._replace(log_ratio=terms.log_ratio.detach()), cfg)


def no_mask(mask: Tensor, totals: Totals, max_new_tokens: int) -> Tensor:
    return torch.ones_like(mask) / max(totals.tokens, 1.0)


def local_denominator(mask: Tensor, totals: Totals, max_new_tokens: int) -> Tensor:
    return mask / mask.sum().clamp_min(1.0)


def padded_denominator(mask: Tensor, totals: Totals, max_new_tokens: int) -> Tensor:
    return mask / mask.numel()


FAULTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sign error": ({"token_loss": negated}, {"paper", "learning"}),
    "clip ranges swapped": ({"token_loss": clip_swapped}, {"paper"}),
    "max in place of min": ({"token_loss": max_for_min}, {"paper"}),
    "ratio without gradient": ({"token_loss": ratio_detached}, {"paper", "learning"}),
    "missing mask": ({"aggregation": no_mask, "where": True}, {"paper", "padding"}),
    "denominator of the micro-batch": ({"aggregation": local_denominator}, {"micro_batches"}),
    "denominator counts padding": ({"aggregation": padded_denominator}, {"paper", "micro_batches", "padding"}),
}


def red_checks() -> set[str]:
    red = set()
    for name, check in checks().items():
        try:
            check()
        except (AssertionError, RuntimeError):
            red.add(name)
    return red


def test_nothing_is_red_without_a_fault() -> None:
    assert red_checks() == set()


@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, expected = FAULTS[fault]
    parts = {name: part for name, part in changes.items() if name != "where"}
    monkeypatch.setitem(losses.VARIANTS, LOSS, Variant(**(PLAIN._asdict() | parts)))
    if changes.get("where"):
        monkeypatch.setattr(losses, "_where", lambda mask, values: values)
    red = red_checks()
    print(f"{fault}: red {sorted(red)}")
    assert red == expected
