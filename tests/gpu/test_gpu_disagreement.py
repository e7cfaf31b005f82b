"""Members and measures on the device: against float64 loops from the definitions, on the same masks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gpu_reference import (
    ARCHITECTURES,
    logits_by_hand,
    logp_error,
    measure_error,
    model_on,
    ragged,
    sibling,
)

from vdr_cli.disagreement import hooks, information, masks
from vdr_cli.disagreement.information import MEASURES
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.models.head import Head

EVERYTHING = frozenset({"total", "aleatoric", "bald", "rmi", "epkl", "logp_var", "member_logps"})
FULL = EnsembleSpec(members=4, dropout=0.2, seed=5)
TOP = replace(FULL, scope="last_k", last_k=2)
SPECS = {
    "full": FULL,
    "last_k": TOP,
    "token": replace(FULL, mask_sharing="token"),
}


@pytest.mark.parametrize(("M", "V", "spread", "between"), [(2, 5, 1, 1), (8, 300, 2, 0.3), (5, 1000, 6, 2)])
def test_measures_equal_the_definitions(device: torch.device, M: int, V: int, spread: float, between: float) -> None:
    plain = sibling("disagreement/test_information")
    logits = plain.random_logits(4, M, V, spread, between)
    targets = torch.tensor([0, 1, 2, V - 1])
    found = information.from_logits(logits.to(device), targets.to(device), MEASURES)
    for position in range(4):
        for name, value in plain.by_definition(logits[position], int(targets[position])).items():
            tolerance = {"rel": 5e-5, "abs": 1e-7 if name == "bald" else 2e-6}
            assert float(found[name][position]) == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("budget", [1, 4 * 3 * 997 * 4, 2**26])
def test_the_head_in_chunks_keeps_float32(device: torch.device, dtype: torch.dtype, budget: int) -> None:
    """Products of bfloat16 factors are exact in float32, so that dtype costs no accuracy either."""
    generator = torch.Generator().manual_seed(1)
    hidden = (0.5 * torch.randn(3, 10, 64, generator=generator)).to(device, dtype)
    weight = torch.randn(997, 64, generator=generator).to(device, dtype)
    head = Head(weight, torch.randn(997, generator=generator).to(device, dtype), 0.7, 6.0)
    exact = Head(weight.double(), head.bias.double(), head.scale, head.softcap).logits(hidden.double())
    targets = torch.arange(10, device=device)
    truth = sibling("disagreement/test_members").float64_measures(exact[:, None], targets[None])
    found = information.token_statistics(hidden, targets, head, EVERYTHING, budget)
    for name in EVERYTHING:
        expected = truth[name].reshape(found.get(name).shape)
        torch.testing.assert_close(found.get(name).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["full", "last_k"])
def test_members_equal_the_definitions(device: torch.device, dtype: torch.dtype, scope: str) -> None:
    model, batch, spec = model_on(device, dtype), ragged(device), SPECS[scope]
    exact = logits_by_hand(model, batch, spec, 7)
    truth = sibling("disagreement/test_members").float64_measures(exact, batch.completion_ids)
    valid = batch.completion_mask
    assert truth["bald"][valid].min() > 1e-3, "members must differ for the test to mean anything"
    allowed = {name: measure_error(dtype, truth[name][valid]) for name in ("bald", "rmi")}
    allowed["member_logps"] = logp_error(dtype, exact[:, valid])
    every_token = EnsembleReader(spec).measure(
        model, MeasureRequest(batch, 3, 7, measures=EVERYTHING)
    )  # mode per_token
    at_end = EnsembleReader(spec).measure(
        model, MeasureRequest(batch, 3, 7, positions="last", measures=EVERYTHING)
    )  # mode end_of_sequence
    last = torch.arange(len(batch), device=device), valid.sum(1) - 1
    for name, atol in allowed.items():
        expected = truth[name] * valid
        torch.testing.assert_close(every_token.get(name).double(), expected, rtol=1e-4, atol=atol)
        torch.testing.assert_close(at_end.get(name).double(), expected[..., last[0], last[1]], rtol=1e-4, atol=atol)
    assert every_token.bald.device.type == device.type and every_token.bald.max() <= math.log(4)
    if dtype == torch.float32:
        for name in EVERYTHING:
            expected = truth[name] * valid
            torch.testing.assert_close(every_token.get(name).double(), expected, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_device_changes_no_member(device: torch.device, spec: EnsembleSpec) -> None:
    on_cpu = EnsembleReader(spec).measure(
        model_on(torch.device("cpu")), MeasureRequest(ragged(torch.device("cpu")), 3, 1, measures=EVERYTHING)
    )
    found = EnsembleReader(spec).measure(model_on(device), MeasureRequest(ragged(device), 3, 1, measures=EVERYTHING))
    for name in EVERYTHING:
        torch.testing.assert_close(found.get(name).cpu(), on_cpu.get(name), rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(device: torch.device, kind: str) -> None:
    on_cpu = EnsembleReader(TOP).measure(
        model_on(torch.device("cpu"), kind=kind), MeasureRequest(ragged(torch.device("cpu")), 3, 1)
    )
    model = model_on(device, kind=kind)
    for spec, expected in ((TOP, on_cpu.bald), (FULL, None)):
        found = EnsembleReader(spec).measure(model, MeasureRequest(ragged(device), 3, 1)).bald
        assert bool(found.isfinite().all()) and found.max() > 1e-4
        if expected is not None:
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=5e-6)


def test_bfloat16_reads_with_masks_per_token_too(device: torch.device) -> None:
    model, batch = model_on(device, torch.bfloat16), ragged(device)
    found = EnsembleReader(SPECS["token"]).measure(model, MeasureRequest(batch, 3, 1)).bald
    assert bool(found.isfinite().all()) and found.max() > 1e-3


def test_masks_are_those_of_any_other_device(device: torch.device, dtype: torch.dtype) -> None:
    batch = ragged(device)
    for spec in (FULL, SPECS["token"]):
        active = hooks.Members(spec, 3, [1, 2])
        active.keys = masks.row_keys(batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask)
        active.positions = (torch.arange(5, device=device).expand(6, -1),) * 2
        branch = torch.ones(12, 5, 32, device=device, dtype=dtype)
        found = active.mask(1, "mlp", branch)
        assert found.device.type == device.type and found.dtype == torch.float32
        if spec is FULL:
            expected = torch.stack([masks.member_mask(spec, 3, member, 1, "mlp", 32)[None] for member in (1, 2)])
        else:
            rows = [
                torch.cat([masks.token_mask(spec, 3, member, 1, "mlp", key, 5, 32) for key in active.keys])
                for member in (1, 2)
            ]
            expected = torch.stack(rows)
        assert torch.equal(found.cpu(), expected)
    here = ragged(torch.device("cpu"))
    assert active.keys == masks.row_keys(here.prompt_ids, here.prompt_mask, here.completion_ids, here.completion_mask)


def test_the_model_is_left_as_it_was(device: torch.device, dtype: torch.dtype) -> None:
    model, batch = model_on(device, dtype), ragged(device)
    before = model(input_ids=batch.prompt_ids).logits
    EnsembleReader(FULL).measure(model, MeasureRequest(batch, 3, 1))
    assert torch.equal(model(input_ids=batch.prompt_ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
