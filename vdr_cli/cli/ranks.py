"""`vdr eval` and `vdr score` on several processes or hosts: start the ranks, or be one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vdr_cli.config import LaunchConfig


def on_ranks(launch: LaunchConfig, arguments: Sequence[str], work: Callable[[], None]) -> None:
    """Do the work here, as the rank that a launcher made of this process, or on ranks started with these arguments."""
    from vdr_cli.launch import reexec, watchdog
    from vdr_cli.launch.environment import prepare_process, translated
    from vdr_cli.launch.rank import processes_started

    if reexec.wants_ranks(launch):
        raise typer.Exit(reexec.launch(launch, list(arguments)))
    if processes_started({**os.environ, **translated(os.environ)}) == 1:
        work()
        return
    prepare_process(launch)  # before torch is imported: it reads its number of threads once
    try:
        work()
    except BaseException as error:
        watchdog.end(error)
        raise
    watchdog.end()
