"""Memory: log-probabilities never hold (N, V); an ensemble without room splits its work and gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_reference import model_on, ragged, sibling

from vdr_cli.disagreement import members
from vdr_cli.disagreement.information import token_statistics
from vdr_cli.disagreement.layer_major import measure_by_layers
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.engine.twin import Twin
from vdr_cli.models.anatomy import Head

V = 151_936
LARGE = {"hidden_size": 256, "intermediate_size": 2048, "max_position_embeddings": 512, "initializer_range": 0.06}
"""A model whose ensemble needs gigabytes for 64 completions."""


def peak_of(device: torch.device, work: Any) -> int | None:
    """Bytes that the work held at once beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_log_probabilities_never_hold_all_logits(device: torch.device, dtype: torch.dtype) -> None:
    """Value and gradient of 16,384 tokens at V = 151,936: 10 GB in float32, were it one tensor."""
    N, D = (16_384, 64) if device.type == "cuda" else (4, 8)
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    chunked = sibling("test_logprobs").chunked_logps

    def work() -> None:
        logps, entropy = chunked(hidden, weight, None, targets)
        (logps.sum() + entropy.sum()).backward()

    peak = peak_of(device, work)
    assert bool(hidden.grad.isfinite().all()) and bool(weight.grad.isfinite().all())
    assert peak is None or peak < 0.5 * 4 * N * V


def test_measures_never_hold_all_logits(device: torch.device) -> None:
    M, N, D = (8, 2048, 64) if device.type == "cuda" else (2, 2, 8)
    hidden = torch.randn(M, N, D, device=device, dtype=torch.bfloat16)
    head = Head(torch.randn(V, D, device=device, dtype=torch.bfloat16), None)
    targets = torch.randint(0, V, (N,), device=device)
    budget, found = 2**30, []
    peak = peak_of(device, lambda: found.append(token_statistics(hidden, targets, head, ("bald", "rmi"), budget)))
    assert bool(found[0].bald.isfinite().all())
    assert peak is None or peak < 2 * budget < 4 * M * N * V


@contextmanager
def scarce(device: torch.device, room: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside the block only so many more bytes can be had; the budgets that were tried. A CPU refuses large budgets."""
    asked: list[int] = []
    real = members.plan

    def plan(model: Any, completions: Any, group_size: int, count: int, budget: int) -> Any:
        asked.append(budget)
        if device.type != "cuda" and budget > room:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, completions, group_size, count, budget)

    with monkeypatch.context() as patch:
        patch.setattr(members, "plan", plan)
        if device.type != "cuda":
            yield asked
            return
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        try:
            yield asked
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


@pytest.mark.parametrize("scope", ["full", "last_k"])
def test_an_ensemble_without_room_splits_its_work(
    device: torch.device, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = device.type == "cuda"
    model = model_on(device, **LARGE) if on_gpu else model_on(device)
    batch = ragged(device, groups=8, group_size=8, prompt=64, length=192) if on_gpu else ragged(device)
    size, room, plenty = (8, 300 * 2**20, 2**34) if on_gpu else (3, 2**18, 2**21)
    spec = EnsembleSpec(members=8, dropout=0.2, seed=5, scope=scope, last_k=2 if scope == "last_k" else None)
    truth = measure(model, batch, size, spec, 1, "all", ("bald", "rmi"), budget=plenty)
    with scarce(device, room, monkeypatch) as asked:
        found = measure(model, batch, size, spec, 1, "all", ("bald", "rmi"), budget=plenty)
    assert len(asked) > 1, "nothing was short of memory"
    assert asked == [plenty >> power for power in range(len(asked))]
    for name in ("bald", "rmi"):
        torch.testing.assert_close(found.get(name), truth.get(name), rtol=1e-3, atol=5e-6)
    assert truth.bald.max() > 1e-3


def test_layers_without_room_split_their_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU's allocator has no cap; tests/disagreement/test_layer_major.py plants the fault")
    model = model_on(device, **LARGE)
    batch = ragged(device, groups=8, group_size=8, prompt=64, length=192)
    spec = EnsembleSpec(members=8, dropout=0.2, seed=5)
    truth = measure(model, batch, 8, spec, 1).bald
    with Twin(model, device).by_layers() as (twin, lend), scarce(device, 700 * 2**20, monkeypatch):
        found = measure_by_layers(twin, lend, batch, 8, spec, 1, budget=2**34).bald
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=5e-6)


def test_a_budget_is_what_the_device_can_still_give(device: torch.device) -> None:
    model, batch = model_on(device), ragged(device)
    before = members.default_budget(model, batch, 3)
    assert before > 2**20
    if device.type == "cuda":
        kept = torch.empty(2**32, dtype=torch.uint8, device=device)
        del kept  # cached by the allocator: as free as before
        assert members.default_budget(model, batch, 3) == before
        torch.cuda.empty_cache()
