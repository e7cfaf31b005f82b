"""Sampling on the device: frequencies, greedy tokens, log-probabilities, and the same tokens from the same keys."""

from __future__ import annotations

import pytest
import torch
from gpu_reference import ARCHITECTURES, VOCABULARY, logits_by_hand, logp_error, model_on, moved, tokens
from torch import Tensor

from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.sampling import inverse_cdf, processors
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling, uniform_rows

PROMPTS, KEYS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]], [101, 202, 303]
SAMPLINGS = [
    Sampling(1),
    Sampling(1, temperature=0.6),
    Sampling(1, temperature=1.4, top_k=5),
    Sampling(1, top_p=0.8),
    Sampling(1, temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
]


def p_value(drawn: Tensor, probabilities: Tensor) -> float:
    """Chi-square test of token counts; tokens of probability 0 must not occur."""
    counts = torch.bincount(drawn.cpu(), minlength=len(probabilities)).double()
    probabilities = probabilities.cpu().double()
    assert counts[probabilities == 0].sum() == 0
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    expected = probabilities / probabilities.sum() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0).double(), statistic / 2))


def draws(count: int) -> Tensor:
    return uniform_rows([(key, 3) for key in range(100)], count // 100).flatten()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_frequencies_are_the_exact_probabilities(device: torch.device, sampling: Sampling) -> None:
    logits = (1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0))).to(device)
    context = torch.tensor([[3, 3, 7]], device=device)
    scores = processors(sampling)(context, logits.clone())
    uniform = draws(100_000).to(device)
    drawn, logps = inverse_cdf(scores.expand(len(uniform), -1), uniform)
    exact = scores.double().softmax(-1)[0]
    assert p_value(drawn, exact) > 1e-3
    torch.testing.assert_close(logps.double(), exact.log()[drawn], rtol=0, atol=2e-6)
    if sampling == SAMPLINGS[0]:
        assert p_value(drawn, (1.03 * logits).double().softmax(-1)[0]) < 1e-3, "a wrong distribution must not pass"


def test_a_real_vocabulary_is_the_plain_inverse(device: torch.device) -> None:
    """Blocks summed in float32 and walked in float64, against the cumulative sum of all of it in float64."""
    generator = torch.Generator().manual_seed(1)
    scores = (3 * torch.randn(8, 151_936, generator=generator)).to(device)
    scores[:, 1000:] = scores[:, 1000:].masked_fill(scores[:, 1000:] < -3, -torch.inf)
    uniform = draws(800)[::100].to(device)
    drawn, logps = inverse_cdf(scores, uniform)
    log_p = scores.double().log_softmax(-1)
    torch.testing.assert_close(logps.double(), log_p.gather(1, drawn[:, None])[:, 0], rtol=0, atol=1e-5)
    upper = log_p.exp().cumsum(-1).gather(1, drawn[:, None])[:, 0]
    lower = upper - log_p.gather(1, drawn[:, None])[:, 0].exp()
    assert bool((lower - 1e-6 <= uniform).all()) and bool((uniform <= upper + 1e-6).all())


def test_scores_that_are_no_numbers_are_told(device: torch.device) -> None:
    scores = torch.zeros(3, 700, device=device)
    scores[1], scores[2, 5] = torch.nan, torch.inf
    drawn, logps = inverse_cdf(scores, draws(300)[:3].to(device))
    assert bool(((drawn >= 0) & (drawn < 700)).all())
    assert logps.isfinite().tolist() == [True, False, False]


def sampled(model: torch.nn.Module, sampling: Sampling, n: int = 4, batch_tokens: int = 262_144) -> Completions:
    return TransformersRollout(0, range(1, 6), batch_tokens=batch_tokens).generate(
        model, RolloutRequest(PROMPTS, n, sampling, KEYS)
    )


def test_greedy_tokens_are_the_likeliest(device: torch.device, dtype: torch.dtype) -> None:
    model = model_on(device, dtype)
    here = sampled(model, Sampling(10, temperature=0), n=1)
    batch = moved(here, device)
    exact = logits_by_hand(model, batch, None, 0)[0]
    valid = batch.completion_mask
    chosen = exact.gather(-1, batch.completion_ids[..., None])[..., 0]
    behind = (exact.max(-1).values - chosen)[valid]
    assert behind.max() <= 2 * logp_error(dtype, exact[valid])
    if dtype == torch.float32:
        assert torch.equal(exact.argmax(-1)[valid], batch.completion_ids[valid])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_samplers_log_probabilities_are_the_policys(device: torch.device, kind: str) -> None:
    model = model_on(device, kind=kind)
    for batch_tokens in (262_144, 40):
        here = sampled(model, Sampling(10, temperature=0.7), batch_tokens=batch_tokens)
        with torch.no_grad():
            logps, _ = completion_logps(model, *tokens(moved(here, device)), 0.7)
        torch.testing.assert_close(here.sampler_logps, logps.cpu(), rtol=1e-4, atol=2e-5)


def test_the_samplers_log_probabilities_in_bfloat16(device: torch.device) -> None:
    model = model_on(device, torch.bfloat16)
    here = sampled(model, Sampling(10, temperature=0.7))
    batch = moved(here, device)
    exact = logits_by_hand(model, batch, None, 0)[0] / 0.7
    logps = exact.log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0] * batch.completion_mask
    error = logp_error(torch.bfloat16, exact[batch.completion_mask])
    torch.testing.assert_close(here.sampler_logps.to(device).double(), logps, rtol=0, atol=error)


def test_the_same_keys_draw_the_same_tokens(device: torch.device, dtype: torch.dtype) -> None:
    model = model_on(device, dtype)
    first, second = (sampled(model, Sampling(12, top_p=0.95)) for _ in range(2))
    for name, tensor in vars(first).items():
        assert torch.equal(tensor, getattr(second, name)), name
    assert len({tuple(row) for row in first.completion_ids.tolist()}) > 6


def test_the_device_draws_the_same_tokens_as_a_cpu(device: torch.device) -> None:
    """In float32 rounding moves a boundary by 1e-6; of these draws none lies as near to one."""
    for sampling in (Sampling(8), Sampling(8, temperature=0.8, top_k=20, repetition_penalty=1.2)):
        here, there = (sampled(model_on(place), sampling) for place in (torch.device("cpu"), device))
        assert torch.equal(here.completion_ids, there.completion_ids)
        assert int(here.completion_ids.max()) < VOCABULARY
