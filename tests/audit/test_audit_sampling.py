"""Filters and the draw, by hand and against transformers' processors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vdr_cli.audit import sampling
from vdr_cli.config import RolloutConfig


def test_a_token_is_drawn_where_its_interval_holds_the_uniform():
    scores = np.log([0.2, 0.5, 0.3])
    assert sampling.draw(scores, 1, 0.2).distance == pytest.approx(0, abs=1e-15)
    assert sampling.draw(scores, 1, 0.69).distance == 0
    assert sampling.draw(scores, 1, 0.75).distance == pytest.approx(0.05)
    assert sampling.draw(scores, 2, 0.6).distance == pytest.approx(0.1)
    assert sampling.draw(scores, 1, 0.3).logp == pytest.approx(math.log(0.5))
    assert sampling.draw(np.array([0.0, -np.inf]), 1, 0.3).logp == -np.inf


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_filters_are_transformers_in_its_order(settings):
    cfg = RolloutConfig(**settings)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty=cfg.repetition_penalty),
            TemperatureLogitsWarper(cfg.temperature),
            *([TopKLogitsWarper(top_k=cfg.top_k)] if cfg.top_k else []),
            TopPLogitsWarper(top_p=cfg.top_p),
            MinPLogitsWarper(min_p=cfg.min_p),
        ]
    )
    generator = np.random.default_rng(0)
    for _ in range(20):
        logits, seen = generator.normal(size=12) * 2, generator.integers(0, 12, 4).tolist()
        expected = theirs(torch.tensor([seen]), torch.from_numpy(logits)[None])[0].numpy()
        assert sampling.filtered(logits, seen, cfg).tolist() == pytest.approx(expected.tolist())
