"""study.json, evaluation.json and metrics.parquet with something wrong in them: one line and exit code 3."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vdr_cli.errors import ConfigError, DataError, VdrError
from vdr_cli.study.directory import StudyDirectory
from vdr_cli.study.page import archive, rebuild, write_results
from vdr_cli.study.plan import Task
from vdr_cli.study.record import read_record, record_of
from vdr_cli.study.stored import read_counts

ARMS = {"plain": (0.0, 0.0), "noise": (0.0, 0.0)}
EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


@pytest.fixture
def ended(make_study: Callable[..., Any]) -> StudyDirectory:
    """A small tuned study that has ended."""
    tuning = {"seeds": [77], "trials": {arm: [{"grpo.beta": 0.1}, {}] for arm in ARMS}}
    evaluation = {"samples": 64, "start_samples": 128}
    study, directory = make_study(
        ARMS, prompts=4, seeds=2, evaluation=evaluation, tuning=tuning, contrasts=[["plain", "noise"]]
    )
    write_results(record_of(study, directory), directory.path)
    return directory


def run(tree: dict[str, Any]) -> dict[str, Any]:
    """The run plain seed 1, whose line is runs[2]."""
    return next(row for row in tree["runs"] if (row["arm"], row["seed"]) == ("plain", 1))


RUN = "runs[2] (starter/plain seed 1)"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "only the format": (lambda tree: [tree.pop(key) for key in list(tree) if key != "format"], "title is missing"),
    "no runs": (lambda tree: tree.pop("runs"), "runs is missing"),
    "no study": (lambda tree: tree.pop("study"), "study is missing"),
    "runs of text": (lambda tree: tree.update(runs="x"), "runs must be a valid list, not 'x'"),
    "a run that is none": (lambda tree: tree["runs"].append(3), "runs[4] must be a valid dictionary, not 3"),
    "an extra key": (lambda tree: run(tree).update(extra=1), f"{RUN}: extra is not a key of a run"),
    "no solved": (lambda tree: run(tree).pop("solved"), f"{RUN}: solved is missing"),
    "no first success": (lambda tree: run(tree).pop("first_success"), f"{RUN}: first_success is missing"),
    "one short": (lambda tree: run(tree)["solved"].pop(), "runs: starter/plain seed 1: solved has 3 values for 4"),
    "one long": (lambda tree: run(tree)["reward"].append(0.5), "starter/plain seed 1: reward has 5 values for 4"),
    "too many": (lambda tree: run(tree)["solved"].__setitem__(3, 65), "seed 1: solved[3] is 65, of 64 completions"),
    "negative": (lambda tree: run(tree)["solved"].__setitem__(0, -1), f"{RUN}: solved[0] must be greater than or"),
    "half": (
        lambda tree: run(tree)["solved"].__setitem__(0, 1.5),
        f"{RUN}: solved[0] must be a valid integer, not 1.5",
    ),
    "null": (lambda tree: run(tree)["solved"].__setitem__(0, None), "solved[0] must be a valid integer, not None"),
    "true": (lambda tree: run(tree)["classes"].__setitem__(0, True), "classes[0] must be a valid integer, not True"),
    "no number": (lambda tree: run(tree)["reward"].__setitem__(0, float("nan")), "reward[0] must be a finite number"),
    "text": (lambda tree: run(tree).update(steps="40"), "steps must be a valid integer, not '40'"),
    "few samples": (lambda tree: run(tree).update(samples=32), "samples is 32, and the study asks for 64"),
    "no samples": (lambda tree: tree["starts"][0].update(samples=0), "samples must be greater than or equal to 1"),
    "unknown arm": (lambda tree: run(tree).update(arm="bald"), "seed 1: arm is bald; the study has plain, noise"),
    "unknown bed": (lambda tree: run(tree).update(bed="x"), "runs: x/plain seed 1: bed is x; the study has starter"),
    "unknown seed": (lambda tree: run(tree).update(seed=5), "seed 5: seed is 5, which is not one of the study's"),
    "no seed": (lambda tree: run(tree).update(seed=None), "seed is None, which is not one of the study's"),
    "unknown trial": (lambda tree: run(tree).update(trial=2), "seed 1: trial is 2; the study has 2"),
    "twice": (lambda tree: tree["runs"].append(run(tree)), "runs: starter/plain seed 1: is there twice"),
    "two starts": (lambda tree: tree["starts"].append(tree["starts"][0]), "starts: starter start: is there twice"),
    "a start with an arm": (lambda tree: tree["starts"][0].update(arm="plain"), "arm is given, and a starting model"),
    "rows of no bed": (lambda tree: tree["rows"].update(x=[0]), "rows: x is not a bed of the study"),
    "no rows": (lambda tree: tree["rows"].clear(), "starts: starter start: solved has 4 values for 0 prompts"),
    "endpoint": (lambda tree: tree["study"].update(endpoint="pas@64"), "study: endpoint: nothing computes pas@64"),
    "secondary": (lambda tree: tree["study"].update(secondary=["pass@65"]), "secondary.0: pass@65 needs 65"),
    "control": (lambda tree: tree["study"].update(control="bald"), "study: control: bald is not an arm"),
    "contrast": (lambda tree: tree["study"].update(contrasts=[["plain", "bald"]]), "contrasts.0: bald is not an arm"),
    "a path": (lambda tree: tree["study"]["arms"].update({"../x": {}}), "arms.../x: names a directory"),
    "no arms": (lambda tree: tree["study"].pop("arms"), "study: arms is required"),
    "no trial": (lambda tree: tree["tuning"][0].update(trial=2), "tuning: starter/plain trial 2: not a trial"),
    "no value": (lambda tree: tree["tuning"][0].pop("value"), "tuning[0].value is missing"),
    "taken": (lambda tree: tree["tuning"][0].update(taken="no"), "tuning[0].taken must be a valid boolean"),
    "format": (lambda tree: tree.update(format=2), "not the results of a study that this version of vdr can read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_one_line(ended: StudyDirectory, name: str) -> None:
    change, message = DAMAGE[name]
    path = ended.path / "study.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError) as error:
        rebuild(ended.path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in the tree, but for the results, which nothing reads."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    return [pair for key, value in items if key != "results" for pair in [(tree, key), *leaves(value)]]


def test_no_damage_is_a_traceback(ended: StudyDirectory) -> None:
    """Values exchanged at random: the record is read, or refused in one line."""
    path, draw = ended.path / "study.json", random.Random(0)
    text = path.read_text()
    refused = 0
    for _ in range(300):
        tree = json.loads(text)
        container, key = draw.choice(leaves(tree))
        container[key] = draw.choice([None, -1, 10**30, 1.5, "x", "", [], {}, [None], {"a": 1}, True, float("inf")])
        path.write_text(json.dumps(tree))
        try:
            read_record(ended.path)
        except VdrError as error:
            refused += 1
            assert error.exit_code == 3 and "\n" not in str(error)
    assert refused > 200


def test_a_tuning_without_a_value_is_reported(ended: StudyDirectory) -> None:
    """The mean first success over trials without a step is none: null in the file."""
    path = ended.path / "study.json"
    tree = json.loads(path.read_text())
    tree["tuning"][0]["value"] = None
    path.write_text(json.dumps(tree))
    rebuild(ended.path)
    assert "| starter | plain | grpo.beta: 0.1 |  |" in (ended.path / "study.md").read_text()


@pytest.mark.parametrize("key", ["request", "samples", "rows", "classes"])
def test_a_damaged_evaluation_counts_as_none(ended: StudyDirectory, key: str) -> None:
    path = ended.evaluation(Task("starter", "plain", 1))
    counts = json.loads(path.read_text())
    assert read_counts(path) == counts
    path.write_text(json.dumps({**counts, "solved": [*counts["solved"][:-1], 65]}))
    assert read_counts(path) is None
    counts.pop(key)
    path.write_text(json.dumps(counts))
    assert read_counts(path) is None
    record = read_record(ended.path)
    assert Task("starter", "plain", 1) not in {one.task for one in record_of(record.study, ended).runs}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_run_without_its_settings_or_metrics_is_one_line(ended: StudyDirectory, name: str) -> None:
    path = ended.run(Task("starter", "plain", 1)) / name
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: missing; "):
        record_of(read_record(ended.path).study, ended)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("reward", "x", "column reward holds string"),
        ("seed", "0", "column seed holds string"),
        ("arm", None, "column arm holds null"),
        ("step", 1.5, "column step holds double"),
    ],
)
def test_a_table_of_the_wrong_types_is_one_line(
    ended: StudyDirectory, tmp_path: Path, name: str, values: Any, message: str
) -> None:
    archive(ended.path, tmp_path / "kept")
    path = tmp_path / "kept" / "metrics.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array([values] * len(table))), path)
    with pytest.raises(DataError, match=message):
        rebuild(tmp_path / "kept")
    pq.write_table(table.drop_columns([name]) if name != "reward" else table.slice(0, 0), path)
    with pytest.raises(DataError, match=f"{path}: "):
        rebuild(tmp_path / "kept")


def test_the_missing_file_of_an_archive_is_named(ended: StudyDirectory, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    archive(ended.path, kept)
    (kept / "study.json").rename(tmp_path / "study.json")
    with pytest.raises(DataError, match=r"kept/study\.json: missing; the archive is not whole"):
        rebuild(kept)
    (tmp_path / "study.json").rename(kept / "study.json")
    (kept / "metrics.parquet").unlink()
    with pytest.raises(DataError, match=r"kept/metrics\.parquet: missing; restore the file"):
        rebuild(kept)


def test_a_study_that_has_not_ended_is_told_to(ended: StudyDirectory, tmp_path: Path) -> None:
    (ended.path / "study.json").unlink()
    for act in (rebuild, lambda path: archive(path, tmp_path / "kept")):
        with pytest.raises(ConfigError, match=r"has not ended, so there is no study\.json; finish it with .*--resume"):
            act(ended.path)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("record", sorted(EVIDENCE.glob("*/record")), ids=lambda path: path.parent.name)
def test_every_published_archive_can_be_read_and_archived_again(record: Path, tmp_path: Path) -> None:
    assert len(read_record(record).runs) > 0
    archive(record, tmp_path / "kept")
    for path in (path for path in record.rglob("*") if path.is_file() and path.name not in ("study.md", "study.html")):
        if path.suffix != ".parquet":
            assert (tmp_path / "kept" / path.relative_to(record)).read_bytes() == path.read_bytes(), path.name
    shutil.rmtree(tmp_path / "kept")
