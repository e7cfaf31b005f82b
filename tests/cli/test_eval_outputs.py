"""The files that `vdr eval` writes beside its table, end to end on the starter; `vdr report` and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vdr_cli.cli import app
from vdr_cli.cli.comparison import as_markdown, show
from vdr_cli.cli.eval import Files


def test_every_output_of_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "starter", "starter", "--prompts", "2", "-n", "2", "--max-new-tokens", "8", "--members", "2"]
    arguments += ["--diversity", "--json", "n.json", "--markdown", "t.md", "--save", "s.parquet"]
    assert app.run(arguments) == 0
    written = json.loads(Path("n.json").read_text())
    assert {"pass@1", "pass@2", "distinct-1", "self_bleu", "disagreement"} <= written["models"][0].keys()
    (difference,) = written["differences"]
    assert difference["pass@1"] == 0.0
    for name in written["models"][0].keys() - {"model", "prompts", "samples", "distinct_by"}:
        assert name.endswith(("_low", "_high")) or {f"{name}_low", f"{name}_high"} <= difference.keys(), name
    assert "| pass@1 |" in Path("t.md").read_text()
    assert pq.read_table("s.parquet").num_rows == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "starter", "--save", "s.csv"], "give FILE.parquet"),
        (["eval", "starter", "--members", "1"], "--members"),
        (["eval", "starter", "--data", "no.jsonl"], "--data no.jsonl: no such file"),
        (["eval", "starter", "--data", "owner/name"], "rewards.functions is empty"),
        (["eval", "starter", "--markdown", "no/t.md"], "no directory"),
        (
            ["eval", "starter", "--markdown", "a", "--json", "./a"],
            "a is given for two of --json, --markdown",
        ),
        (["eval", "starter", "--reference", "nothing", "--prompts", "1"], "--reference nothing"),
        (["report", "nowhere"], "no such run directory or file"),
        (["report", "."], "no metrics.jsonl"),
    ],
)
def test_one_line_and_exit_code_two(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vdr: error:")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


class Result:
    """An evaluation of nothing."""

    def record(self) -> dict[str, object]:
        return {"model": "a"}

    values = draws = dict


def test_a_reader_that_goes_costs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("vdr_cli.cli.comparison.show", gone)
    with pytest.raises(BrokenPipeError):
        Files(str(tmp_path / "n.json"), None, None).write([Result()])  # type: ignore[list-item]
    assert json.loads((tmp_path / "n.json").read_text())["models"] == [{"model": "a"}]


def test_pictures_need_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.run(["report", str(tmp_path), "--png", "figures"]) == 2
    assert "--png needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_reports_do_without_matplotlib() -> None:
    """Its import is left to --png: the package is an extra."""
    imports = (
        "vdr_cli.train, vdr_cli.scoring.score, vdr_cli.report.page, vdr_cli.evaluation.evaluate, vdr_cli.cli.training"
    )
    code = f"import sys, {imports}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"


def test_markdown_has_a_column_a_model_and_survives_bars_in_names() -> None:
    rows = [{"model": "a|b", "pass@1": 0.5, "pass@1_low": 0.4, "pass@1_high": 0.6}, {"model": "c", "pass@1": 0.25}]
    assert as_markdown(rows, []) == (
        "|  | a\\|b | c |\n| --- | ---: | ---: |\n| pass@1 | 0.500 [0.400, 0.600] | 0.250 |\n"
    )


@pytest.mark.parametrize("width", [40, 80])
def test_models_that_do_not_fit_beside_each_other_are_blocks(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [
        {
            "model": name,
            "prompts": 4,
            "samples": 8,
            "mean_length": 212.0,
            "mean_length_low": 200.0,
            "mean_length_high": 220,
        }
        for name in ("a", "b", "[red]c")
    ]
    show(rows, [{**rows[0], "minus": "b"}])
    show([{**rows[0], "mean_length_low": float("nan"), "mean_length_high": float("nan")}], [])
    shown = capsys.readouterr().out
    assert shown.count("212 [200, 220]") == 4
    assert "nan" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert "[red]c" in shown
    assert "a - b" in shown
    assert "[low, high]: 95 %" in shown
