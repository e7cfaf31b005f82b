"""A study without its run directories: the report comes again, and the study goes on."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_running import machine  # noqa: F401
from vdr_cli.config.load import dump_config, load_config
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.study.archive import kept_run
from vdr_cli.study.directory import open_directory
from vdr_cli.study.load import load_study
from vdr_cli.study.page import archive, rebuild, write_results
from vdr_cli.study.plan import Task, runs_of
from vdr_cli.study.record import record_of

FILES = ("study.json", "study.md", "study.html")


def test_an_archive_gives_the_report_byte_for_byte(make_study: Any, tmp_path: Path) -> None:
    tuning = {
        "seeds": [77],
        "trials": {arm: [{"grpo.beta": 0.1}, {}] for arm in ("grpo", "disagreement", "pass_at_k", "bald_per_token")},
    }
    study, directory = make_study(seeds=3, tuning=tuning, contrasts=[["pass_at_k", "disagreement"]])
    for task in runs_of(study):
        (directory.run(task) / "config.yaml").write_text(dump_config(study.config(task.bed, task.arm, task.seed)))
    write_results(record_of(study, directory), directory.path)
    kept = tmp_path / "kept"
    archive(directory.path, kept)
    for name in ("study.json", "study.md"):
        shown = (kept / name).read_text().replace("# kept", "# wide").replace('"title": "kept"', '"title": "wide"')
        assert shown == (directory.path / name).read_text()
    before = [(kept / name).read_bytes() for name in FILES]
    shutil.rmtree(directory.path)
    rebuild(kept)
    assert [(kept / name).read_bytes() for name in FILES] == before
    config = load_config(kept / "configs" / "starter-disagreement.yaml")
    assert config.train.seed == 0 and config.train.learning_rate == 1.1e-4
    run = kept_run(kept, Task("starter", "grpo", 1))
    assert abs(run.started.timestamp() - time.time()) < 3600
    assert run.metrics["step_time"] == dict.fromkeys(range(1, 41), 0.5)


def test_a_study_goes_on_from_its_archive(machine: Any, tmp_path: Path) -> None:  # noqa: F811
    tuning = {"seeds": [9], "trials": {"grpo": [{}, {"grpo.beta": 0.1}], "noise": [{"grpo.beta": 0.1}, {}]}}
    runner, made = machine(tuning=tuning)
    assert runner.run() == 0
    directory = made.directory.path
    write_results(record_of(runner.study, made.directory), directory)
    archive(directory, tmp_path / "kept")
    shutil.rmtree(directory)
    shutil.copytree(tmp_path / "kept", directory)
    runner, made = machine(tuning=tuning, resume=True, seeds=3)
    assert runner.run() == 0
    assert made.started == [f"{do} starter/{arm} seed 2" for arm in ("grpo", "noise") for do in ("train", "measure")]
    record = record_of(runner.study, made.directory)
    assert sorted((run.arm, run.seed) for run in record.runs) == [
        (arm, n) for arm in ("grpo", "noise") for n in range(3)
    ]
    assert record.start("starter") is not None and len(record.tuning) == 4
    write_results(record, directory)
    kept = json.loads((tmp_path / "kept" / "study.json").read_text())
    assert json.loads((directory / "study.json").read_text())["tuning"] == kept["tuning"]


def test_the_registered_file_continues_a_published_archive(tmp_path: Path) -> None:
    """The archive holds 43 of the registered 60 seeds, and the study file with all of them."""
    bed = Path(__file__).parents[2] / "docs" / "evidence" / "countdown4-confirm"
    shutil.copytree(bed / "record", tmp_path / "study")
    registered = load_study(bed / "study.yaml")
    study = replace(registered, file=registered.file.model_copy(update={"output": str(tmp_path / "study")}))
    assert open_directory(study, resume=True)[1] == []


def test_a_tuned_arm_joins_an_archive_by_the_start_kept_there(machine: Any, tmp_path: Path) -> None:  # noqa: F811
    arms: dict[str, Any] = {"grpo": {"train.learning_rate": 1e-4}, "noise": {"train.learning_rate": 2e-4}}
    tuning: dict[str, Any] = {"seeds": [9], "trials": {"grpo": [{}], "noise": [{}]}}
    runner, made = machine(arms=arms, tuning=tuning, endpoint="new_problems")
    assert runner.run() == 0
    directory = made.directory.path
    write_results(record_of(runner.study, made.directory), directory)
    archive(directory, tmp_path / "kept")
    shutil.rmtree(directory)
    shutil.copytree(tmp_path / "kept", directory)
    arms["new"], tuning["trials"]["new"] = {"train.learning_rate": 3e-4}, [{}]
    runner, made = machine(arms=arms, tuning=tuning, endpoint="new_problems", resume=True)
    assert runner.run() == 0
    names = ["starter/new trial 1 seed 9", "starter/new seed 0", "starter/new seed 1"]
    assert made.started == [f"{do} {name}" for name in names for do in ("train", "measure")]


def test_an_archive_of_other_settings_is_refused(machine: Any, tmp_path: Path) -> None:  # noqa: F811
    runner, made = machine()
    runner.run()
    directory = made.directory.path
    write_results(record_of(runner.study, made.directory), directory)
    archive(directory, tmp_path / "kept")
    (config,) = (tmp_path / "kept" / "configs").glob("starter-grpo.yaml")
    config.write_text(config.read_text().replace("steps: 40", "steps: 41"))
    shutil.rmtree(directory)
    shutil.copytree(tmp_path / "kept", directory)
    runner, _ = machine(resume=True)
    with pytest.raises(ConfigError, match="starter/grpo seed 0 ran with other settings than the study gives it"):
        runner.run()


def test_what_is_no_archive_is_one_line(make_study: Any, tmp_path: Path) -> None:
    study, directory = make_study(seeds=2)
    write_results(record_of(study, directory), directory.path)
    with pytest.raises(ConfigError, match="holds the runs of a study"):
        archive(directory.path, directory.path)
    with pytest.raises(DataError, match=r"config\.yaml: cannot be read"):
        archive(directory.path, tmp_path / "kept")
    for task in runs_of(study):
        (directory.run(task) / "config.yaml").write_text(dump_config(study.config(task.bed, task.arm, task.seed)))
    archive(directory.path, tmp_path / "kept")
    (tmp_path / "kept" / "metrics.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"metrics\.parquet: cannot be read"):
        rebuild(tmp_path / "kept")


def test_pairs_of_arms_are_compared(make_study: Any) -> None:
    study, directory = make_study(seeds=5, contrasts=[["pass_at_k", "disagreement"], ["disagreement", "grpo"]])
    record = record_of(study, directory)
    write_results(record, directory.path)
    results = json.loads((directory.path / "study.json").read_text())["results"]["starter"]["pass@64"]
    own = results["disagreement"]["difference"]
    text = (directory.path / "study.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| disagreement minus grpo | 5 |"))
    low, high = (f"{abs(own[name]):.3f}" for name in ("low", "high"))
    assert f"{abs(own['value']):.3f}" in line and low in line and high in line
    assert "pass_at_k minus disagreement" in (directory.path / "study.html").read_text()
