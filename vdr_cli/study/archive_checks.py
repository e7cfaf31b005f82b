"""Checks before an archive is written: the study is all there, and nothing else is where the archive goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.study.archive import ARCHIVE, CONFIGS
from vdr_cli.study.directory import STUDY_FILE, StudyDirectory, conflicts, study_tree
from vdr_cli.study.record import RESULTS, Record, read_record, unrecorded

PAGES = ("study.md", "study.html")
FILES = frozenset({STUDY_FILE, RESULTS, *PAGES, ARCHIVE, CONFIGS})
"""Everything in an archive."""
SHOWN = 3
"""Most runs that an error names."""


def check_source(record: Record, directory: Path) -> None:
    """Raise ConfigError when the directory holds more than its study.json: the study has not ended since it grew."""
    advice = "finish the study with `vdr study STUDY.yaml --resume`, then archive it"
    written, recorded = StudyDirectory(directory).study_tree(), study_tree(record.study)
    if written is not None and written != recorded:
        changed = [key for key, value in written.items() if recorded[key] != value]
        raise ConfigError(f"{directory}: {RESULTS} is older than {STUDY_FILE} (other {', '.join(changed)}); {advice}")
    if lacking := unrecorded(record, StudyDirectory(directory)):
        raise ConfigError(f"{directory}: {RESULTS} lacks {_few(lacking)}, evaluated since; {advice}")


def check_target(record: Record, source: Path, target: Path) -> None:
    """Raise ConfigError unless the target is new, empty, or an earlier archive of this study."""
    elsewhere = "give another directory for the archive"
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target}: holds the study itself; {elsewhere}")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: a file; {elsewhere}")
    names = _names_in(target)
    if "runs" in names:
        raise ConfigError(f"{target}: holds the runs of a study; {elsewhere}")
    others = [name for name in names if name not in FILES]
    if others or (names and not {ARCHIVE, RESULTS} <= set(names)):
        raise ConfigError(f"{target}: is not empty and not an archive alone ({_few(others or names)}); {elsewhere}")
    if names and (found := conflicts(study_tree(read_record(target).study), study_tree(record.study))):
        raise ConfigError(f"{target}: holds the archive of another study ({'; '.join(found)}); {elsewhere}")


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(inner.name for inner in directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise MachineError(f"{directory}: cannot be read ({error.strerror})") from None


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
