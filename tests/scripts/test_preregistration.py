"""The check of records against their registration finds every way in which one may depart from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "verify"))

import preregistration
from git_history import History
from preregistration import DISCLOSED, Disclosed, check
from record_checks import ABSENT

from tests.study.conftest import EFFECTS, fill, study_with
from vdr_cli.config.load import dump_config
from vdr_cli.config.yaml_text import dump_tree
from vdr_cli.errors import VdrError
from vdr_cli.study.directory import StudyDirectory, study_tree
from vdr_cli.study.page import archive, write_results
from vdr_cli.study.plan import runs_of
from vdr_cli.study.record import chosen_trial, record_of

ROOT = Path(__file__).parents[2]
REGISTERED, STARTED, PUBLISHED = (datetime(2026, 3, 1, hour, tzinfo=UTC) for hour in (10, 12, 14))
ARMS = [arm.replace(" ", "_") for arm in EFFECTS]
PAGE = (
    "# Preregistration\n\nThe study `bed`.\n\n## Deviations\n\n- The gate is named\n  in the file. Cut after 2 seeds.\n"
)


def git(root: Path, *arguments: str, date: datetime = REGISTERED) -> None:
    stamp = str(int(date.timestamp())) + " +0000"
    names = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **names, "GIT_AUTHOR_DATE": stamp, "GIT_COMMITTER_DATE": stamp}
    command = ["git", "-c", "commit.gpgsign=false", "-C", str(root), *arguments]
    subprocess.run(command, check=True, capture_output=True, env=environment)


def commit(bed: Path, date: datetime) -> None:
    """Commit everything in the bed's repository, at this date."""
    root = bed.parents[2]
    git(root, "add", "-A")
    git(root, "commit", "-qm", "change", "--allow-empty", date=date)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which a small tuned study was registered; its record is there and not committed."""
    folder = tmp_path_factory.mktemp("registered")
    tuning = {"seeds": [77], "trials": {arm: [{"grpo.beta": 0.1}, {}] for arm in ARMS}}
    study = study_with(list(EFFECTS), folder / "study", seeds=3, tuning=tuning, evaluation={"prompts": 64})
    directory = StudyDirectory(folder / "study")
    fill(study, directory, {arm.replace(" ", "_"): effect for arm, effect in EFFECTS.items()}, prompts=64)
    for task in runs_of(study):
        trial = chosen_trial(study, directory, task.bed, str(task.arm))
        path = directory.run(task) / "config.yaml"
        path.write_text(dump_config(study.config(task.bed, str(task.arm), int(task.seed or 0), trial)))
        os.utime(path, (STARTED.timestamp(), STARTED.timestamp()))
    write_results(record_of(study, directory), directory.path)
    bed = folder / "root" / "docs" / "evidence" / "bed"
    bed.mkdir(parents=True)
    (bed / "study.yaml").write_text(dump_tree({"output": "studies/bed", **study_tree(study)}))
    (bed.parent / "preregistration.md").write_text(PAGE)
    git(folder, "init", "-q", "root")
    commit(bed, REGISTERED)
    archive(directory.path, bed / "record")
    return folder / "root"


@pytest.fixture
def bed(repository: Path, tmp_path: Path) -> Path:
    """A copy of that repository's study, to tamper with."""
    shutil.copytree(repository, tmp_path / "root")
    return tmp_path / "root" / "docs" / "evidence" / "bed"


def found(bed: Path, disclosed: Disclosed | None = None, date: datetime = PUBLISHED) -> list[str]:
    """The faults of the record, once published at this date."""
    commit(bed, date)
    return check(bed, History(bed.parents[2]), disclosed)[1]


def test_a_record_as_registered_has_no_faults(bed: Path) -> None:
    assert found(bed) == []


# ---- ways to tamper ----------------------------------------------------------------------------------------------


