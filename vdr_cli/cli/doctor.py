"""`vdr doctor`: what this machine and the hosts of a hostfile can do, and what stands in the way."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from vdr_cli.cli.options import LAUNCH, SetOption, Typed, config_from, panel, takes
from vdr_cli.errors import MachineError

if TYPE_CHECKING:
    from rich.table import Table

    from vdr_cli.config import Config
    from vdr_cli.launch.preflight import Answer, Problem

EXAMPLES = (
    "vdr doctor                                      this machine",
    "vdr doctor --hostfile hosts                     this machine and every host in the file",
    "vdr doctor run.yaml --hostfile hosts            also whether they can run this",
)

GIB = 1 << 30


HOST_KEYS = ("hostfile", "include", "exclude", "master_addr", "master_port", "ssh_port")
FLAGS = panel(LAUNCH, *(f"launch.{key}" for key in HOST_KEYS))


@takes(FLAGS)
def command(
    typed: Typed,
    config_file: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings of a run; check what it needs.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Check this machine, and every host of a hostfile: software, files, network, accelerators."""
    config = config_from(config_file, overrides, typed)
    raise typer.Exit(examine(config, config_file))


def examine(config: Config, config_file: str | None) -> int:
    """Print the tables; 0 when nothing stands in the way."""
    from rich.console import Console

    from vdr_cli.launch import preflight
    from vdr_cli.launch.reexec import hosts_of

    console = Console(file=sys.stdout)
    hosts = hosts_of(config.launch)
    if config.launch.hostfile is None:
        hosts = {"localhost": hosts["localhost"]}
    question = preflight.question_for(config, hosts, [config_file] if config_file else [])
    answers, problems = preflight.examine(config.launch, hosts, question)
    console.print(host_table(answers, problems))
    console.print(operator_table())
    for problem in problems:
        console.print(problem.line(), markup=False, highlight=False, soft_wrap=True)
    return MachineError.exit_code if problems else 0


FACTS = (
    "state",
    "accelerators",
    "cores",
    "memory",
    "disk free",
    "python",
    "torch",
    "deepspeed",
    "ssh",
    "output shared",
    "clock",
)


FEW = 3
"""Hosts that are shown side by side, a column each."""


def host_table(answers: Mapping[str, Answer], problems: list[Problem]) -> Table:
    """Facts about the hosts: a column per host; with many hosts a row per host, and in the caption what all share."""
    from rich.markup import escape
    from rich.table import Table

    cells = {host: [_state(host, problems), *_cells(host, answer)] for host, answer in answers.items()}
    table = Table(title="Hosts", title_justify="left", caption_justify="left")
    red = {host: "red" if any(problem.host == host for problem in problems) else None for host in answers}
    if len(answers) <= FEW:
        table.add_column("")
        for host in answers:
            table.add_column(escape(host), style=red[host], overflow="fold")
        for fact, *of_hosts in zip(FACTS, *cells.values(), strict=True):
            table.add_row(fact, *map(escape, of_hosts))
        return table
    shared = [n for n in range(1, len(FACTS)) if len({row[n] for row in cells.values()}) == 1]
    first = next(iter(cells.values()))
    table.caption = "on every host: " + ", ".join(f"{FACTS[n]} {escape(first[n])}" for n in shared) if shared else None
    own = [n for n in range(len(FACTS)) if n not in shared]
    for name in ("host", *(FACTS[n] for n in own)):
        table.add_column(name, overflow="fold")
    for host, row in cells.items():
        table.add_row(escape(host), *(escape(row[n]) for n in own), style=red[host])
    return table


def _state(host: str, problems: list[Problem]) -> str:
    wrong = sum(problem.host == host for problem in problems)
    return f"{wrong} problem{'s' * (wrong != 1)}" if wrong else "ready"


def _cells(host: str, answer: Answer) -> list[str]:
    from vdr_cli.launch.hostfile import LOCAL_NAMES

    facts = answer.facts
    if not facts:
        return [*["-"] * 7, "no", "-", "-"]
    disks = [size for size in facts["disk"].values() if size is not None]
    return [
        _accelerators(facts["accelerators"]),
        str(facts["cores"]),
        f"{facts['memory'] / GIB:.0f} GiB",
        f"{min(disks) / GIB:.0f} GiB" if disks else "?",
        facts["python"],
        facts["packages"]["torch"] or "missing",
        facts["packages"]["deepspeed"] or "missing",
        "not needed" if host in LOCAL_NAMES else f"{answer.seconds:.1f} s",
        "yes" if all(facts["shared"].values()) else "no",
        f"{answer.clock:+.1f} s",
    ]


def _accelerators(listed: list[str]) -> str:
    if not listed:
        return "none (CPU)"
    names = {line.split(",")[0] for line in listed}
    return f"{len(listed)} x {', '.join(sorted(names))}"


def operator_table() -> Table:
    """DeepSpeed's compiled operators on this machine: what is there, what could be built, what is not needed."""
    from rich.table import Table

    from vdr_cli.engine.operators import operators

    table = Table(title="DeepSpeed operators here (none is required)")
    for name in ("operator", "installed", "could be built"):
        table.add_column(name)
    for name, installed, compatible in operators():
        table.add_row(name, "yes" if installed else "no", "yes" if compatible else "no")
    return table
