"""The display of `vdr study`: a live table on a terminal, elsewhere a line for each task that ends."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vdr_cli.data.metrics import METRICS_FILE
from vdr_cli.study.directory import StudyDirectory
from vdr_cli.study.load import Study
from vdr_cli.study.running import Job, Watcher
from vdr_cli.study.stored import read_counts
from vdr_cli.system.text import duration, visible

MARKS = {
    "waiting": ("·", "dim"),
    "training": ("▶", "cyan"),
    "evaluating": ("◆", "cyan"),
    "elsewhere": ("○", "cyan"),
    "done": ("■", "green"),
    "failed": ("✗", "red"),
}
"""A task's sign in the table, one per seed."""


class StudyView(Watcher):
    """Context manager. The table when the console is a terminal, else lines."""

    def __init__(self, study: Study, directory: StudyDirectory, slots: int, console: Console | None = None) -> None:
        self.study, self.directory, self.slots = study, directory, slots
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._jobs: Sequence[Job] = ()
        self._started = time.monotonic()

    def __enter__(self) -> StudyView:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def update(self, jobs: Sequence[Job]) -> None:
        """Take in how far everything is."""
        self._jobs = jobs

    def ended(self, job: Job) -> None:
        """A line for a task that is done or has failed."""
        done, total = sum(one.phase == "done" for one in self._jobs), len(self._jobs)
        left = time_left(self._jobs, self.slots)
        rest = f"; {duration(left)} left" if left else ""
        took = duration(job.seconds or 0.0)
        if job.phase == "failed":
            self.note(f"{job.task.name}: failed after {took}: {job.reason}")
        elif self._live is None:
            self.note(f"{done}/{total} {job.task.name}: {self._solved(job)} in {took}{rest}")

    def _solved(self, job: Job) -> str:
        counts = read_counts(self.directory.evaluation(job.task)) or {"solved": [], "samples": 1}
        tried = len(counts["solved"]) * counts["samples"]
        return f"solves {sum(counts['solved']) / tried:.3f} of completions" if tried else "measured"

    def _render(self) -> RenderableType:
        return Group(self._table(), *map(self._running, (job for job in self._jobs if job.process)), self._summary())

    def _table(self) -> Table:
        """A row an arm of a bed, a sign a seed."""
        table = Table.grid(padding=(0, 2))
        for job_rows in grouped(self._jobs):
            first = job_rows[0].task
            name = first.name if first.is_start else f"{first.bed}/{first.arm}{' tuning' if first.is_trial else ''}"
            signs = Text()
            for job in job_rows:
                signs.append(*MARKS[job.phase])
            table.add_row(Text(visible(name)), signs)
        return table

    def _running(self, job: Job) -> Text:
        step = last_step(self.directory.run(job.task)) if job.phase == "training" else None
        of = self.study.file.budget.steps
        at = "" if step is None else f" step {step}" + (f"/{of}" if of else "")
        passed = duration(time.monotonic() - job.started)
        return Text(f"{job.phase} {job.task.name}{at}, {passed}", style="cyan")

    def _summary(self) -> Text:
        counts = Counter(str(job.phase) for job in self._jobs)
        parts = [f"{counts[phase]} {phase}" for phase in MARKS if counts[phase]]
        left = time_left(self._jobs, self.slots)
        parts.append(f"{duration(time.monotonic() - self._started)} so far")
        return Text(", ".join(parts) + (f", about {duration(left)} left" if left else ""), style="dim")


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each row of the table, in order: starts, an arm's tuning, its runs of record."""
    rows: dict[tuple[str, str | None, bool], list[Job]] = {}
    for job in jobs:
        rows.setdefault((job.task.bed, job.task.arm, job.task.is_trial), []).append(job)
    return list(rows.values())


def time_left(jobs: Sequence[Job], slots: int) -> float | None:
    """Seconds, from the mean of the runs that this call has done; None before the first, and when all are done."""
    took = [job.seconds for job in jobs if job.phase == "done" and job.seconds is not None and not job.task.is_start]
    rest = sum(job.phase in ("waiting", "training", "evaluating") for job in jobs)
    return sum(took) / len(took) * rest / slots if took and rest else None


def last_step(run: Path) -> int | None:
    """The last step in a run's metrics; None before the first."""
    try:
        with (run / METRICS_FILE).open("rb") as lines:
            lines.seek(max((run / METRICS_FILE).stat().st_size - 8192, 0))
            last = lines.read().splitlines()[-1]
        return int(json.loads(last)["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return None
