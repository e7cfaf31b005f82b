"""`vdr audit` as it is typed: bad input is one line, and what it prints fits 80 columns."""

from __future__ import annotations

import json

import pytest

from vdr_cli.audit.lines import Judge
from vdr_cli.cli import app
from vdr_cli.cli import audit as command


@pytest.fixture
def run_directory(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {steps: 2}\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{}/none"], 2, "no such run directory"),
        (["{}"], 2, "not a run directory"),
        (["{}/run"], 2, "observe.audit_every"),
        (["{}/run", "--steps", "0;1"], 2, "whole numbers"),
        (["{}/run", "--only", "rewards,lossses"], 2, "no such part"),
        (["{}/run", "--json", "{}/none/a.json"], 2, "--json"),
    ],
)
def test_bad_input_is_one_line(run_directory, arguments, code, said, capsys):
    given = [argument.format(run_directory.parent) for argument in arguments]
    assert app.run(["audit", *given]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_damaged_record_is_named(run_directory, capsys):
    (run_directory / "audit").mkdir()
    (run_directory / "audit" / "step_000000.parquet").write_text("torn")
    assert app.run(["audit", str(run_directory)]) == 3
    assert "step_000000.parquet: not an audit record" in capsys.readouterr().err
    assert app.run(["audit", str(run_directory), "--steps", "1"]) == 2
    assert "there are 0" in capsys.readouterr().err


def test_the_verdicts_are_the_exit_code_and_the_table_fits(monkeypatch, run_directory, tmp_path, capsys):
    judge = Judge(0, "float32")
    lines = [
        judge.compare("sampling/importance_sampling_ratio/mean", -1.23456789e-12, -1.23456789e-12, "mean"),
        judge.skipped("update of the weights", "no checkpoint [after] step 1"),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("vdr_cli.audit.audit.audit_run", lambda *arguments: lines)
    out = tmp_path / "audit.json"
    assert app.run(["audit", str(run_directory), "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "1 within their bounds, 0 outside, 1 not recomputed" in shown and "[after]" in shown
    assert json.loads(out.read_text())["within"] is True

    lines.append(judge.compare("loss", 1.0, 2.0, "loss"))
    assert app.run(["audit", str(run_directory), "--outside"]) == command.OUTSIDE
    shown = capsys.readouterr().out
    assert "OUTSIDE" in shown and "sampling/" not in shown
