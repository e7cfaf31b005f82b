"""From the configuration of a run to the run: check, start the ranks if there are to be several, train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vdr_cli.checks import check_before_start, check_output, check_processes, default_output
from vdr_cli.config import Config
from vdr_cli.config.load import dump_config, dump_given, with_output
from vdr_cli.errors import ConfigError
from vdr_cli.launch.environment import prepare_process, translated
from vdr_cli.launch.preflight import question_for
from vdr_cli.launch.rank import is_rank, processes_started
from vdr_cli.launch.reexec import check_launch, hosts_of, launch, wants_ranks, world_size
from vdr_cli.planning.batches import batch_plan
from vdr_cli.system import stopping
from vdr_cli.system.imports import importing
from vdr_cli.system.variables import check_for_deepspeed, whole_number


def start(
    config: Config, resume: str | None, dry_run: bool, arguments: Sequence[str], all_settings: bool = False
) -> int:
    """Check, then print the plan, start the ranks, or train as the rank that this process is. The exit code."""
    check_before_start(config, resume)
    check_for_deepspeed({**os.environ, **config.launch.env})
    if resume is not None and config.train.output is None:
        raise ConfigError("--resume needs --output, the run directory to continue")
    several = wants_ranks(config.launch)
    environ = {**os.environ, **translated(os.environ)}
    if is_rank(environ) and not several and not dry_run:
        check_processes(config, processes_started(environ))
        return _train(_agreed_output(config, resume), resume)
    processes = world_size(config.launch)
    check_processes(config, processes)
    if dry_run:
        check_output(config, resume)
        if several:
            check_launch(config.launch, Path(config.train.output).absolute() if config.train.output else None)
        show_plan(config, processes, all_settings)
        return 0
    if config.train.output is None:
        config = with_output(config, chosen_output(config))
        arguments = [*arguments, "--output", str(config.train.output)]
    elif resume is not None and not any(argument.startswith("--output") for argument in arguments):
        arguments = [*arguments, "--output", str(config.train.output)]  # a restart no longer names the checkpoint's run
    if _node_rank(config) == 0:
        check_output(config, resume)
    return _launch(config, list(arguments)) if several else _train(config, resume)


def chosen_output(config: Config) -> str:
    """`default_output`, where one process decides it for all; ConfigError where several would."""
    if config.launch.no_ssh or whole_number(os.environ, "SLURM_STEP_NUM_NODES", 1) > 1:
        raise ConfigError("--output is needed when vdr is started on every host, so that all use the same directory")
    return default_output()


def show_plan(config: Config, processes: int, all_settings: bool) -> None:
    """Print the plan as comments, and under it the settings: the output is a configuration file.

    all_settings: with those that are at their defaults.
    """
    lines = batch_plan(config, processes)
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"# {name:<{width}}  {value}" for name, value in lines) + "\n")
    print(dump_config(config) if all_settings else dump_given(config), end="")


def _agreed_output(config: Config, resume: str | None) -> Config:
    """The run directory that rank 0 decides and checks for all: another may look when the run is in it already."""
    prepare_process(config.launch)  # before torch is imported: it reads its number of threads once

    with importing():
        from vdr_cli.engine import collectives
        from vdr_cli.engine.processes import patience_of, start_distributed

    start_distributed(patience_of(config))
    chosen = with_output(config, config.train.output or default_output())
    with collectives.agreed():
        if collectives.is_main():
            check_output(chosen, resume)
    return with_output(config, collectives.broadcast_object(chosen.train.output))


def _launch(config: Config, arguments: list[str]) -> int:
    return launch(
        config.launch, arguments, config.train.output, question_for(config, hosts_of(config.launch), arguments)
    )


def _node_rank(config: Config) -> int:
    """This host's number when vdr is started once on every host; 0 elsewhere."""
    given = config.launch.node_rank
    return given if given is not None else whole_number(os.environ, "SLURM_NODEID", 0)


def _train(config: Config, resume: str | None) -> int:
    prepare_process(config.launch)  # before torch is imported: it reads its number of threads once

    with importing():
        from vdr_cli.train import train

    stopping.this_is_a_command()
    return train(config, resume)