def edit_json(bed: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bed / "record" / "study.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def edit_table(bed: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = bed / "record" / "metrics.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def run_of(tree: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    return next(run for run in tree["runs"] if (run["arm"], run["seed"]) == (arm, seed))


def is_run(table: pa.Table, arm: str, seed: int) -> pa.Array:
    return pc.and_(pc.equal(table["arm"].cast(pa.string()), arm), pc.equal(table["seed"], seed))


def set_study(**keys: Any) -> Callable[[Path], object]:
    """In study.json and in study.yaml, as somebody would who wants another result."""

    def tamper(bed: Path) -> None:
        edit_json(bed, lambda tree: tree["study"].update(keys))
        tree = json.loads((bed / "record" / "study.json").read_text())["study"]
        (bed / "record" / "study.yaml").write_text(dump_tree(tree))

    return tamper


def set_runs(**keys: Any) -> Callable[[Path], object]:
    return lambda bed: edit_json(bed, lambda tree: [run.update(keys) for run in tree["runs"]])


def set_run(seed: int = 1, **keys: Any) -> Callable[[Path], object]:
    return lambda bed: edit_json(bed, lambda tree: run_of(tree, "grpo", seed).update(keys))


def drop(gone: int, arms: list[str]) -> Callable[[Path], object]:
    """Remove these arms' runs of a seed from both files."""

    def rest(tree: dict[str, Any]) -> None:
        tree["runs"] = [run for run in tree["runs"] if run["seed"] != gone or run["arm"] not in arms]

    def others(table: pa.Table) -> pa.Table:
        is_gone = pc.is_in(table["arm"].cast(pa.string()), pa.array(arms))
        return table.filter(pc.invert(pc.and_(is_gone, pc.equal(table["seed"], gone))))

    def tamper(bed: Path) -> None:
        edit_json(bed, rest)
        edit_table(bed, others)

    return tamper


def copy_counts(tree: dict[str, Any]) -> None:
    """Seed 0's counts over seed 2's."""
    names = ("solved", "classes", "reward", "tokens", "first_success")
    run_of(tree, "grpo", 2).update({name: run_of(tree, "grpo", 0)[name] for name in names})


def copy_metrics(bed: Path) -> None:
    """Seed 0's metrics over seed 2's."""

    def change(table: pa.Table) -> pa.Table:
        source = table.filter(is_run(table, "grpo", 0))
        place = table.column_names.index("seed")
        copied = source.set_column(place, "seed", pa.array([2] * len(source), pa.int64()))
        return pa.concat_tables([table.filter(pc.invert(is_run(table, "grpo", 2))), copied])

    edit_table(bed, change)


def set_started(moment: datetime | None) -> Callable[[Path], object]:
    def change(table: pa.Table) -> pa.Table:
        dates = pa.array([moment] * len(table), pa.timestamp("s", "UTC"))
        return table.set_column(table.column_names.index("started"), "started", dates)

    return lambda bed: edit_table(bed, change)


def replace_text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def tamper(bed: Path) -> None:
        text = (bed / name).read_text()
        assert old in text
        (bed / name).write_text(text.replace(old, new))

    return tamper


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda bed: (bed / name).write_bytes(data)


def remove(name: str) -> Callable[[Path], object]:
    return lambda bed: (bed / name).unlink()


def other_trials(tree: dict[str, Any]) -> None:
    """The runs with the other trial, which the tuning did not take."""
    for run in tree["runs"]:
        run["trial"] = 1 - run["trial"]


def other_trial(tree: dict[str, Any]) -> None:
    """The tuning with the other trial taken."""
    for row in tree["tuning"]:
        row["taken"] = not row["taken"]


def more_samples(bed: Path) -> None:
    """Another number of samples in the study and in its runs."""
    set_study(evaluation={"prompts": 64, "samples": 300, "start_samples": 2000, "seed": 0})(bed)
    edit_json(bed, lambda tree: [run.update(samples=300) for run in tree["runs"]])
    edit_json(bed, lambda tree: tree["starts"][0].update(samples=2000))


KEPT = "record/configs/starter-grpo.yaml"
EARLY = REGISTERED - timedelta(hours=1)
TAMPERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "endpoint": (set_study(endpoint="pass@128"), "endpoint is pass@128; registered is pass@64"),
    "equivalence": (set_study(equivalence=0.2), "equivalence is 0.2; registered is 0.02"),
    "control": (set_study(control="pass_at_k"), "control is pass_at_k; registered is grpo"),
    "evaluation": (
        set_study(evaluation={"prompts": 64, "samples": 256, "start_samples": 1024, "seed": 1}),
        "evaluation.seed is 1; registered is 0",
    ),
    "study.yaml alone": (
        replace_text("record/study.yaml", "pass@64", "pass@128"),
        "record/study.yaml: endpoint is pass@128",
    ),
    "run removed": (drop(1, ["grpo"]), "starter/grpo seed 1: missing; every arm of a seed is published"),
    "first seed removed": (drop(0, ARMS), "starter/grpo seed 2: an earlier seed has no runs"),
    "last seed removed": (drop(2, ARMS), "runs of 2 of 3 seeds; 3 by the registration and its deviations"),
    "run in the table only": (
        lambda bed: edit_json(bed, lambda tree: tree["runs"].remove(run_of(tree, "grpo", 2))),
        "starter/grpo seed 2: in metrics.parquet and not in study.json",
    ),
    "run in study.json only": (
        lambda bed: edit_table(bed, lambda table: table.filter(pc.invert(is_run(table, "grpo", 2)))),
        "grpo seed 2: ",
    ),
    "unregistered seed": (
        lambda bed: edit_json(bed, lambda tree: run_of(tree, "grpo", 2).update(seed=7)),
        "grpo seed 7: ",
    ),
    "counts copied": (lambda bed: edit_json(bed, copy_counts), "starter/grpo seed 2: the same counts as seed 0"),
    "metrics copied": (copy_metrics, "starter/grpo seed 2: the same rewards as seed 0"),
    "hashes zeroed": (set_runs(settings="0" * 16), "starter/grpo seed 0: settings 0000000000000000; those registered"),
    "trials swapped": (lambda bed: edit_json(bed, other_trials), "starter/grpo seed 0: ran as trial "),
    "trial not the best": (lambda bed: edit_json(bed, other_trial), "starter/grpo: its tuning did not take the best"),
    "trial missing": (
        lambda bed: edit_json(bed, lambda tree: tree["tuning"].pop()),
        "1 trials in study.json; registered are 2",
    ),
    "settings": (replace_text(KEPT, "steps: 40", "steps: 41"), "starter/grpo: train.steps is 41 in configs/"),
    "settings missing": (remove(KEPT), "starter-grpo.yaml: missing"),
    "steps": (set_run(steps=20), "starter/grpo seed 1: 20 steps; the budget is 40"),
    "metrics cut": (
        lambda bed: edit_table(bed, lambda table: table.filter(pc.less_equal(table["step"], 20))),
        "starter/grpo seed 0: metrics.parquet has 20 of 40 steps",
    ),
    "tokens": (set_run(tokens=7), "starter/grpo seed 1: 7 sampled tokens; 60000 by metrics.parquet"),
    "first success": (set_run(first_success=3.0), "grpo seed 1: first success at step 3; 1 by metrics.parquet"),
    "samples": (more_samples, "study.json: evaluation.samples is 300; registered is 256"),
    "samples of the start": (more_samples, "evaluation.start_samples is 2000; registered is 1024"),
    "start missing": (
        lambda bed: edit_json(bed, lambda tree: tree.update(starts=[])),
        "the starting model's counts are missing",
    ),
    "other rows": (
        lambda bed: edit_json(bed, lambda tree: tree["rows"]["starter"].reverse()),
        "which are not the first 64",
    ),
    "dates early": (set_started(EARLY), "starter/grpo seed 0: started 2026-03-01 09:00:00+00:00, before the commit of"),
    "dates late": (
        set_started(datetime(2999, 1, 1, tzinfo=UTC)),
        ", after its publication at 2026-03-01 14:00:00+00:00",
    ),
    "dates null": (set_started(None), "metrics.parquet: "),
    "no study.json": (remove("record/study.json"), "study.json"),
    "no study.yaml": (remove("record/study.yaml"), "study.yaml: no such"),
    "no table": (remove("record/metrics.parquet"), "metrics.parquet: missing"),
    "study.json empty": (write("record/study.json", b""), "study.json: cannot be read"),
    "study.json a list": (write("record/study.json", b"[]"), "study.json: not the results"),
    "run without counts": (
        lambda bed: edit_json(bed, lambda tree: run_of(tree, "grpo", 1).pop("solved")),
        "study.json: runs",
    ),
    "table empty": (write("record/metrics.parquet", b""), "metrics.parquet: cannot be read"),
    "table without rows": (lambda bed: edit_table(bed, lambda table: table.slice(0, 0)), "starter/grpo seed 0: "),
    "registered file broken": (write("study.yaml", b"arms: ["), "study.yaml:1"),
}


@pytest.mark.parametrize("name", TAMPERS)
def test_a_record_that_was_tampered_with_has_faults(bed: Path, name: str) -> None:
    tamper, message = TAMPERS[name]
    tamper(bed)
    faults = found(bed)
    assert [fault for fault in faults if message in fault], faults


def test_seeds_that_end_where_nothing_is_solved_are_no_copies(bed: Path) -> None:
    """Their counts are equal, and the metrics on the way there are not."""
    for seed in (0, 2):
        set_run(seed, solved=[0] * 64, classes=[0] * 64, reward=[0.0] * 64)(bed)
    assert found(bed) == []


# ---- the registration's history ----------------------------------------------------------------------------------


def test_a_record_that_is_not_committed_may_be_as_new_as_now(bed: Path) -> None:
    assert check(bed, History(bed.parents[2]))[1] == []
    set_started(datetime.now(UTC) + timedelta(hours=1))(bed)
    assert "after its publication at" in check(bed, History(bed.parents[2]))[1][0]


def test_dates_are_bounded_by_the_commit_of_the_runs_not_of_their_pages(bed: Path) -> None:
    set_started(PUBLISHED + timedelta(hours=1))(bed)
    commit(bed, PUBLISHED)
    (bed / "record" / "study.md").write_text("another page")
    assert len(found(bed, date=PUBLISHED + timedelta(hours=2))) == 12


def test_a_study_file_may_change_until_the_first_run(bed: Path, tmp_path: Path) -> None:
    record = shutil.move(bed / "record", tmp_path / "record")
    replace_text("study.yaml", "pass@64", "pass@32")(bed)
    commit(bed, STARTED - timedelta(minutes=20))
    replace_text("study.yaml", "pass@32", "pass@64")(bed)
    commit(bed, STARTED - timedelta(minutes=10))
    shutil.move(record, bed / "record")
    assert found(bed) == []


def test_a_study_file_that_changed_after_the_first_run_is_a_fault(bed: Path) -> None:
    replace_text("study.yaml", "pass@64", "pass@128")(bed)
    set_study(endpoint="pass@128")(bed)
    (fault,) = found(bed)
    assert fault.startswith("study.yaml: endpoint was pass@64 when the first run started")


def gated(bed: Path) -> None:
    """Name a setting that is the default, in the registered study and in the record, after the runs."""
    replace_text("study.yaml", "base: {}", "base: {bonus.gate: not_failed}")(bed)
    set_study(base={"bonus.gate": "not_failed"})(bed)


def test_a_disclosed_edit_is_no_fault(bed: Path) -> None:
    gated(bed)
    edits = {"base": ({}, ABSENT), "base.bonus.gate": (ABSENT, "not_failed")}
    assert found(bed, Disclosed("The gate is named in the file.", edits=edits)) == []
    (fault,) = found(bed, Disclosed("The gate was changed.", edits=edits))
    assert fault == "preregistration.md: has no deviation with the words: The gate was changed."
    assert "base.bonus.gate was absent when the first run" in found(bed)[-1]


def test_a_disclosed_edit_that_was_never_made_is_a_fault(bed: Path) -> None:
    (fault,) = found(bed, Disclosed(edits={"endpoint": ("pass@64", "pass@8")}))
    assert "endpoint has not changed since the first run" in fault


def test_a_study_cut_short_says_so(bed: Path) -> None:
    drop(2, ARMS)(bed)
    assert found(bed, Disclosed("Cut after 2 seeds.", seeds=2)) == []


def test_a_study_is_named_by_the_registration_before_it_runs(bed: Path) -> None:
    page = bed.parent / "preregistration.md"
    page.write_text(PAGE.replace("`bed`", "of another bed"))
    git(bed.parents[2], "add", str(page))
    git(bed.parents[2], "commit", "--amend", "-qm", "Registration", date=REGISTERED)
    page.write_text(PAGE)
    (fault,) = found(bed)
    assert fault.startswith("preregistration.md: did not name bed when its first run started")


def test_a_study_that_was_never_registered_is_a_fault(bed: Path) -> None:
    root = bed.parents[2]
    shutil.rmtree(root / ".git")
    git(root.parent, "init", "-q", "root")
    assert len(found(bed)) == 12
    shutil.rmtree(root / ".git")
    git(root.parent, "init", "-q", "root")
    git(root, "commit", "-qm", "nothing", "--allow-empty")
    (fault,) = check(bed, History(root))[1]
    assert fault.endswith("preregistration.md: not committed")


# ---- the script --------------------------------------------------------------------------------------------------


def test_the_script_counts_runs_and_faults(bed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(bed, PUBLISHED)
    (bed.parent / "pilot").mkdir()
    shutil.copy(bed / "study.yaml", bed.parent / "pilot")  # not of record
    assert preregistration.main(bed.parents[2]) == 0
    assert capsys.readouterr().out == "bed: 12 runs of record, 0 faults\nEvery run is as registered.\n"
    drop(1, ["grpo"])(bed)
    assert preregistration.main(bed.parents[2]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bed: 11 runs of record, 1 faults" and lines[-1] == "1 faults."
    (bed / "study.yaml").rename(bed / "other.yaml")
    assert preregistration.main(bed.parents[2]) == 1
    assert "study.yaml: no such" in capsys.readouterr().out
    (bed / "other.yaml").rename(bed / "study.yaml")
    shutil.rmtree(bed / "record")
    preregistration.main(bed.parents[2])
    assert capsys.readouterr().out.startswith("bed: registered, no record\n")


def test_without_the_history_there_is_one_line(bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(bed, PUBLISHED)
    commit(bed, PUBLISHED)
    root, shallow = bed.parents[2], tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth", "1", root.as_uri(), str(shallow)], check=True)
    assert preregistration.main(shallow) == 4
    assert "git fetch --unshallow" in capsys.readouterr().err
    shutil.rmtree(root / ".git")
    assert preregistration.main(root) == 4
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no git history" in err


def test_the_studies_of_record_are_as_registered(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        History(ROOT)
    except VdrError as error:
        pytest.skip(str(error))
    assert preregistration.main() == 0, capsys.readouterr().out


def test_every_disclosed_departure_is_one_of_a_study() -> None:
    assert [bed for bed in DISCLOSED if not (ROOT / "docs" / "evidence" / bed / "study.yaml").is_file()] == []
