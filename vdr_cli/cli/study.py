"""`vdr study`: arms compared over seeds and beds; `vdr study report`: its results again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vdr_cli.errors import ConfigError

if TYPE_CHECKING:
    from vdr_cli.study.load import Study
    from vdr_cli.study.plan import Shard, Task

EXAMPLES = (
    "vdr recipes copy study mine.yaml          # a study to start from",
    "vdr study mine.yaml --dry-run             # what it would run",
    "vdr study mine.yaml --jobs 2              # run, evaluate, report",
    "vdr study mine.yaml --jobs 2 --resume     # continue where it stopped",
    "vdr study mine.yaml --shard 1/8           # a Slurm array's task (scripts/study.sbatch)",
    "vdr study report studies/mine             # rebuild the results from study.json and the metrics",
    "vdr study archive studies/mine kept       # a small copy, to publish, or to continue elsewhere",
)

File = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="Arms, seeds, beds, budget, endpoint.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time; they share the machine's threads and GPUs.")]
ShardText = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Run only part I of N; parts may run at the same time.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the study in the output directory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check every arm's settings; print what would run.")]


def command(
    file: File, jobs: Jobs = 1, shard: ShardText = None, resume: Resume = False, dry_run: DryRun = False
) -> None:
    """Compare settings over paired seeds: train, evaluate, and write study.json, study.md and study.html.

    If a run fails, it is named, the others continue, and the exit code is 1. After an interruption, --resume
    continues; runs resume from their checkpoints.
    """
    from vdr_cli.study.load import load_study, warnings
    from vdr_cli.study.plan import Shard, tasks_of

    study = load_study(file)
    part = Shard.parse(shard) if shard is not None else None
    tasks = part.of(tasks_of(study)) if part is not None else tasks_of(study)
    _check_runs(study)
    for line in warnings(study):
        typer.echo(f"vdr: warning: {line}", err=True)
    if dry_run:
        _show_plan(study, tasks, resume or part is not None)
        return
    raise typer.Exit(_run(study, tasks, part, jobs, resume))


def report(directory: Annotated[str, typer.Argument(metavar="DIR", help="A study's output directory.")]) -> None:
    """Rebuild the results from study.json and the runs' metrics."""
    from vdr_cli.study.page import rebuild

    for path in rebuild(Path(directory)):
        typer.echo(path)


def archive(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A study's output directory.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where the copy goes.")],
) -> None:
    """Copy a study without its run directories: counts, settings and the relevant metrics, in a few small files."""
    from vdr_cli.study.page import archive

    for path in archive(Path(directory), Path(target)):
        typer.echo(path)


def _check_runs(study: Study) -> None:
    """Everything that `vdr train` checks before it starts, of every arm on every bed. Raises VdrError."""
    from vdr_cli.checks import check_before_start

    for bed in study.beds:
        for arm in study.arms:
            try:
                check_before_start(study.config(bed, arm, study.file.seeds[0]), None)
            except ConfigError as error:
                raise ConfigError(f"arm {arm} on {bed}: {error}") from None


def _show_plan(study: Study, tasks: list[Task], resume: bool) -> None:
    from vdr_cli.stats.paired import detectable_deviations
    from vdr_cli.study.archive import archived_tasks
    from vdr_cli.study.directory import StudyDirectory, check_directory

    directory = StudyDirectory(Path(study.file.output))
    kept = archived_tasks(directory.path)
    for line in check_directory(study, directory, resume):
        typer.echo(line)
    trials = sum(task.is_trial for task in tasks)
    runs = sum(not task.is_trial and not task.is_start for task in tasks)
    deviations = detectable_deviations(len(study.file.seeds), study.comparisons)
    for task in tasks:
        typer.echo(task.name)
    for name, value in (
        ("output", study.file.output),
        ("runs of record", str(runs)),
        ("tuning runs", str(trials)),
        ("already evaluated", str(sum(task in kept or directory.evaluation(task).is_file() for task in tasks))),
        ("endpoint", study.file.endpoint),
        ("detectable difference", f"{deviations:.2f} standard deviations of a seed's difference (power 0.8, Holm)"),
    ):
        typer.echo(f"{name:<22} {value}")


def _run(study: Study, tasks: list[Task], shard: Shard | None, jobs: int, resume: bool) -> int:
    from vdr_cli.study.directory import open_directory, study_locked
    from vdr_cli.study.page import write_results
    from vdr_cli.study.record import record_of
    from vdr_cli.study.running import Runner
    from vdr_cli.study.view import StudyView
    from vdr_cli.system import stopping

    directory, notes = open_directory(study, resume or shard is not None)
    with study_locked(directory, shard), StudyView(study, directory, jobs) as view:
        for line in notes:
            view.note(line)
        stopping.this_is_a_command()
        runner = Runner(study, directory, tasks, jobs, view)
        code = runner.run()
    record = record_of(study, directory)
    if record.runs:
        for path in write_results(record, directory.path):
            typer.echo(path)
    for job in runner.jobs:
        if job.phase == "failed" or (job.phase == "waiting" and job.reason):
            typer.echo(f"vdr: {job.task.name}: {job.reason}", err=True)
    return code


SUBCOMMANDS = {"report": report, "archive": archive}
DEFAULT = "run"
"""`vdr study FILE` is `vdr study run FILE`."""
