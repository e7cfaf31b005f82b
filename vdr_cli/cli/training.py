"""From the configuration of a run to the run: check, start the ranks if there are to be several, train."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vdr_cli.config import Config
from vdr_cli.config.load import dump_config, with_output
from vdr_cli.config.plan import batch_plan
from vdr_cli.config.preflight import check_before_start, check_output, check_processes, default_output
from vdr_cli.errors import ConfigError
from vdr_cli.launch.environment import is_rank


def start(config: Config, resume: str | None, dry_run: bool, arguments: Sequence[str]) -> int:
    """Check, then print the plan, start the ranks, or train as the rank that this process is. The exit code."""
    if resume is not None and config.train.output is None:
        raise ConfigError("--resume needs --output, the run directory to go on in")
    check_before_start(config, resume)
    if is_rank() and not dry_run:
        check_processes(config, int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            check_output(config, resume)
        return _train(config, resume)
    check_processes(config, num_processes(config))
    if dry_run:
        check_output(config, resume)
        show_plan(config)
        return 0
    arguments = list(arguments)
    if config.train.output is None:
        config = with_output(config, default_output())
        arguments += ["--output", str(config.train.output)]
    check_output(config, resume)
    if wants_ranks(config):
        return _launch(config, arguments)
    return _train(config, resume)


def wants_ranks(config: Config) -> bool:
    """True when this process only starts others."""
    return config.launch.hostfile is not None or (config.launch.num_processes or 1) > 1 or config.launch.no_ssh


def num_processes(config: Config) -> int:
    """Processes over all hosts."""
    return config.launch.num_processes or 1


def show_plan(config: Config) -> None:
    """The settings as YAML and, as comments under them, what they amount to: the output is a configuration file."""
    lines = batch_plan(config, num_processes(config))
    width = max(len(name) for name, _ in lines)
    print(dump_config(config) + "\n" + "\n".join(f"# {name:<{width}}  {value}" for name, value in lines))


def _launch(config: Config, arguments: list[str]) -> int:
    from vdr_cli.launch.reexec import launch

    return launch(config.launch, arguments)


def _train(config: Config, resume: str | None) -> int:
    from vdr_cli.train import train

    return train(config, resume)
