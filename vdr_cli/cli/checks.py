"""Checks of what was typed, before hours of work."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import typer

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.launch.outcome import finished
from vdr_cli.launch.rank import is_first


def one_of(value: str, allowed: Sequence[str], flag: str) -> str:
    """The value, when it is allowed. Raises ConfigError otherwise."""
    if value not in allowed:
        raise ConfigError(f"{flag} {value}: give one of {', '.join(allowed)}")
    return value


def refuse_unread(overrides: Sequence[str] | None, sections: Sequence[str], name: str) -> None:
    """Refuse a --set of a section that the command does not read: it would silently do nothing. Raises ConfigError."""
    from vdr_cli.config import Config

    for override in overrides or ():
        section = override.partition("=")[0].partition(".")[0].strip()
        if section in Config.model_fields and section not in sections:
            raise ConfigError(f"--set {override}: {name} does not read {section}; it reads {', '.join(sections)}")


def warn_of_older_model(names: Sequence[str]) -> None:
    """Say so when a run's model/ is of an earlier end: the run was resumed and has not ended again."""
    from vdr_cli.config.paths import checked_path

    for name in names:
        run = checked_path(name, "MODEL")
        was_exported = (run / "config.yaml").is_file() and (run / "model" / "config.json").is_file()
        if is_first() and was_exported and not finished(run):
            typer.echo(f"vdr: warning: {name} was resumed and has not ended; its model/ is the older one", err=True)


def writable_file(path: str, flag: str) -> str:
    """The file, a leading ~ replaced by the home directory: shells leave it in `--json=~/a.json`.

    Raises ConfigError or MachineError when its directory does not exist or is not writable.
    """
    from vdr_cli.config.paths import path_text

    try:
        file = Path(path_text(path))
    except ValueError as error:
        raise ConfigError(f"{flag} {error}") from None
    parent = file.absolute().parent
    if file.is_dir():
        raise ConfigError(f"{flag} {path}: a directory; give a file")
    if not parent.is_dir():
        raise ConfigError(f"{flag} {path}: no directory {parent}; make it first")
    if not os.access(parent, os.W_OK):
        raise MachineError(f"{flag} {path}: no permission to write in {parent}")
    return str(file)


def check_package(module: str, package: str, flag: str) -> None:
    """Check that an optional package is installed. Raises ConfigError with the command that installs it."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{flag} needs {package}: pip install {package}")
