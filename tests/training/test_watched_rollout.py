"""The ensemble watches what `start` samples and nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling
from vdr_cli.training.watched_rollout import WatchedRollout

G = 3
REQUEST = RolloutRequest([[5, 6, 7], [8, 9]], G, Sampling(5), [1, 2])
TOP = EnsembleSpec(members=2, scope="last_k", last_k=1)


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2)).eval()


def lowest_layer_runs(model: Qwen2ForCausalLM, reader: EnsembleReader, completions: Any) -> int:
    calls: list[int] = []
    with hooked(model.model.layers[0].mlp.register_forward_hook, lambda *_: calls.append(1)):
        reader.measure(model, MeasureRequest(completions, G))
    return len(calls)


def test_what_start_samples_is_not_read_again(model: Qwen2ForCausalLM) -> None:
    reader = EnsembleReader(TOP)
    rollout = WatchedRollout(TransformersRollout(pad_id=0, eos_ids=[2]), reader)
    wait = rollout.start(model, REQUEST)
    completions = wait()
    assert wait() is completions
    assert lowest_layer_runs(model, reader, completions) == 0
    evaluated = rollout.generate(model, REQUEST)
    assert torch.equal(evaluated.completion_ids, completions.completion_ids)
    assert lowest_layer_runs(model, reader, evaluated) == 2


def test_nothing_is_watched_where_members_differ_from_the_first_layer_on(model: Qwen2ForCausalLM) -> None:
    given: list[Any] = []

    def start(model: Any, request: RolloutRequest) -> Any:
        given.append(request.watcher)
        return lambda: "completions"

    rollout = WatchedRollout(SimpleNamespace(start=start), EnsembleReader(EnsembleSpec(members=2)))
    assert rollout.start(model, REQUEST)() == "completions"
    assert given == [None]


def test_a_second_watcher_is_refused(model: Qwen2ForCausalLM) -> None:
    rollout = WatchedRollout(TransformersRollout(pad_id=0, eos_ids=[2]), EnsembleReader(TOP))
    with pytest.raises(ValueError, match="no other watcher"):
        rollout.start(model, replace(REQUEST, watcher=SimpleNamespace(seen=None)))
