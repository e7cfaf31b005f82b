"""A study without its run directories: the report comes again, and the study goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_running import machine  # noqa: F401
from vdr_cli.cli.study import _show_plan
from vdr_cli.config.load import dump_config, load_config
from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.study.archive import kept_run
from vdr_cli.study.directory import open_directory
from vdr_cli.study.load import load_study
from vdr_cli.study.page import archive, rebuild, write_results
from vdr_cli.study.plan import Task, runs_of
from vdr_cli.study.record import read_record, record_of

FILES = ("study.json", "study.md", "study.html")
RECORDS = sorted((Path(__file__).parents[2] / "docs" / "evidence").glob("*/record"))


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


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_the_registered_file_continues_a_published_archive(record: Path, tmp_path: Path) -> None:
    """Each archive holds the study as it is registered, whole or cut short."""
    shutil.copytree(record, tmp_path / "study")
    registered = load_study(record.parent / "study.yaml")
    study = replace(registered, file=registered.file.model_copy(update={"output": str(tmp_path / "study")}))
    assert open_directory(study, resume=True)[1] == []


def test_a_dry_run_counts_the_runs_of_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dose = next(record for record in RECORDS if record.parent.name == "countdown4-dose")
    shutil.copytree(dose, tmp_path / "study")
    registered = load_study(dose.parent / "study.yaml")
    study = replace(registered, file=registered.file.model_copy(update={"output": str(tmp_path / "study")}))
    _show_plan(study, runs_of(study), resume=True)
    assert re.search(r"already evaluated +45\n", capsys.readouterr().out)


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
    with pytest.raises(ConfigError, match="holds the study itself"):
        archive(directory.path, directory.path)
    settings = directory.run(Task("starter", "grpo", 0)) / "config.yaml"
    settings.rename(tmp_path / "config.yaml")
    with pytest.raises(DataError, match=r"config\.yaml: cannot be read"):
        archive(directory.path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    (tmp_path / "config.yaml").rename(settings)
    archive(directory.path, tmp_path / "kept")
    (tmp_path / "kept" / "metrics.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"metrics\.parquet: cannot be read"):
        rebuild(tmp_path / "kept")


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def ended(make_study: Any, folder: str, **more: Any) -> Path:
    """The directory of a small study that has ended."""
    arms = {"plain": (0.0, 0.0), "noise": (0.0, 0.0)}
    study, directory = make_study(arms, prompts=4, folder=folder, **{"seeds": 2, **more})
    write_results(record_of(study, directory), directory.path)
    return Path(directory.path)


@pytest.mark.parametrize("name", ["study.yaml", "configs/notes.yaml", "README.md", "metrics.parquet"])
def test_a_directory_that_holds_something_else_is_left_alone(make_study: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "kept" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="kept: is not empty and not an archive alone"):
        archive(ended(make_study, "study"), tmp_path / "kept")
    assert files_in(tmp_path / "kept") == {name: b"mine"}


def test_a_file_and_a_studys_directory_are_no_targets(make_study: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    one, other = ended(make_study, "one"), ended(make_study, "other")
    for target, message in ((tmp_path / "file", "file: a file; "), (other, "other: holds the runs of a study")):
        with pytest.raises(ConfigError, match=message):
            archive(one, target)
    assert (tmp_path / "file").read_text() == "mine"


def test_only_an_archive_of_the_same_study_is_replaced(make_study: Any, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    archive(ended(make_study, "one"), kept)  # an empty directory
    before = files_in(kept)
    with pytest.raises(ConfigError, match=r"kept: holds the archive of another study \(equivalence differs\)"):
        archive(ended(make_study, "other", equivalence=0.05), kept)
    assert files_in(kept) == before
    (kept / "configs" / "starter-gone.yaml").write_text("left by another study")
    archive(ended(make_study, "grown", seeds=3), kept)
    assert sorted(path.name for path in (kept / "configs").iterdir()) == ["starter-noise.yaml", "starter-plain.yaml"]
    assert len(read_record(kept).runs) == 6
    with pytest.raises(ConfigError, match="seeds 2 missing"):
        archive(tmp_path / "one", kept)


def test_an_archive_that_cannot_be_written_leaves_the_target_as_it_was(
    make_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, source = tmp_path / "kept", ended(make_study, "grown", seeds=3)
    archive(ended(make_study, "study"), kept)
    before = files_in(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vdr_cli.study.archive.pq.write_table", full)
    with pytest.raises(MachineError, match=r"kept: the archive cannot be written \(No space left on device\)"):
        archive(source, kept)
    assert files_in(tmp_path) == before


def test_study_yaml_need_not_be_there(make_study: Any, tmp_path: Path) -> None:
    """study.json holds it too."""
    source = ended(make_study, "study")
    archive(source, tmp_path / "with")
    (source / "study.yaml").unlink()
    archive(source, tmp_path / "without")
    assert files_in(tmp_path / "with") == files_in(tmp_path / "without")


def test_runs_that_the_record_does_not_know_are_not_left_out(make_study: Any, tmp_path: Path) -> None:
    """Neither those of a grown study that was killed, nor others that were evaluated since."""
    source = ended(make_study, "study", seeds=1)
    shutil.copy(source / "study.json", tmp_path / "first.json")
    shutil.rmtree(source)
    ended(make_study, "study", seeds=2)
    shutil.copy(tmp_path / "first.json", source / "study.json")
    with pytest.raises(ConfigError, match=r"study\.json is older than study\.yaml \(other seeds\); finish the study"):
        archive(source, tmp_path / "kept")
    (source / "study.yaml").unlink()
    tree = json.loads((source / "study.json").read_text())
    tree["study"]["seeds"] = [0, 1]
    (source / "study.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"study\.json lacks starter/plain seed 1, starter/noise seed 1, evaluated"):
        archive(source, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_trial_that_the_record_does_not_know_is_not_left_out(make_study: Any, tmp_path: Path) -> None:
    tuning = {"seeds": [9], "trials": {"plain": [{}, {"grpo.beta": 0.1}], "noise": [{}, {"grpo.beta": 0.1}]}}
    source = ended(make_study, "study", tuning=tuning)
    tree = json.loads((source / "study.json").read_text())
    tree["tuning"].pop()
    (source / "study.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"study\.json lacks starter/noise trial 2, evaluated since"):
        archive(source, tmp_path / "kept")


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
