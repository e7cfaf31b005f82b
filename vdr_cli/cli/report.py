"""`vdr report`: one HTML page of a run or of scored completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vdr_cli.cli.checks import check_package, writable_file
from vdr_cli.errors import ConfigError

EXAMPLES = (
    "vdr report runs/wide                               # runs/wide/report.html",
    "vdr report runs/seed0 --compare runs/seed1 --compare runs/none -o compared.html",
    "vdr report runs/wide --members 8                   # colour the tokens of all completions",
    "vdr report scores.parquet --png figures/",
)


def command(
    source: Annotated[str, typer.Argument(metavar="RUN|SCORES", help="A run directory, or output of vdr score.")],
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="RUN", help="Another run for the same charts. Repeatable."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Default: report.html in the run, SCORES.html beside the file.")
    ] = None,
    members: Annotated[
        int,
        typer.Option(help="Measure tokens that the run did not, with this many members of its final model; 0: off."),
    ] = 0,
    png: Annotated[
        str | None,
        typer.Option("--png", metavar="DIR", help="Also write every chart as a PNG, for papers (extra: plots)."),
    ] = None,
) -> None:
    """One self-contained HTML page: learning curves, disagreement, completions token by token.

    Runs that differ only in their seed become one curve with a band.
    """
    from vdr_cli.config.paths import checked_path

    source, *compare = (str(checked_path(given, "SOURCE")) for given in (source, *(compare or ())))
    for given in (source, *compare):
        if not Path(given).exists():
            raise ConfigError(f"{given}: no such run directory or file")
    if compare and Path(source).is_file():
        raise ConfigError("--compare is for runs: a scored file is reported alone")
    if members and Path(source).is_file():
        raise ConfigError("--members is for runs: vdr score --tokens saves what a report of scores shows")
    if members < 0 or members == 1:
        raise ConfigError(f"--members {members}: disagreement needs at least 2; 0: not measured")
    if output is not None:
        output = writable_file(output, "-o")
    if png is not None:
        check_package("matplotlib", "matplotlib", "--png")

    from vdr_cli.report.page import write_pictures, write_report

    typer.echo(write_report(source, output, compare, members))
    if png is not None:
        for path in write_pictures(source, png, compare or ()):
            typer.echo(path)
