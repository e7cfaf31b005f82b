"""`vdr audit`: a run's numbers recomputed in float64 from its own files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vdr_cli.cli.checks import writable_file
from vdr_cli.errors import ConfigError
from vdr_cli.system.imports import importing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from vdr_cli.audit.lines import Line

EXAMPLES = (
    "vdr audit runs/wide                        # every step that has a record",
    "vdr audit runs/wide --steps 0,10 --outside # only what is outside its bound",
    "vdr audit runs/wide --only rewards,advantages,metrics   # no model is needed",
    "vdr audit runs/wide --json audit.json",
)

OUTSIDE = 1
"""Exit code when a number is outside its bound."""


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    steps: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Steps, counted from 0. Default: all that have a record.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Only these parts, of: inputs, rewards, sampling, members, advantages, policy, update, metrics, "
            "evaluation, export.",
        ),
    ] = None,
    outside: Annotated[bool, typer.Option("--outside", help="Show only lines outside their bound.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write every line, in full precision.")
    ] = None,
) -> int:
    """Recompute steps of a run in float64 and compare every number with the recorded one.

    It uses none of the training code. Exit code 0: all numbers are within their bounds; 1: some are not.
    Train with observe.audit_every to audit more than the first step.
    """
    if json_file is not None:
        json_file = writable_file(json_file, "--json")
    from vdr_cli.config.paths import checked_path

    run = str(checked_path(run, "RUN"))
    numbers = None if steps is None else _numbers(steps)

    from rich.console import Console

    with importing():
        from vdr_cli.audit.audit import SECTIONS, audit_run, write_json

    parts = SECTIONS if only is None else tuple(part.strip() for part in only.split(","))
    for part in parts:
        if part not in SECTIONS:
            raise ConfigError(f"--only {part}: no such part; there are {', '.join(SECTIONS)}")
    says = Console(stderr=True)
    with says.status("reading") as status:
        lines = audit_run(run, numbers, parts, status.update)
    if json_file is not None:
        write_json(lines, Path(json_file), run)
    console = Console()
    for step in sorted({line.step for line in lines}):
        console.print(table([line for line in lines if line.step == step], outside))
    return show_summary(console, lines)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {text}: give whole numbers separated by commas, such as 0,10") from None
    return found


def table(lines: Sequence[Line], outside: bool) -> Table:
    """One step's lines; 80 columns are enough."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title=f"step {lines[0].step}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("quantity", overflow="fold")
    for name in ("on file", "recomputed", "difference"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for line in lines:
        if outside and line.within is not False:
            continue
        numbers = [_shown(line.on_file), _shown(line.recomputed), _shown(line.difference, ".1e")]
        style = {True: "green", False: "bold red", None: "dim"}[line.within]
        shown.add_row(_named(line), *numbers, f"[{style}]{line.verdict}[/{style}]")
    return shown


def _named(line: Line) -> str:
    from rich.markup import escape

    note = line.note if line.within is not True else ""
    return escape(f"{line.quantity}: {note}" if note else line.quantity)


def _shown(value: float | None, form: str = ".5g") -> str:
    return "" if value is None else "0" if value == 0 else f"{value:{form}}"


def show_summary(console: object, lines: Sequence[Line]) -> int:
    """Print how many agree, and return the exit code."""
    counts = {verdict: sum(line.within is verdict for line in lines) for verdict in (True, False, None)}
    typer.echo(f"{counts[True]} within their bounds, {counts[False]} outside, {counts[None]} not recomputed")
    return OUTSIDE if counts[False] else 0
