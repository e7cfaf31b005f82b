"""What several commands share: --set, --reward, and the flags that stand for settings.

Commands import pydantic, torch and the like inside their functions: `vdr --help` waits for none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.errors import ConfigError

if TYPE_CHECKING:
    from vdr_cli.config import Config, LaunchConfig

RUN_CONFIG = "config.yaml"
LAUNCH = "Processes and hosts"


def values_of(key: str) -> Callable[[str], list[str]]:
    """Shell completion: the values that the schema allows for a dotted key, read when the shell asks."""

    def complete(incomplete: str) -> list[str]:
        from vdr_cli.config.messages import allowed_values

        return [value for value in allowed_values(key) if value.startswith(incomplete)]

    return complete


def ds_configs(incomplete: str) -> list[str]:
    """Shell completion: the names in ds_configs/, and DeepSpeed JSON files."""
    package = Path(__file__).parents[1]
    names = {file.stem for folder in (package, package.parent) for file in (folder / "ds_configs").glob("*.json")}
    found = sorted(name for name in names if name.startswith(incomplete))
    typed = Path(incomplete).expanduser()
    folder = typed if incomplete.endswith("/") else typed.parent
    return found + sorted(str(path) for path in folder.glob("*.json") if str(path).startswith(str(typed)))


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as train.weight_decay=0.1. Repeatable."),
]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="NAME[=WEIGHT]",
        help="Reward function: a built-in, module:function or file.py:function. Repeatable.",
    ),
]

NumProcesses = Annotated[int | None, typer.Option(help="Processes on this machine.", rich_help_panel=LAUNCH)]
Hostfile = Annotated[str | None, typer.Option(help="Lines such as: node1 slots=8.", rich_help_panel=LAUNCH)]
Include = Annotated[str | None, typer.Option(help="Only these: host1@host2:0,2.", rich_help_panel=LAUNCH)]
Exclude = Annotated[str | None, typer.Option(help="All but these.", rich_help_panel=LAUNCH)]
MasterAddr = Annotated[
    str | None, typer.Option(help="Where rank 0 listens. Default: the first host.", rich_help_panel=LAUNCH)
]
MasterPort = Annotated[
    int | None, typer.Option(help="Default: a free one here, 29500 over a hostfile.", rich_help_panel=LAUNCH)
]
SshPort = Annotated[int | None, typer.Option(help="Of the other hosts' sshd.", rich_help_panel=LAUNCH)]
Launcher = Annotated[
    str | None,
    typer.Option(help="pdsh, openmpi or slurm.", rich_help_panel=LAUNCH, autocompletion=values_of("launch.launcher")),
]
NoSsh = Annotated[
    bool | None,
    typer.Option("--no-ssh", help="Started once on every host, with --node-rank.", rich_help_panel=LAUNCH),
]
NodeRank = Annotated[int | None, typer.Option(help="This host's number, from 0 (--no-ssh).", rich_help_panel=LAUNCH)]

LAUNCH_FLAGS = (
    "num_processes", "hostfile", "include", "exclude", "master_addr", "master_port", "ssh_port", "launcher", "no_ssh",
    "node_rank",
)  # fmt: skip
"""The parameters of the flags above, and the keys of the launch section that they set."""


def config_from(
    path: str | Path | None, overrides: Sequence[str] | None, flags: Mapping[tuple[str, str], Any]
) -> Config:
    """The configuration of flags named ("--steps", "train.steps"), on --set, on a file."""
    from vdr_cli.config.load import load_config

    values = {key: value for (_, key), value in flags.items()}
    names = {key: flag for flag, key in flags}
    return load_config(path, overrides or (), values, names)


def launch_from(context: typer.Context, overrides: Sequence[str] | None = None) -> LaunchConfig:
    """How processes are started: the flags above, by parameter name, over --set launch.x."""
    from vdr_cli.config.load import load_launch

    typed = {name: context.params.get(name) for name in LAUNCH_FLAGS}
    values = {f"launch.{name}": value for name, value in typed.items()}
    names = {f"launch.{name}": f"--{name.replace('_', '-')}" for name in typed}
    return load_launch(overrides or (), values, names)


def reward_settings(given: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """rewards.functions from `name` or `name=weight`; None when no --reward was given."""
    if not given:
        return None
    functions: list[dict[str, Any]] = []
    for text in given:
        name, equals, weight = text.rpartition("=")
        if not equals:
            functions.append({"name": text})
            continue
        try:
            functions.append({"name": name, "weight": float(weight)})
        except ValueError:
            raise ConfigError(
                f"--reward {text}: the weight {weight!r} is not a number; give NAME or NAME=0.5"
            ) from None
    return functions


def run_config_of(directory: str | Path) -> Path | None:
    """config.yaml of a run directory, when `directory` is one."""
    # os.path says no, where pathlib raises, to what no file system can hold.
    path = os.path.join(os.path.expanduser(directory), RUN_CONFIG)  # noqa: PTH111, PTH118
    return Path(path) if os.path.isfile(path) else None  # noqa: PTH113
