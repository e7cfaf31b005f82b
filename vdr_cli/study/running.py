"""Runs the missing parts of a study, several processes at a time. Progress is read from the disk, never remembered.

A task is done when its run has finished and its last checkpoint is evaluated. A process that fails costs its task
alone; one that is killed leaves checkpoints, from which the next call goes on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from vdr_cli.config.load import config_hash, dump_config, load_config
from vdr_cli.config.schema import Config
from vdr_cli.errors import ConfigError
from vdr_cli.launch import outcome
from vdr_cli.study import launching
from vdr_cli.study.archive import ARCHIVE, kept_config
from vdr_cli.study.directory import StudyDirectory, try_lock
from vdr_cli.study.load import Study
from vdr_cli.study.measure import fingerprint
from vdr_cli.study.plan import Task, with_starts
from vdr_cli.study.record import archived_record, chosen_trial, start_of
from vdr_cli.study.stored import read_counts
from vdr_cli.system.files import write_whole
from vdr_cli.system.stopping import StopSignal

POLL = 0.2
"""Seconds between looks at the processes."""
RETRY = 5.0
"""Seconds between looks at tasks that another process works on."""
MEASURED = {"model", "data", "rewards", "rollout"}
"""Sections of a bed's settings that an evaluation reads."""
PATIENCE = 300.0
"""Seconds that runs get to save and end after Ctrl-C; a second Ctrl-C ends them at once."""

Phase = Literal["waiting", "training", "evaluating", "done", "failed", "elsewhere"]


@dataclass
class Job:
    """A task and its progress."""

    task: Task
    phase: Phase = "waiting"
    reason: str = ""
    """Reason for a failure, or for waiting."""
    slot: int = -1
    lock: int = -1
    process: launching.Process | None = None
    started: float = 0.0
    seconds: float | None = None
    """Spent by this call; None for what was done before."""


class Watcher:
    """Follows the jobs of a study; the views show them."""

    def update(self, jobs: Sequence[Job]) -> None:
        """Called after every look."""

    def ended(self, job: Job) -> None:
        """A task is done or has failed."""


