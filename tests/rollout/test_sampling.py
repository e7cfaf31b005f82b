"""The sampled frequencies and log-probabilities against the exact distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from vdr_cli.config import Config
from vdr_cli.rollout.base import sampling_of
from vdr_cli.rollout.sampling import greedy, inverse_cdf, processors
from vdr_cli.samples import Sampling, uniform_rows

SAMPLINGS = [
    Sampling(1),
    Sampling(1, temperature=0.6),
    Sampling(1, temperature=1.4, top_k=5),
    Sampling(1, top_p=0.8),
    Sampling(1, min_p=0.1),
    Sampling(1, temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
]


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of the draws under the distribution; tokens of probability 0 must not occur."""
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities))
    possible = probabilities.numpy() > 0
    assert counts[~possible].sum() == 0
    expected = probabilities.double().numpy()[possible]
    return float(stats.chisquare(counts[possible], expected / expected.sum() * counts.sum()).pvalue)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_200000_draws_follow_the_exact_distribution(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 1.5
    context = torch.tensor([[3, 3, 7]])
    scores = processors(sampling)(context, logits.clone())
    draws = uniform_rows([(key, g) for key in range(200) for g in range(10)], 100).flatten()
    tokens, logps = inverse_cdf(scores.expand(len(draws), -1), draws)
    exact = scores.softmax(-1)[0]
    assert chi_square(tokens, exact) > 1e-3
    assert torch.allclose(logps, exact.log()[tokens], atol=1e-6)


def test_a_wrong_distribution_fails_the_chi_square() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = uniform_rows([(0, 0)], 200_000).flatten()
    tokens, _ = inverse_cdf(logits.expand(len(draws), -1), draws)
    assert chi_square(tokens, (logits * 1.02).softmax(-1)[0]) < 1e-3


@pytest.mark.parametrize("vocabulary", [12, 256, 700])
def test_logits_that_are_no_numbers_are_told_by_the_log_probability(vocabulary: int) -> None:
    scores = torch.zeros(3, vocabulary)
    scores[1] = torch.nan
    scores[2, 5] = torch.inf
    tokens, logps = inverse_cdf(scores, uniform_rows([(0, g) for g in range(3)], 1)[:, 0])
    assert bool(((tokens >= 0) & (tokens < vocabulary)).all())
    assert logps.isfinite().tolist() == [True, False, False]


def test_a_large_vocabulary_is_sampled_over_its_blocks() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 3001) * 3
    draws = uniform_rows([(5, g) for g in range(50)], 1000).view(-1)
    tokens = torch.cat([inverse_cdf(logits.expand(len(part), -1), part)[0] for part in draws.split(5000)])
    exact = logits.softmax(-1)[0]
    often = exact * len(draws) >= 10
    rest = exact[~often].sum()
    grouped = torch.where(often[tokens], often.cumsum(0)[tokens], torch.zeros_like(tokens))
    assert chi_square(grouped, torch.cat([rest[None], exact[often]])) > 1e-3


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_processors_are_those_of_transformers_generate(sampling: Sampling) -> None:
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
    )
    small = Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    theirs = Qwen2ForCausalLM(small)._get_logits_processor(config, input_ids_seq_length=1)
    assert [type(p) for p in processors(sampling)] == [type(p) for p in theirs]
    torch.manual_seed(2)
    context, logits = torch.randint(0, 30, (4, 6)), torch.randn(4, 30) * 2
    assert torch.equal(processors(sampling)(context, logits.clone()), theirs(context, logits.clone()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**31), st.floats(0.1, 40.0))
def test_inverse_cdf_is_the_plain_one(vocabulary: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, vocabulary, generator=generator) * scale
    scores[torch.rand(5, vocabulary, generator=generator) < 0.3] = -torch.inf
    scores[:, 0] = 0.0
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    tokens, logps = inverse_cdf(scores, uniform)
    cdf = scores.double().softmax(-1).cumsum(-1)
    for row, token in enumerate(tokens.tolist()):
        below = cdf[row, token - 1] if token else 0.0
        assert below - 1e-6 <= uniform[row] <= cdf[row, token] + 1e-6
    assert torch.isfinite(logps).all()
    assert torch.allclose(logps, scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform: float) -> None:
    scores = torch.full((1, 600), -torch.inf)
    scores[0, [1, 300, 301]] = torch.tensor([0.0, -3.0, -30.0])
    token, logp = inverse_cdf(scores, torch.tensor([uniform], dtype=torch.float64))
    assert int(token) in (1, 300, 301)
    assert torch.isfinite(logp).all()


def test_streams_are_pure_functions_of_key_completion_and_position() -> None:
    long, other, elsewhere = uniform_rows([(2**63 - 1, 7), (2**63 - 1, 8), (2**63 - 2, 7)], 100)
    assert torch.equal(long[:20], uniform_rows([(2**63 - 1, 7)], 20)[0])
    assert not torch.equal(long, other)
    assert not torch.equal(long, elsewhere)
    assert (long >= 0).all() and (long < 1).all()


def test_streams_never_change() -> None:
    """Runs are repeated from their seeds: these numbers are part of the product."""
    assert uniform_rows([(1, 0)], 3)[0].tolist() == [0.3035680343067586, 0.8487087496857769, 0.1561347780434731]


def test_greedy_takes_the_likeliest_token() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 0.0]])
    tokens, logps = greedy(scores)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logps, scores.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("stop", [[], ["x", "y"]])
def test_sampling_takes_every_setting(stop: list[str]) -> None:
    rollout = {"max_new_tokens": 9, "temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "stop": stop}
    config = Config.model_validate({"rollout": {**rollout, "repetition_penalty": 1.3}})
    assert sampling_of(config.rollout) == Sampling(9, 0.7, 3, 0.8, 0.1, 1.3, tuple(stop))
