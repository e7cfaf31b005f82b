"""What several commands share: --set, --reward, and the flags that stand for settings.

Commands import pydantic, torch and the like inside their functions: `vdr --help` waits for none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.errors import ConfigError

if TYPE_CHECKING:
    from vdr_cli.config import Config

RUN_CONFIG = "config.yaml"

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


def config_from(
    path: str | Path | None, overrides: Sequence[str] | None, flags: Mapping[tuple[str, str], Any]
) -> Config:
    """The configuration of flags named ("--steps", "train.steps"), on --set, on a file."""
    from vdr_cli.config.load import load_config

    values = {key: value for (_, key), value in flags.items()}
    names = {key: flag for flag, key in flags}
    return load_config(path, overrides or (), values, names)


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
    path = Path(directory).expanduser() / RUN_CONFIG
    return path if path.is_file() else None
