"""Completions are read at the right temperature, under the step's members, in the right pieces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.test_batch import batch_of
from vdr_cli.config import Config, RolloutConfig
from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.reader import MeasureRequest
from vdr_cli.engine.engine import Engine
from vdr_cli.exploration.sources import SOURCES
from vdr_cli.training import reading
from vdr_cli.training.state import LoopState
from vdr_cli.training.timing import PhaseTimer


def resources(**sections: Any) -> Any:
    config = Config.model_validate({"rollout": {"group_size": 2, "temperature": 0.7}, **sections})
    engine = object.__new__(Engine)
    engine.device, engine.by_layers, engine.sequence = torch.device("cpu"), False, None
    engine.ds_engine = SimpleNamespace(module=SimpleNamespace(share_prompts=True, as_trees=False, packed=False))
    return SimpleNamespace(config=config, engine=engine, timer=PhaseTimer())


def test_log_probabilities_are_at_the_sampling_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batch by micro-batch, each without its own padding, put together again."""

    def plain(model: Any, prompts: Any, prompt_mask: Any, ids: Any, mask: Any, temperature: float, **_: Any) -> Any:
        return ids * mask / temperature, ids * mask * 10.0

    monkeypatch.setattr("vdr_cli.engine.engine.completion_logps", plain)
    completions = batch_of([0, 1, 2, 3], 4).completions
    logps, entropy = reading.read_logps(resources(train={"micro_batch_size": 2}), None, completions)
    expected = completions.completion_ids * completions.completion_mask
    assert logps.numpy() == pytest.approx((expected / 0.7).numpy())
    assert entropy.numpy() == pytest.approx((expected * 10.0).numpy())


@pytest.mark.parametrize(
    ("mode", "positions", "step", "shown"),
    [("end_of_sequence", "last", 6, 0), ("end_of_sequence", "last", 0, 2), ("per_token", "all", 6, 0)],
)
def test_members_are_the_steps(mode: str, positions: str, step: int, shown: int) -> None:
    requests: list[MeasureRequest] = []

    def measure(model: Any, request: MeasureRequest) -> Statistics:
        requests.append(request)
        return Statistics(rmi=torch.arange(float(len(request.completions))))

    res = resources(disagreement={"mode": mode, "measure": "rmi"})
    res.ensemble = SimpleNamespace(measure=measure)
    res.shows_tokens = lambda step: step == 0
    found = reading.measure_disagreement(res, step, None, batch_of([0, 1, 2, 3], 4).completions)
    assert found is not None and found.tolist() == [0, 1, 2, 3]
    (request,) = requests
    assert (request.step, request.positions, request.shown_rows) == (step, positions, shown)
    assert request.group_size == 2 and tuple(request.measures) == ("rmi",)


@pytest.mark.parametrize(
    ("rollout", "known"),
    [
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
        ({"min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"members": True}, False),
        ({"ahead": 1, "backend": "vllm"}, False),
    ],
    ids=str,
)
def test_the_samplers_log_probabilities_serve_where_they_are_the_policys(rollout: dict[str, Any], known: bool) -> None:
    cfg, completions = RolloutConfig.model_validate({"group_size": 2, **rollout}), batch_of([0, 1], 2).completions
    assert reading.sampled_under_policy(cfg, completions) is known
    assert reading.needs_policy(SOURCES["surprisal"], cfg, completions) is not known
    completions.sampler_logps[0, 0] = float("nan")  # a server that did not say
    assert reading.needs_policy(SOURCES["surprisal"], cfg, completions)


def test_nothing_is_read_that_the_source_does_not_ask_for() -> None:
    batch, policy = batch_of([0, 1, 2, 3], 2), reading.PolicyLogps()
    for name, expected in (("surprisal", {"log_probs"}), ("noise", {"uniforms"}), (None, set())):
        res = resources(bonus={"source": name or "none"})
        res.source = SOURCES[name] if name else None
        found = reading.read_for_bonus(res, LoopState(), None, batch, policy)
        assert set(found) == expected
    assert not reading.needs_policy(None, RolloutConfig(), batch.completions)
    assert reading.needs_policy(SOURCES["entropy"], RolloutConfig(), batch.completions)
