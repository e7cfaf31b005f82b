"""Checkpoints in DeepSpeed's forms, written by hand: cut between ranks, padded, with objects nobody needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vdr_cli.audit import checkpoint
from vdr_cli.errors import DataError

A = torch.arange(6.0).view(2, 3)
B = torch.arange(5.0) + 10
SHAPES = [{"causal_lm.a": A.shape}, {"causal_lm.b": B.shape}]


class Foreign:
    """A class of a module that the reader must not import."""

    def __init__(self, name: str) -> None:
        self.name = name


def written(path: Path, ranks: list[dict], model: dict) -> Path:
    folder = path / "engine"
    folder.mkdir(parents=True)
    torch.save({"param_shapes": SHAPES, "foreign": Foreign("x"), **model}, folder / "mp_rank_00_model_states.pt")
    for rank, state in enumerate(ranks):
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state | {"stage": Foreign("y")}}, file)
    return path


def moments(groups: list[torch.Tensor]) -> dict:
    state = {n: {"step": torch.tensor(4.0), "exp_avg": g * 2, "exp_avg_sq": g * 3} for n, g in enumerate(groups)}
    return {"state": state, "param_groups": []}


def assert_read(saved: checkpoint.Saved) -> None:
    assert saved.count == 4
    for found, factor in ((saved.weights, 1), (saved.first, 2), (saved.second, 3)):
        assert torch.equal(found["a"], A * factor) and torch.equal(found["b"], B * factor)


def test_zero3_shares_every_parameter_out(tmp_path):
    pad = torch.zeros(1)
    ranks = [[A.flatten()[:3], B[:3]], [A.flatten()[3:], torch.cat([B[3:], pad])]]
    states = [{"fp32_flat_groups": groups, "optimizer_state_dict": moments(groups)} for groups in ranks]
    assert_read(checkpoint.read(written(tmp_path / "step", states, {})))


def test_zero2_cuts_a_groups_parameters_in_a_row(tmp_path):
    pad = torch.zeros(1)
    ranks = [[A.flatten()[:4], B[:3]], [torch.cat([A.flatten()[4:], pad, pad]), torch.cat([B[3:], pad])]]
    states = [{"single_partition_of_fp32_groups": groups, "base_optimizer_state": moments(groups)} for groups in ranks]
    assert_read(checkpoint.read(written(tmp_path / "step", states, {})))


def test_zero0_keeps_the_models_own_state(tmp_path):
    model = {"module": {"causal_lm.a": A, "causal_lm.b": B}, "optimizer": moments([A, B])}
    assert_read(checkpoint.read(written(tmp_path / "step", [], model)))


def test_a_checkpoint_of_another_form_is_one_line(tmp_path):
    with pytest.raises(DataError, match="weights cannot be read"):
        checkpoint.read(written(tmp_path / "step", [{"else": 1}], {}))
    with pytest.raises(DataError, match="weights cannot be read"):
        checkpoint.read(tmp_path / "none")


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = written(tmp_path / "step", [], {"evil": Evil(), "module": {}, "optimizer": {"state": {}}})
    with pytest.raises(DataError):
        checkpoint.read(path)
    saved = checkpoint._load(path / "engine" / "mp_rank_00_model_states.pt")
    assert isinstance(saved["evil"], checkpoint._Inert)
