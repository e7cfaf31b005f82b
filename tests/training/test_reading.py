"""How completions are read: at which temperature, under which step's members, in which pieces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.test_batch import batch_of
from vdr_cli.config import Config
from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.training import reading
from vdr_cli.training.timing import PhaseTimer


def resources(**sections: Any) -> Any:
    config = Config.model_validate({"rollout": {"group_size": 2, "temperature": 0.7}, **sections})
    engine = SimpleNamespace(device=torch.device("cpu"), share_prompts=True, as_trees=False, by_layers=False)
    return SimpleNamespace(config=config, engine=engine, timer=PhaseTimer(), ensemble=EnsembleSpec(4, seed=3))


def test_log_probabilities_are_at_the_sampling_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batch by micro-batch, each without its own padding, put together again."""

    def plain(model: Any, prompts: Any, prompt_mask: Any, ids: Any, mask: Any, temperature: float, **_: Any) -> Any:
        return ids * mask / temperature, ids * mask * 10.0

    monkeypatch.setattr(reading, "completion_logps", plain)
    completions = batch_of([0, 1, 2, 3], 4).completions
    logps, entropy = reading.read_logps(resources(train={"micro_batch_size": 2}), None, completions)
    expected = completions.completion_ids * completions.completion_mask
    assert logps.numpy() == pytest.approx((expected / 0.7).numpy())
    assert entropy.numpy() == pytest.approx((expected * 10.0).numpy())


@pytest.mark.parametrize(
    ("mode", "shown", "asked"),
    [("end_of_sequence", False, ["last"]), ("end_of_sequence", True, ["last", "all"]), ("per_token", True, ["all"])],
)
def test_members_are_the_steps(mode: str, shown: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def measure(model: Any, **request: Any) -> Statistics:
        calls.append(request)
        return Statistics(rmi=torch.full((len(request["completions"]),), 0.5))

    monkeypatch.setattr(reading, "measure", measure)
    res = resources(disagreement={"mode": mode, "measure": "rmi"})
    found = reading.measure_disagreement(res, 6, None, batch_of([0, 1, 2, 3], 4).completions, None, shown)
    assert found is not None and len(found.values) == 4
    assert [call["positions"] for call in calls] == asked
    assert all(call["step"] == 6 and call["spec"] is res.ensemble and call["group_size"] == 2 for call in calls)
    assert [len(call["completions"]) for call in calls] == [4, 2][: len(asked)]
