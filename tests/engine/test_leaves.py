"""Layers that are called twice in one graph, in a real DeepSpeed engine: the gradient, and how often it is reduced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdr_cli.engine.build import build_engine
from vdr_cli.engine.engine import Engine
from vdr_cli.models.loading import load_causal_lm
from vdr_cli.models.policy import completion_logps
from vdr_cli.samples import Completions


@pytest.fixture
def engine(device: torch.device, config, tmp_path: Path) -> Callable[..., Engine]:
    """engine(reduce_bucket_size): stage 3, nothing persistent."""

    def make(bucket: int | str) -> Engine:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": bucket}
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
        made = config(3)
        engine = made.engine.model_copy(update={"ds_config": str(tmp_path / "ds.json")})
        return build_engine(made.model_copy(update={"engine": engine}), device)

    return make


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Fills with the sizes of each reduction's tensors."""
    from deepspeed.runtime.zero import stage3

    sizes: list[list[int]] = []
    really = stage3.reduce_scatter_coalesced

    def counted(tensors: list[Tensor], *arguments: Any) -> list[Tensor]:
        sizes.append([tensor.numel() for tensor in tensors])
        return really(tensors, *arguments)

    monkeypatch.setattr(stage3, "reduce_scatter_coalesced", counted)
    return sizes


def tokens(batch: Completions, width: int) -> tuple[Tensor, ...]:
    """The batch with completions cut to a width."""
    completion = batch.completion_ids[:, :width], batch.completion_mask[:, :width]
    return batch.prompt_ids, batch.prompt_mask, *completion


@pytest.mark.parametrize("bucket", ["auto", 100, 10**6])
@pytest.mark.parametrize("width", [1, 6])
def test_gradients_are_a_plain_models_whatever_the_bucket(engine, completions, bucket: int | str, width: int) -> None:
    """Two micro-batches, and a forward before them whose graph is thrown away."""
    from deepspeed.utils import safe_get_full_grad

    made = engine(bucket)
    plain = load_causal_lm(made.causal_lm.config._name_or_path)
    batches = [tokens(completions, width), tokens(completions.rows(slice(2, 4)), width)]
    made.forward(*batches[0], 0.7)
    for number, batch in enumerate(batches):
        completion_logps(plain, *batch, 0.7)[0].sum().backward()
        made.backward(made.forward(*batch, 0.7)[0].sum(), last=number == 1)
    for (name, parameter), (_, other) in zip(made.causal_lm.named_parameters(), plain.named_parameters(), strict=True):
        assert (safe_get_full_grad(parameter) - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-7, name


def test_every_gradient_is_reduced_once_in_a_backward(engine, completions, reduced: list[list[int]]) -> None:
    made = engine("auto")
    made.backward(made.forward(*tokens(completions, 6), 0.7)[0].sum(), last=True)
    (sizes,) = reduced  # one reduction: the bucket of a small model holds everything
    assert sorted(sizes) == sorted(parameter.ds_numel for parameter in made.causal_lm.parameters())
