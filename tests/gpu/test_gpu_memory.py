"""Memory: log-probabilities never hold (N, V); an ensemble without room splits its work and gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from gpu_reference import model_on, ragged, sibling
from torch import nn

from vdr_cli.disagreement import memory, pieces
from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.information import token_statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine.gathered import GatheredModel
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.models.head import Head

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
    chunked = sibling("models/test_logprobs").chunked_logps

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
def scarce(device: torch.device, room: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside the block only so many more bytes can be had; a CPU refuses more than two rows. The sizes halved."""
    halved: list[int] = []
    real = pieces.Piece.halves

    def halves(piece: pieces.Piece) -> list[pieces.Piece]:
        halved.append(piece.size)
        return real(piece)

    def refuse(module: nn.Module, arguments: Any, output: Any) -> None:
        if device.type != "cuda" and len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, hooked(decoder_layers(model)[-1].register_forward_hook, refuse):
        patch.setattr(pieces.Piece, "halves", halves)
        if device.type != "cuda":
            yield halved
            return
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        try:
            yield halved
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
    request = MeasureRequest(batch, size, 1, measures=("bald", "rmi"), budget=plenty)
    truth = EnsembleReader(spec).measure(model, request)
    with scarce(device, room, model, monkeypatch) as halved:
        found = EnsembleReader(spec).measure(model, request)
    assert halved, "nothing was short of memory"
    for name in ("bald", "rmi"):
        torch.testing.assert_close(found.get(name), truth.get(name), rtol=1e-3, atol=5e-6)
    assert truth.bald.max() > 1e-3


def test_layers_without_room_split_their_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = device.type == "cuda"
    model = model_on(device, **LARGE) if on_gpu else model_on(device)
    batch = ragged(device, groups=8, group_size=8, prompt=64, length=192) if on_gpu else ragged(device)
    request = MeasureRequest(batch, 8 if on_gpu else 3, 1, budget=2**34)
    spec = EnsembleSpec(members=8, dropout=0.2, seed=5)
    truth = EnsembleReader(spec).measure(model, request).bald
    with (
        GatheredModel(model, device, None).layer_by_layer() as (twin, whole_layer),
        scarce(device, 700 * 2**20, twin, monkeypatch) as halved,
    ):
        found = EnsembleReader(spec, partial(nullcontext, whole_layer)).measure(twin, request).bald
    assert halved, "nothing was short of memory"
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=5e-6)


def test_a_budget_is_what_the_device_can_still_give(device: torch.device) -> None:
    model, batch = model_on(device), ragged(device)
    before = memory.default_budget(model, batch, 3)
    assert before > 2**20
    if device.type == "cuda":
        kept = torch.empty(2**32, dtype=torch.uint8, device=device)
        del kept  # cached by the allocator: as free as before
        assert memory.default_budget(model, batch, 3) == before
        torch.cuda.empty_cache()
