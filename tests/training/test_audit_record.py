"""The audit's record: when it is written, what it holds, and that it reads back as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.test_batch import batch_of
from vdr_cli.audit.evaluation import expected
from vdr_cli.audit.files import RunFiles
from vdr_cli.config import Config
from vdr_cli.exploration.bonus import RunningRms
from vdr_cli.grpo.losses import LossInputs
from vdr_cli.samples import Prompt
from vdr_cli.training import audit_record
from vdr_cli.training.batch import Advantages, Updates
from vdr_cli.training.state import LoopState


def a_run(folder: Path, step: int = 4, **observe: Any) -> Any:
    config = Config.model_validate({"observe": observe, "train": {"steps": 20}})
    state = LoopState(step=step, drawn=12, tokens=99, drawn_in_step=3, rms=RunningRms(average=0.75, weight=0.5))
    state.finished_rms = {"decay": 0.99, "average": 0.5, "weight": 0.25}
    resources = SimpleNamespace(
        config=config,
        directory=folder,
        ensemble=None,
        shown_measure=lambda: None,
        prompts=range(40),
        rewards=[SimpleNamespace(name="digits")],
        engine=SimpleNamespace(causal_lm=torch.nn.Linear(1, 1)),
    )
    return resources, state, SimpleNamespace(note=print)


@pytest.mark.parametrize(
    ("every", "iterations", "due"),
    [(None, 1, [0]), (0, 1, []), (3, 1, [0, 3, 6]), (3, 2, [0, 4, 6]), (1, 2, [0, 2, 4, 6])],
)
def test_the_first_step_and_every_nth(tmp_path, every, iterations, due) -> None:
    config = Config.model_validate(
        {"observe": {"audit_every": every}, "grpo": {"num_iterations": iterations}, "train": {"steps": 8}}
    )
    steps = range(0, 8, iterations)
    found = [step for step in steps if audit_record.is_due(config, step)]
    assert found == due


def test_a_record_reads_back_as_it_was(tmp_path) -> None:
    batch = batch_of([0, 1, 2, 3], 4)
    for prompt in batch.prompts:
        prompt.columns.update({"gold": prompt.row * 1.5, "image": b"\x00"})
    values = torch.arange(16.0).view(4, 4)
    advantages = Advantages(LossInputs(values, batch.completions.completion_mask), torch.arange(4.0))
    halves = [values[:2] * -1, values[2:] * -1, torch.zeros(1, 4)]  # the last: a rank's empty micro-batch
    updates = Updates(first_logps=halves, first_entropies=[half / 3 for half in halves], own=[True] * len(halves))
    run = a_run(tmp_path, audit_every=4)
    run[0].shown_measure = lambda: values[:2] / 7
    audit_record.save(*run, batch, advantages, updates)

    record = RunFiles(tmp_path, run[0].config, {}).record(4)
    mask = batch.completions.completion_mask
    assert record.step == 4 and record.state["rms"]["average"] == 0.5 and record.state["rms_after"]["average"] == 0.75
    assert (record.state["drawn"], record.state["drawn_now"], record.state["tokens"]) == (12, 3, 99)
    assert record.state["dataset_rows"] == 40 and record.state["dtype"] == "float32"
    assert record.state["lost_columns"] == ["image"]
    assert record.decoded("columns")[3] == {"gold": 4.5} and record.decoded("text") == batch.texts
    assert record.mask.tolist() == mask.tolist() and record.truncated.tolist() == [False, True, False, True]
    assert record.tokens("advantages").tolist() == (values * mask).tolist()
    assert record.tokens("logps").tolist() == (-values * mask).tolist()
    assert record.tokens("entropies") == pytest.approx((-values / 3 * mask).numpy())
    assert record.columns["measure_tokens"][2:] == [None, None] and not record.has("ref_logps")


def test_records_of_steps_that_are_made_again_go(tmp_path) -> None:
    (tmp_path / "audit").mkdir()
    for step in (0, 10, 20):
        (tmp_path / "audit" / f"step_{step:06d}.parquet").touch()
    audit_record.remove_from(tmp_path, 10)
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["step_000000.parquet"]
    audit_record.remove_from(tmp_path / "none", 0)


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path, capsys) -> None:
    run = a_run(tmp_path, audit_every=1)
    (tmp_path / "audit").touch()  # no directory can be made there
    batch = batch_of([0, 1], 2)
    advantages = Advantages(LossInputs(torch.zeros(2, 2), batch.completions.completion_mask), torch.zeros(2))
    zeros = [torch.zeros(2, 2)]
    audit_record.save(
        *run, batch, advantages, Updates(first_logps=zeros, first_entropies=zeros, own=[True] * len(zeros))
    )
    assert "cannot be written" in capsys.readouterr().out


def test_what_an_evaluation_sampled_reads_back(tmp_path) -> None:
    prompts = [Prompt(7, "2+2=", [1, 2], {"gold": 4}), Prompt(9, [{"role": "user", "content": "hi"}], [3], {})]
    result = SimpleNamespace(
        prompts=prompts,
        texts=[["4", "5"], ["hello", ""]],
        completion_ids=[[[4, 1], [5]], [[6, 7, 8], []]],
        solved=np.array([[True, False], [False, False]]),
        ks=(1, 2),
        rewards={"right": np.array([[1.0, 0.0], [np.nan, 0.0]])},
        truncated=np.array([[False, True], [False, True]]),
    )
    res, state, log = a_run(tmp_path, step=4, audit_every=4)
    audit_record.save_evaluation(res, state, log, result)
    found = RunFiles(tmp_path, res.config, {})
    record = found.record(4, "eval")
    assert found.evaluations == [4] and found.steps == []
    assert record.columns["row"] == [7, 7, 9, 9] and record.lengths.tolist() == [2, 1, 3, 0]
    assert record.decoded("text")[1:3] == ["5", [{"role": "assistant", "content": "hello"}]]
    assert record.state["k"] == [1, 2] and record.state["samples"] == 2
    assert np.isnan(record.rewards[2, 0]) and record.rewards[0, 0] == 1.0
    assert expected(record, res.config)["pass@1"] == 0.25
    audit_record.remove_from(tmp_path, 4)
    assert found.evaluations == [4], "the evaluation after step 4 is of the checkpoint"
    audit_record.remove_from(tmp_path, 3)
    assert found.evaluations == []
    audit_record.save_evaluation(*a_run(tmp_path, step=5, audit_every=4), result)
    assert found.evaluations == []
