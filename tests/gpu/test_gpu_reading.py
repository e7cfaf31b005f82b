"""Ways to read less on the device: states from sampling, shared prompts, trees, a layer at a time; the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpu_reference import (
    LAYERS,
    logits_by_hand,
    logp_error,
    measure_error,
    model_on,
    ragged,
    relative,
    tokens,
)
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine.gathered import GatheredModel
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling

FULL = EnsembleSpec(members=4, dropout=0.2, seed=5)
TOP = replace(FULL, scope="last_k", last_k=1)
ASKED = frozenset({"bald", "member_logps"})
WAYS = {
    "plain": {"share_prompts": False},
    "shared": {"share_prompts": True},
    "trees": {"as_trees": True},
    "packed": {"packed": True},
}


def assert_measures(
    found: Statistics, model: nn.Module, batch: Completions, spec: EnsembleSpec, dtype: torch.dtype
) -> None:
    """Against the definition, and against what is measured without the shortcut."""
    valid = batch.completion_mask
    exact = logits_by_hand(model, batch, spec, 1)
    error = logp_error(dtype, exact[:, valid])
    at_target = exact.log_softmax(-1).gather(-1, batch.completion_ids.expand(len(exact), -1, -1)[..., None])[..., 0]
    torch.testing.assert_close(found.member_logps.double(), at_target * valid, rtol=1e-4, atol=error)
    plain = EnsembleReader(spec).measure(model, MeasureRequest(batch, len(batch) // 2, 1, measures=ASKED))
    torch.testing.assert_close(found.bald, plain.bald, rtol=1e-4, atol=measure_error(dtype, plain.bald))
    assert plain.bald.max() > 1e-2


@pytest.mark.parametrize("batch_tokens", [4096, 60])
def test_states_from_sampling(device: torch.device, dtype: torch.dtype, batch_tokens: int) -> None:
    """As a run does it: completions lie on the host, the states and what is measured on the device."""
    model, reader = model_on(device, dtype), EnsembleReader(TOP)
    rollout = TransformersRollout(pad_id=0, eos_ids=range(2, 14), batch_tokens=batch_tokens)
    with reader.watching(model, tokens=1000) as watcher:
        here = rollout.generate(
            model, RolloutRequest([[7, 8, 9], [4, 5, 6, 7, 8]], 4, Sampling(9), [3, 4], watcher=watcher)
        )
    assert watcher is not None and watcher.has_states
    watcher.completions = here
    lowest, calls = decoder_layers(model)[0].mlp, []
    with hooked(lowest.register_forward_hook, lambda *_: calls.append(1)):
        found = reader.measure(model, MeasureRequest(here, 4, 1, measures=ASKED))
    assert not calls, "the lowest layer ran again"
    batch = Completions(*(tensor.to(device) for tensor in vars(here).values()))
    assert_measures(found, model, batch, TOP, dtype)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("spec", [FULL, TOP], ids=["full", "top"])
def test_layer_by_layer(device: torch.device, dtype: torch.dtype, spec: EnsembleSpec, budget: int | None) -> None:
    model, batch, lendings = model_on(device, dtype), ragged(device), []
    with lent(model, device, lendings) as (twin, lend):
        found = EnsembleReader(spec, partial(nullcontext, lend)).measure(
            twin, MeasureRequest(batch, 3, 1, measures=ASKED, budget=budget)
        )
    assert lendings == [0, 1, 2]
    assert_measures(found, model, batch, spec, dtype)


@contextmanager
def lent(model: nn.Module, device: torch.device, lendings: list[int]) -> Iterator[tuple[Any, Any]]:
    with GatheredModel(model, device, None).layer_by_layer() as (twin, lend):

        @contextmanager
        def noted(layer: int) -> Iterator[None]:
            lendings.append(layer)
            with lend(layer):
                yield

        yield twin, noted


@pytest.mark.parametrize("budget", [1, 30_000])
def test_any_division_gives_the_same_numbers(device: torch.device, dtype: torch.dtype, budget: int) -> None:
    model, batch = model_on(device, dtype), ragged(device)
    assert_measures(
        EnsembleReader(FULL).measure(model, MeasureRequest(batch, 3, 1, measures=ASKED, budget=budget)),
        model,
        batch,
        FULL,
        dtype,
    )


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_read_a_prompt(device: torch.device, dtype: torch.dtype, way: str) -> None:
    """Log-probabilities against float64, their gradient against that of the same weights in float64."""
    model, batch = model_on(device, dtype), ragged(device)
    exact = logits_by_hand(model, batch, None, 0)[0]
    logps, entropy = completion_logps(model, *tokens(batch), 0.7, **WAYS[way])
    log_p = (exact / 0.7).log_softmax(-1)
    expected = log_p.gather(-1, batch.completion_ids[..., None])[..., 0]
    valid = batch.completion_mask
    error = logp_error(dtype, exact[valid]) / 0.7
    torch.testing.assert_close(logps.double(), expected * valid, rtol=1e-5, atol=error)
    of_entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropy.double(), of_entropy * valid, rtol=1e-5, atol=4 * error)
    # bfloat16 rounds as often on the way back as on the way there.
    tolerance = 1e-4 if dtype == torch.float32 else 2.0**-8 * (8 * LAYERS + 2)
    assert relative(gradient(model, batch, WAYS[way]), gradient(model.double(), batch, WAYS["plain"])) < tolerance


def gradient(model: nn.Module, batch: Completions, way: dict[str, bool]) -> Tensor:
    model.zero_grad()
    logps, entropy = completion_logps(model, *tokens(batch), 0.7, **way)
    weight = torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)
    (logps * weight + 0.1 * entropy).sum().backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
