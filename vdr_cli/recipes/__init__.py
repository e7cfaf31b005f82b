"""Complete, commented configurations to start from: what `vdr recipes` lists, shows and copies."""

from __future__ import annotations

from pathlib import Path

from vdr_cli.config.described import SCHEMA_FILE
from vdr_cli.errors import ConfigError
from vdr_cli.system.text import did_you_mean

NAMES = ("starter", "countdown4", "routes", "guess", "tldr", "gsm8k", "7b", "32b")
"""Runs, from the smallest machine to the largest."""
STUDIES = ("study",)
"""Files of `vdr study`."""
ALL = (*NAMES, *STUDIES)


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe; ConfigError with the nearest name for an unknown one."""
    if name not in ALL:
        raise ConfigError(f"no recipe {name}; {did_you_mean(name, ALL, 'there are ' + ', '.join(ALL))}")
    folder = Path(__file__).parent
    return (folder / "studies" if name in STUDIES else folder) / f"{name}.yaml"


def recipe_text(name: str) -> str:
    """The file, its path to the settings' JSON schema made absolute: a copy lies somewhere else."""
    text = recipe_path(name).read_text(encoding="utf-8")
    return text.replace("$schema=../config/schema.json", f"$schema={SCHEMA_FILE.as_uri()}")


def summary(name: str) -> str:
    """The first comment of the file: one line that says what it is and where it runs."""
    return recipe_text(name).splitlines()[0].removeprefix("#").strip()
