"""A study's directory: whose it is, and locks that keep two processes out of the same run.

    study.yaml                       the study file, complete
    runs/BED/ARM/seed_0003/          run directories, with evaluation.json
    tuning/BED/ARM/trial_1/...       those of the tuning
    starts/BED/                      the evaluation of the starting model
    work/                            settings, logs and locks of each of them
    study.json study.md study.html   the results

Locks are flock(2): they end with the processes that hold them, kill -9 included. A run's lock is handed down to the
process that trains, so it outlives a study that is killed while the run still writes its checkpoint.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vdr_cli.config.load import read_document
from vdr_cli.config.yaml_text import dump_tree
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.study.load import Study, study_of
from vdr_cli.study.plan import Shard, Task
from vdr_cli.system.files import write_whole

STUDY_FILE = "study.yaml"
EVALUATION = "evaluation.json"
GROWING = ("seeds", "arms", "contrasts", "tuning")
"""Keys that may gain entries when a study is continued; those they had must stay."""
FREE = ("output", "secondary")
"""Keys that may change when a study is continued."""
BEFORE_STUDY_FILE = ("work", ".*.partial")
"""Names that a process leaves in a new directory before its study.yaml is there."""
SHOWN = 5
"""Most missing seeds or contrasts that an error names."""


class StudyDirectory:
    """The paths of a study."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, task: Task) -> Path:
        """The run directory of a task."""
        return self.path / task.path

    def evaluation(self, task: Task) -> Path:
        """The file with what the task's model solved."""
        return self.run(task) / EVALUATION

    def work(self, task: Task, suffix: str) -> Path:
        """A file of the study's own about a task: `yaml` settings, `log`, `lock`, `json` the evaluation's request."""
        place = self.path / "work" / task.path
        return place.with_name(f"{place.name}.{suffix}")

    def study_tree(self) -> dict[str, Any] | None:
        """The complete study file of the directory; None in a new one. Raises ConfigError for a damaged one."""
        path = self.path / STUDY_FILE
        if not path.exists():
            return None
        return study_tree(study_of({**read_document(path).tree, "output": str(self.path)}, str(path)))


def study_tree(study: Study) -> dict[str, Any]:
    """The complete study file but for where it lies."""
    return study.file.model_dump(mode="json", exclude={"output"})


def open_directory(study: Study, resume: bool) -> tuple[StudyDirectory, list[str]]:
    """The directory, made or found, and lines about what has changed since it was made.

    Processes that open it at the same moment take turns. resume: go on where another process stopped. Raises
    ConfigError when it holds another study, or this one and resume is False; MachineError when it cannot be written.
    """
    directory = StudyDirectory(Path(study.file.output))
    check_directory(study, directory, resume)  # before the lock file is made: a refused directory stays as it was
    try:
        with _opening(directory):
            notes = check_directory(study, directory, resume)
            write_whole(directory.path / STUDY_FILE, dump_tree(study_tree(study)))
    except OSError as error:
        raise MachineError(f"output {directory.path}: cannot be written ({error.strerror})") from None
    return directory, notes


def check_directory(study: Study, directory: StudyDirectory, resume: bool) -> list[str]:
    """Lines about what differs from the study that the directory holds. Raises ConfigError when it may not."""
    is_taken = _is_taken(directory.path)  # listed first: another process may write study.yaml and runs in between
    earlier = directory.study_tree()
    if earlier is None:
        if is_taken:
            raise ConfigError(f"output {directory.path}: is not empty and holds no study; give another directory")
        return []
    changed = [key for key, value in study_tree(study).items() if earlier.get(key) != value]
    if found := conflicts(earlier, study_tree(study)):
        raise ConfigError(
            f"output {directory.path}: holds a study with other settings ({'; '.join(found)}); give another directory"
        )
    if not resume:
        raise ConfigError(f"output {directory.path}: holds this study already; go on with it by --resume")
    return [f"differs from when the study was started: {', '.join(changed)}"] if changed else []


def _is_taken(path: Path) -> bool:
    """True when the directory holds more than what starting a study leaves there."""
    names = [inner.name for inner in path.iterdir()] if path.is_dir() else []
    return any(not any(fnmatch(name, known) for known in BEFORE_STUDY_FILE) for name in names)


def conflicts(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two study files that make them different studies, in words."""
    kept = [key for key in now if key not in GROWING and key not in FREE]
    found = [f"{key} differs" for key in kept if earlier.get(key) != now[key]]
    found += _missing("seeds", earlier, now) + _missing("contrasts", earlier, now)
    found += _changed("arms", earlier["arms"], now["arms"])
    return found + _tuning_conflicts(earlier["tuning"], now["tuning"])


def _tuning_conflicts(earlier: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """New arms may bring trials; all else of the tuning stays."""
    if earlier is None or now is None:
        return [] if earlier == now else ["tuning differs"]
    found = ["tuning.seeds differs"] if earlier["seeds"] != now["seeds"] else []
    return found + _changed("tuning.trials", earlier["trials"], now["trials"])


def _changed(name: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries of `earlier` that `now` has with other settings, or not at all."""
    return [
        f"{name}.{key} {'differs' if key in now else 'is missing'}"
        for key, settings in earlier.items()
        if now.get(key) != settings
    ]


def _missing(key: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line about the items of `earlier[key]` that `now[key]` lacks; none when it has them all."""
    gone = [item for item in earlier[key] if item not in now[key]]
    if not gone:
        return []
    shown = [f"[{', '.join(item)}]" if isinstance(item, list) else str(item) for item in gone[:SHOWN]]
    more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
    return [f"{key} {', '.join(shown)}{more} missing"]


@contextmanager
def study_locked(directory: StudyDirectory, shard: Shard | None) -> Iterator[None]:
    """Keep a second study out: shards may run beside other shards, a whole study alone.

    Raises ConfigError when the directory is in use, MachineError where files cannot be locked.
    """
    with _held(directory.path / "work" / "study.lock", shared=shard is not None) as whole:
        if not whole:
            raise ConfigError(f"output {directory.path}: another vdr study is running in it; wait for it, or end it")
        if shard is None:
            yield
            return
        with _held(directory.path / "work" / f"shard_{shard.number}_of_{shard.count}.lock") as own:
            if not own:
                raise ConfigError(f"output {directory.path}: shard {shard.number}/{shard.count} is running already")
            yield


@contextmanager
def _opening(directory: StudyDirectory) -> Iterator[None]:
    """Wait for other processes that open the directory, and keep them out. Raises OSError, MachineError."""
    descriptor = _locked(directory.path / "work" / "open.lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _held(path: Path, shared: bool = False) -> Iterator[bool]:
    descriptor = try_lock(path, shared)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def try_lock(path: Path, shared: bool = False) -> int | None:
    """A descriptor that holds the lock until every copy of it is closed; None when another process holds it.

    Raises MachineError where the file system has no locks.
    """
    return _locked(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _locked(path: Path, operation: int) -> int | None:
    """A descriptor that holds the lock; None when LOCK_NB is in `operation` and another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise MachineError(
            f"{path}: cannot be locked ({error.strerror}); put the study on another file system"
        ) from None
    return descriptor