class Runner:
    """The tasks of one call of `vdr study`, with the starting models that their tuning needs."""

    def __init__(
        self, study: Study, directory: StudyDirectory, tasks: Sequence[Task], slots: int, watcher: Watcher
    ) -> None:
        self.study, self.directory, self.watcher = study, directory, watcher
        self.jobs = [Job(task) for task in with_starts(study, tasks)]
        self.slots: list[Job | None] = [None] * slots
        self.looked = -math.inf

    def run(self) -> int:
        """Run everything that is missing. 0; 1 when a task is not done at the end; 130 or 143 after a signal."""
        self.find_done()
        with StopSignal() as stop:
            try:
                while not stop.received and self.step():
                    time.sleep(POLL)
            finally:
                self.stop_all()
            if stop.received:
                return 128 + stop.received
        return 0 if all(job.phase == "done" for job in self.jobs) else 1

    def find_done(self) -> None:
        """Mark what is done already. Raises ConfigError for a run with other settings than the study gives it."""
        for job in self.jobs:
            config = self.settings(job.task)
            if config is None:
                continue
            earlier = self.directory.run(job.task) / "config.yaml"
            if earlier.is_file() and config_hash(load_config(earlier)) != config_hash(config):
                raise ConfigError(
                    f"{earlier}: a run with other settings than the study gives {job.task.name}; remove its directory, "
                    "or give another output"
                )
            if self.is_evaluated(job.task):
                job.phase = "done"

    def step(self) -> bool:
        """Check the running processes and start the tasks that are ready; False when nothing is left to wait for."""
        ended = [job for job in self.jobs if job.process is not None and job.process.poll() is not None]
        for job in ended:
            self.after(job, job.process.poll())  # type: ignore[union-attr, arg-type]
        if ended or time.monotonic() - self.looked > RETRY:
            self.looked = time.monotonic()
            for job in self.jobs:
                if job.phase in ("waiting", "elsewhere") and None in self.slots:
                    self.begin(job)
        self.watcher.update(self.jobs)
        return any(job.process is not None or job.phase == "elsewhere" for job in self.jobs)

    def begin(self, job: Job) -> None:
        """Start the task's next process, unless it is done, not tuned yet, or in another process's hands."""
        config = self.settings(job.task)
        if config is None:
            job.reason = f"its arm is not tuned: {self.lacking(job.task)} has not been evaluated"
            return
        lock = try_lock(self.directory.work(job.task, "lock"))
        if lock is None:
            job.phase, job.reason = "elsewhere", "another process works on it"
            return
        if self.is_evaluated(job.task):  # by that other process
            os.close(lock)
            job.phase = "done"
            return
        job.lock, job.slot, job.started = lock, self.slots.index(None), time.monotonic()
        self.slots[job.slot] = job
        if job.task.is_start or outcome.finished(self.directory.run(job.task)):
            self.evaluate(job)
        else:
            self.train(job, config)

    def train(self, job: Job, config: Config) -> None:
        job.phase = "training"
        settings = self.directory.work(job.task, "yaml")
        write_whole(settings, dump_config(config))
        self.start(job, launching.train_command(settings, self.directory.run(job.task)), config.launch.num_processes)

    def evaluate(self, job: Job) -> None:
        job.phase = "evaluating"
        request = self.directory.work(job.task, "json")
        write_whole(request, json.dumps(self.request(job.task), indent=1) + "\n")
        self.start(job, launching.measure_command(request), None)

    def start(self, job: Job, command: list[str], ranks: int | None) -> None:
        environment = launching.environment_of(job.slot, len(self.slots), ranks or 1)
        job.process = launching.start(command, environment, self.directory.work(job.task, "log"), job.lock)

    def after(self, job: Job, code: int) -> None:
        """A process of this job has ended: go on with the evaluation, or call the task done or failed."""
        job.process = None
        if job.phase == "training" and code == 0 and outcome.finished(self.directory.run(job.task)):
            self.evaluate(job)
            return
        if job.phase == "evaluating" and code == 0 and self.is_evaluated(job.task):
            job.phase = "done"
        else:
            job.reason = self.why(job, code)
            job.phase = "failed"
        self.release(job)
        self.watcher.ended(job)

    def why(self, job: Job, code: int) -> str:
        """The reason that the process gave, in one line."""
        log = self.directory.work(job.task, "log")
        fault = outcome.read_fault(self.directory.run(job.task)) if job.phase == "training" else None
        said = fault.line() if fault else launching.last_line(log)
        ended = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{job.phase} {ended}: {said or 'without a word'} ({log})"

    def release(self, job: Job) -> None:
        """Give the slot and the lock back."""
        job.seconds = time.monotonic() - job.started
        self.slots[job.slot] = None
        os.close(job.lock)

    def stop_all(self) -> None:
        """Ask the running processes to save and end, and wait for it."""
        running = [(job, job.process) for job in self.jobs if job.process is not None]
        for _, process in running:
            launching.end(process, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for _, process in running):
            time.sleep(POLL)
            if time.monotonic() > deadline:
                for _, process in running:
                    launching.end(process, signal.SIGKILL)
        for job, _ in running:
            job.process, job.phase = None, "waiting"
            self.release(job)

    # ---- settings and evaluations --------------------------------------------------------------------------------

    def settings(self, task: Task) -> Config | None:
        """The task's settings; None while its arm is not tuned."""
        if task.arm is None or task.seed is None:
            return self.beds[task.bed]
        trial = task.trial
        if trial is None and self.study.trials:
            trial = chosen_trial(self.study, self.directory, task.bed, task.arm)
            if trial is None:
                return None
        return self.study.config(task.bed, task.arm, task.seed, trial)

    def lacking(self, task: Task) -> str:
        """The evaluation that the tuning of the task's arm waits for, in words."""
        has_start = not self.study.needs_start or start_of(self.directory, task.bed) is not None
        return "a trial" if has_start else "the starting model"

    @cached_property
    def beds(self) -> dict[str, Config]:
        return {bed: self.study.bed_config(bed) for bed in self.study.beds}

    def request(self, task: Task) -> dict[str, Any]:
        """The request to measure.py."""
        asked, bed = self.study.file.evaluation, self.beds[task.bed]
        return {
            "model": bed.model.name if task.is_start else str(self.directory.run(task).absolute()),
            "output": str(self.directory.evaluation(task).absolute()),
            "settings": bed.model_dump(mode="json", include=MEASURED),
            "changed": bed.model_dump(mode="json", include=MEASURED, exclude_defaults=True),
            "prompts": asked.prompts,
            "samples": asked.start_samples if task.is_start else asked.samples,
            "seed": asked.seed,
        }

    def is_evaluated(self, task: Task) -> bool:
        """True when the counts are there, and are what this study asks for; or in the study's archive."""
        counts = read_counts(self.directory.evaluation(task))
        if counts is not None:
            return bool(counts["request"] == fingerprint(self.request(task)))
        return self.is_archived(task)

    def is_archived(self, task: Task) -> bool:
        """True when the archive has the run, or what it was for. Raises ConfigError for a run with other settings."""
        kept = archived_record(self.directory.path)
        if kept is None:
            return False
        if task.is_trial:
            return any(
                (row["bed"], row["arm"], row["trial"]) == (task.bed, task.arm, task.trial) for row in kept.tuning
            )
        found = next((run for run in (*kept.starts, *kept.runs) if run.task == task), None)
        settings = self.settings(task)
        if found is None or task.is_start or settings is None:
            return found is not None
        if config_hash(kept_config(self.directory.path, task)) != config_hash(settings):
            raise ConfigError(
                f"{self.directory.path / ARCHIVE}: {task.name} ran with other settings than the study gives it; "
                "give another output"
            )
        return True
