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
from pathlib import Path
from typing import Any

from vdr_cli.config.yaml_text import dump_tree, parse_document
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.study.load import Study, study_of
from vdr_cli.study.plan import Shard, Task
from vdr_cli.system.files import write_whole

STUDY_FILE = "study.yaml"
EVALUATION = "evaluation.json"
LATER = ("output", "seeds", "arms", "secondary", "contrasts", "equivalence")
"""Keys that may differ when a study is continued: more seeds and arms, other things to report."""


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

    def study_text(self) -> str | None:
        """The study file of the directory; None in a new one."""
        try:
            return (self.path / STUDY_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


def study_tree(study: Study) -> dict[str, Any]:
    """The complete study file but for where it lies."""
    return study.file.model_dump(mode="json", exclude={"output"})


def open_directory(study: Study, resume: bool) -> tuple[StudyDirectory, list[str]]:
    """The directory, made or found, and lines about what has changed since it was made.

    resume: go on where another process stopped. Raises ConfigError when it holds another study, or this one and resume
    is False; MachineError when it cannot be written.
    """
    directory = StudyDirectory(Path(study.file.output))
    notes = check_directory(study, directory, resume)
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        write_whole(directory.path / STUDY_FILE, dump_tree(study_tree(study)))
    except OSError as error:
        raise MachineError(f"output {directory.path}: cannot be written ({error.strerror})") from None
    return directory, notes


def check_directory(study: Study, directory: StudyDirectory, resume: bool) -> list[str]:
    """Lines about what differs from the study that the directory holds. Raises ConfigError when it may not."""
    text = directory.study_text()
    if text is None:
        if directory.path.is_dir() and any(directory.path.iterdir()):
            raise ConfigError(f"output {directory.path}: is not empty and holds no study; give another directory")
        return []
    path = str(directory.path / STUDY_FILE)
    earlier = study_tree(study_of({**parse_document(text, path).tree, "output": str(directory.path)}, path))
    changed = [key for key, value in study_tree(study).items() if earlier.get(key) != value]
    hard = [key for key in changed if key not in LATER]
    hard += [f"arms.{arm}" for arm, settings in _changed_arms(earlier, study)]
    if hard:
        differ = "differ" if len(hard) > 1 else "differs"
        raise ConfigError(
            f"output {directory.path}: holds a study with other settings ({', '.join(hard)} {differ}); "
            "give another directory"
        )
    if not resume:
        raise ConfigError(f"output {directory.path}: holds this study already; go on with it by --resume")
    return [f"differs from when the study was started: {', '.join(changed)}"] if changed else []


def _changed_arms(earlier: Mapping[str, Any], study: Study) -> list[tuple[str, Any]]:
    """Arms that the directory's study has with other settings, or that the file no longer has."""
    known = dict(earlier.get("arms") or {})
    return [(arm, settings) for arm, settings in known.items() if study.file.arms.get(arm) != settings]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise MachineError(
            f"{path}: cannot be locked ({error.strerror}); put the study on another file system"
        ) from None
    return descriptor
