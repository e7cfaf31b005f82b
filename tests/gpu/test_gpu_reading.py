"""Ways to read less on the device: stems, shared prompts, trees, one layer at a time; the same numbers as without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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

from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.layer_major import measure_by_layers
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.disagreement.recorder import recorder_of
from vdr_cli.disagreement.stems import StemKeeper
from vdr_cli.engine.twin import Twin
from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling

FULL = EnsembleSpec(members=4, dropout=0.2, seed=5)
TOP = replace(FULL, scope="last_k", last_k=1)
ASKED = frozenset({"bald", "member_logps"})
WAYS = {
    "plain": {"share_prompts": False},
    "shared": {"share_prompts": True},
    "trees": {"as_trees": True},
}


def check(found: Statistics, model: nn.Module, batch: Completions, spec: EnsembleSpec, dtype: torch.dtype) -> None:
    """Against the definition, and against what is measured without the shortcut."""
    valid = batch.completion_mask
    exact = logits_by_hand(model, batch, spec, 1)
    error = logp_error(dtype, exact[:, valid])
    at_target = exact.log_softmax(-1).gather(-1, batch.completion_ids.expand(len(exact), -1, -1)[..., None])[..., 0]
    torch.testing.assert_close(found.member_logps.double(), at_target * valid, rtol=1e-4, atol=error)
    plain = measure(model, batch, len(batch) // 2, spec, 1, "all", ASKED)
    torch.testing.assert_close(found.bald, plain.bald, rtol=1e-4, atol=measure_error(dtype, plain.bald))
    assert plain.bald.max() > 1e-2


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_stems_of_the_policys_pass(device: torch.device, dtype: torch.dtype, way: str) -> None:
    model, batch = model_on(device, dtype), ragged(device)
    keeper = StemKeeper(model, TOP, batch, 3)
    for rows in (slice(0, 4), slice(4, 6)):
        part = batch.rows(rows).trimmed()
        with keeper.keeping(rows, part.prompt_ids.shape[1]):
            completion_logps(model, *tokens(part), 1.0, **WAYS[way])
    assert keeper.is_full
    check(measure(model, batch, 3, TOP, 1, "all", ASKED, stems=keeper), model, batch, TOP, dtype)


def test_stems_kept_for_completions_on_the_host(device: torch.device) -> None:
    """As a run does it: the batch lies on the host, what reads and measures it on the device."""
    model, here, there = model_on(device), ragged(torch.device("cpu")), ragged(device)
    keeper = StemKeeper(model, TOP, here, 3)
    with keeper.keeping(slice(0, 6), here.prompt_ids.shape[1]), torch.no_grad():
        completion_logps(model, *tokens(there), 1.0, share_prompts=True)
    check(measure(model, there, 3, TOP, 1, "all", ASKED, stems=keeper), model, there, TOP, torch.float32)


@pytest.mark.parametrize("batch_tokens", [4096, 60])
def test_stems_recorded_while_sampling(device: torch.device, dtype: torch.dtype, batch_tokens: int) -> None:
    model = model_on(device, dtype)
    found = recorder_of(model, TOP, tokens=1000)
    assert found is not None
    rollout = TransformersRollout(pad_id=0, eos_ids=range(2, 14), batch_tokens=batch_tokens)
    with found.watching():
        here = rollout.generate(model, [[7, 8, 9], [4, 5, 6, 7, 8]], 4, Sampling(9), [3, 4], watcher=found)
    keeper = StemKeeper(model, TOP, here, 4, found)
    assert keeper.is_full
    batch = Completions(*(tensor.to(device) for tensor in vars(here).values()))
    check(measure(model, batch, 4, TOP, 1, "all", ASKED, stems=keeper), model, batch, TOP, dtype)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("spec", [FULL, TOP], ids=["full", "top"])
def test_layer_by_layer(device: torch.device, dtype: torch.dtype, spec: EnsembleSpec, budget: int | None) -> None:
    model, batch, lendings = model_on(device, dtype), ragged(device), []
    with lent(model, device, lendings) as (twin, lend):
        found = measure_by_layers(twin, lend, batch, 3, spec, 1, "all", ASKED, budget)
    assert lendings == [0, 1, 2]
    check(found, model, batch, spec, dtype)


@contextmanager
def lent(model: nn.Module, device: torch.device, lendings: list[int]) -> Iterator[tuple[Any, Any]]:
    with Twin(model, device).by_layers() as (twin, lend):

        @contextmanager
        def noted(layer: int) -> Iterator[None]:
            lendings.append(layer)
            with lend(layer):
                yield

        yield twin, noted


@pytest.mark.parametrize("budget", [1, 30_000])
def test_any_division_gives_the_same_numbers(device: torch.device, dtype: torch.dtype, budget: int) -> None:
    model, batch = model_on(device, dtype), ragged(device)
    check(measure(model, batch, 3, FULL, 1, "all", ASKED, budget), model, batch, FULL, dtype)


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
