"""Options that stand for settings, and those that several commands share.

An option that stands for a setting takes its type, default, help and completion from the schema of the settings
(config/described.py), so `--help` and docs/configuration.md cannot differ.

Commands import pydantic, torch and the like inside their functions: `vdr --help` waits for none of them.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdr_cli.config.described import setting
from vdr_cli.errors import ConfigError

if TYPE_CHECKING:
    from vdr_cli.config import Config, LaunchConfig

RUN_CONFIG = "config.yaml"
LAUNCH = "Processes and hosts"


@dataclass(frozen=True)
class Flag:
    """An option that stands for a setting."""

    name: str
    """As typed: `--steps`."""
    key: str
    """Dotted: `train.steps`."""
    panel: str | None = None
    """Heading of the help page under which it stands; None: the first."""
    note: str = ""
    """An addition of this command to the setting's description."""
    default: str | int | None = None
    """The command's own default; None: the value of the file, the recipe or the schema."""
    required: bool = False
    description: str | None = None
    """Replaces the setting's own description, for a command to which it means less; None: kept."""

    @property
    def help(self) -> str:
        """The setting's description, the values it does not name, and its default, as Rich markup."""
        of = setting(self.key)
        description = self.description or of.description
        unnamed = any(choice not in description for choice in of.choices)
        words = [description, self.note, f"One of {', '.join(of.choices)}." if unnamed else ""]
        text = " ".join(filter(None, words)).replace("[", r"\[")
        shown = self.default is None and not self.required and of.type is not bool and of.default not in ("null", "")
        return f"{text} [dim]\\[default: {of.default}][/dim]" if shown else text

    def parameter(self) -> inspect.Parameter:
        """The keyword argument from which Typer makes the option."""
        of = setting(self.key)
        option = typer.Option(
            self.name,
            help=self.help,
            rich_help_panel=self.panel,
            autocompletion=None if of.type is bool else completion(self.key),
        )
        return inspect.Parameter(
            parameter_name(self.name),
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if self.required else self.default,
            annotation=Annotated[of.type if self.required else of.type | None, option],
        )


def panel(title: str, *keys: str) -> tuple[Flag, ...]:
    """Options under one heading, each named after its key: `train.steps` becomes `--steps`."""
    return tuple(Flag(f"--{key.rpartition('.')[2].replace('_', '-')}", key, title) for key in keys)


LAUNCH_FLAGS = panel(
    LAUNCH, "launch.num_processes", "launch.hostfile", "launch.include", "launch.exclude", "launch.master_addr",
    "launch.master_port", "launch.ssh_port", "launch.launcher", "launch.no_ssh", "launch.node_rank",
)  # fmt: skip
"""Options for starting processes, on every command that starts some."""


def parameter_name(flag: str) -> str:
    """The Python name of an option: `--group-size` becomes `group_size`."""
    return flag.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class Typed:
    """The values typed for options that stand for settings."""

    values: Mapping[str, Any]
    """Dotted key to value; None: not given."""
    names: Mapping[str, str]
    """Dotted key to the option's name, for error messages."""

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def also(self, name: str, key: str, value: Any) -> Typed:
        """The same, with one more value; `name` is what the user typed it as."""
        return Typed({**self.values, key: value}, {**self.names, key: name})

    def section(self, name: str, *, inside: bool = True) -> Typed:
        """Only the keys of one section; all others with inside=False."""
        kept = {key: value for key, value in self.values.items() if key.startswith(f"{name}.") is inside}
        return replace(self, values=kept)


def takes(flags: Sequence[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's parameter `typed` stands for one option per flag."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            values = {flag.key: given.pop(parameter_name(flag.name)) for flag in flags}
            command(typed=Typed(values, {flag.key: flag.name for flag in flags}), **given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        spread = [[flag.parameter() for flag in flags] if one.name == "typed" else [one] for one in own]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for several in spread for one in several]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def completion(key: str) -> Callable[[str], list[str]] | None:
    """A shell's suggestions for the value of a setting; None: its own for files."""
    if key == "engine.ds_config":
        return ds_configs
    choices = setting(key).choices or setting(key).examples
    return (lambda incomplete: [value for value in choices if value.startswith(incomplete)]) if choices else None


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
        help="Reward: a built-in, module:function, file.py:function or model:PATH. Repeatable.",
    ),
]


def config_from(path: str | Path | None, overrides: Sequence[str] | None, typed: Typed) -> Config:
    """The configuration: what was typed, over --set, over the file. Raises ConfigError."""
    from vdr_cli.config.load import load_config

    return load_config(path, overrides or (), typed.values, typed.names)


def launch_from(typed: Typed, overrides: Sequence[str] | None = None) -> LaunchConfig:
    """The launch settings: the options of that section over --set launch.x. Raises ConfigError."""
    from vdr_cli.config.load import load_launch

    return load_launch(overrides or (), typed.section("launch").values, typed.names)


def reward_settings(given: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """rewards.functions from `name` or `name=weight`; None when no --reward was given. Raises ConfigError."""
    if not given:
        return None
    functions: list[dict[str, Any]] = []
    for text in given:
        name, equals, weight = text.rpartition("=")
        if not equals or ":" in weight or "/" in weight:  # no weight: the last = is part of the path
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
    """config.yaml of a run directory; None when `directory` is no run."""
    # os.path says no, where pathlib raises, to what no file system can hold.
    path = os.path.join(os.path.expanduser(directory), RUN_CONFIG)  # noqa: PTH111, PTH118
    return Path(path) if os.path.isfile(path) else None  # noqa: PTH113
