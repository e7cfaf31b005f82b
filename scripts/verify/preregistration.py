"""Checks that the studies of record are those of docs/evidence/preregistration.md, and came after it.

    python scripts/verify/preregistration.py

For every docs/evidence/BED/record:

- The study was registered before its first run: preregistration.md named it, and BED/study.yaml had its present
  content, but for the edits in DISCLOSED.
- The record's study is that of BED/study.yaml. It has every arm of the first registered seeds, all of them unless
  DISCLOSED says otherwise.
- Each run has the registered settings (of the trial that the tuning took), steps, prompts and samples. It started after
  the registration and before the commit that published it. No two seeds of an arm are copies.

What left no trace cannot be checked: runs that were made and never published, and the runs behind a tuning's values.
Exit code 1 for faults, a line each; 4 where the git history is missing, as in a shallow clone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from git_history import History
from record_checks import (
    ABSENT,
    Change,
    changes,
    date_faults,
    evaluation_faults,
    kept_runs,
    length_faults,
    seed_faults,
    settings_faults,
    study_faults,
    tuning_faults,
    twin_faults,
)

from vdr_cli.config.load import read_document
from vdr_cli.config.yaml_text import parse_document
from vdr_cli.errors import VdrError
from vdr_cli.study.archive import ARCHIVE
from vdr_cli.study.directory import STUDY_FILE, study_tree
from vdr_cli.study.load import Study, load_study, study_of
from vdr_cli.study.record import RESULTS, Record, read_record

ROOT = Path(__file__).resolve().parents[2]
REGISTRATION = "preregistration.md"


@dataclass(frozen=True)
class Disclosed:
    """A departure from the registered study file, which preregistration.md lists under Deviations."""

    entry: str = ""
    """Words of the entry, line breaks as spaces."""
    edits: Mapping[str, Change] = field(default_factory=dict)
    """Key of study.yaml to its values at the first run and now."""
    seeds: int | None = None
    """The seeds that ran before time ended the study; None: all."""


GATE = Disclosed(
    "the default of `bonus.gate` changed from `all` to `not_failed`, because of what countdown4 showed. The study "
    "files name `bonus.gate: all`",
    edits={"base.bonus.gate": (ABSENT, "all")},
)
DISCLOSED: Mapping[str, Disclosed] = {
    "starter": GATE,
    "countdown4": GATE,
    "countdown4-confirm": Disclosed("time ended the confirmation after 43 of its 60 seeds", seeds=43),
    "countdown4-dose": Disclosed("of the seven seeds that it names. Time ended it after nine of its twelve", seeds=9),
    "starter-further": Disclosed("time ended block B on `starter` after 14 of its 20 seeds", seeds=14),
}
"""Directory of a study to what departs from its file at the first run."""


def check(bed: Path, history: History, disclosed: Disclosed | None = None) -> tuple[int, list[str]]:
    """The number of runs in this directory's record, and everything that is not as registered, a line each."""
    runs, found = 0, list[str]()
    try:
        study, record = load_study(bed / STUDY_FILE), read_record(bed / "record")
        runs = len(record.runs)
        for fault in _faults(bed, study, record, history, disclosed or Disclosed()):
            found.append(fault)  # one by one: an error keeps those before it
    except VdrError as error:
        found.append(str(error))
    return runs, found


def _faults(bed: Path, study: Study, record: Record, history: History, disclosed: Disclosed) -> Iterator[str]:
    directory = bed / "record"
    yield from study_faults(study, record.study, RESULTS)
    yield from study_faults(study, study_in(read_document(directory / STUDY_FILE).tree), f"record/{STUDY_FILE}")
    yield from seed_faults(study, record.runs, disclosed.seeds or len(study.file.seeds))
    yield from tuning_faults(study, record)
    yield from settings_faults(study, record, directory)
    yield from evaluation_faults(study, record)
    kept, lost = kept_runs(study, record, directory)
    yield from lost
    for run, archived in kept:
        yield from length_faults(study, run, archived)
    yield from twin_faults(kept)
    starts = {run.task: archived.started for run, archived in kept}
    promised = max(history.added(bed.parent / REGISTRATION), history.added(bed / STUDY_FILE))
    yield from date_faults(starts, promised, history.published(directory / ARCHIVE))
    first = min((started for started in starts.values() if started > promised), default=None)
    if first is not None:
        yield from registration_faults(bed, study, history, first, disclosed)


def registration_faults(
    bed: Path, study: Study, history: History, first: datetime, disclosed: Disclosed
) -> Iterator[str]:
    """The study was registered as it stands when its first run started, but for what its deviations say.

    first: that start, after the first commits of both files.
    """
    page, file = bed.parent / REGISTRATION, bed / STUDY_FILE
    if not is_named(bed.name, history.at(page, first)):
        yield f"{REGISTRATION}: did not name {bed.name} when its first run started, {first}"
    edits = changes(study_tree(study_in(parse_document(history.at(file, first), str(file)).tree)), study_tree(study))
    for key, (before, now) in edits.items():
        if disclosed.edits.get(key) != (before, now):
            yield f"{STUDY_FILE}: {key} was {before} when the first run started, {first}; it is {now}, undisclosed"
    for key in disclosed.edits.keys() - edits.keys():
        yield f"{STUDY_FILE}: {key} has not changed since the first run, {first}; DISCLOSED says it has"
    if disclosed.entry not in " ".join(page.read_text(encoding="utf-8").partition("## Deviations")[2].split()):
        yield f"{REGISTRATION}: has no deviation with the words: {disclosed.entry}"


def is_named(bed: str, page: str) -> bool:
    """True when the text of preregistration.md asks this study's question."""
    return f"`{bed}`" in page or f"({bed}/{STUDY_FILE})" in page


def study_in(tree: Mapping[str, Any]) -> Study:
    """The study of a file's tree, which may lack `output`. Raises ConfigError."""
    return study_of({"output": "record", **tree}, STUDY_FILE)


def main(root: Path = ROOT) -> int:
    evidence = root / "docs" / "evidence"
    try:
        history = History(root)
    except VdrError as error:
        print(f"preregistration: {error}", file=sys.stderr)
        return error.exit_code
    total, page = 0, (evidence / REGISTRATION).read_text(encoding="utf-8")
    for bed in sorted({path.parent for name in (STUDY_FILE, "record") for path in evidence.glob(f"*/{name}")}):
        if (bed / "record").is_dir():
            runs, found = check(bed, history, DISCLOSED.get(bed.name))
            total += len(found)
            print(f"{bed.name}: {runs} runs of record, {len(found)} faults", *found, sep="\n  ", flush=True)
        elif is_named(bed.name, page):
            print(f"{bed.name}: registered, no record")
    print(f"{total} faults." if total else "Every run is as registered.")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
