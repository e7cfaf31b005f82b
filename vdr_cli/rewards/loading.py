"""From the names in `rewards.functions` to functions: built-ins, `module:function`, `file.py:function`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from types import ModuleType
from typing import Any

from vdr_cli.beds.registry import reward_of
from vdr_cli.config import RewardsConfig
from vdr_cli.config.paths import path_text
from vdr_cli.config.schema import RewardFunction
from vdr_cli.errors import ConfigError
from vdr_cli.models.paths import resolve_model_path
from vdr_cli.rewards import exiting
from vdr_cli.rewards.base import Extract, LoadedReward, check_columns
from vdr_cli.rewards.builtin import BUILT_IN, built_in
from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.rewards.main_thread import OwnProcess, watch_signals
from vdr_cli.rewards.processes import RaisedThereError, RewardProcesses
from vdr_cli.rewards.user_files import make_importable, module_name
from vdr_cli.system.text import did_you_mean, nearest

__all__ = ["LoadedReward", "check_columns", "load_rewards"]

MODEL = "model:"
"""Opens the name of a reward model."""


def load_rewards(cfg: RewardsConfig, data_name: str, environments: LoadedReward | None = None) -> list[LoadedReward]:
    """The functions of the configuration in its order, then the environments' own; the data's own without any.

    Reward models come without their weights. environments: rewards that environments give themselves.
    """
    if not cfg.functions and environments is not None:
        return [environments]
    own = reward_of(data_name)
    if not cfg.functions and own is None:
        raise ConfigError(
            f"rewards.functions is empty and data.name {data_name} has no reward of its own; give a built-in "
            f"({', '.join(BUILT_IN)}), module:function, file.py:function or model:PATH"
        )
    watch_signals()
    given = cfg.functions or [RewardFunction(name=str(own))]
    loaded: list[LoadedReward] = []
    for entry in given:
        loaded.append(_named(entry, cfg.extract, [reward.name for reward in loaded]))
    if cfg.processes and not all(reward.is_async or reward.is_model for reward in loaded):
        processes = RewardProcesses(cfg.processes)
        loaded = [processes.taking(entry.name, reward) for entry, reward in zip(given, loaded, strict=True)]
    else:
        for reward in loaded:
            if reward.own_process is not None and getattr(reward.function, "needs_main_thread", False):
                reward.own_process.start()
    return loaded if environments is None else [*loaded, environments]


def _named(entry: RewardFunction, extract: Extract, taken: list[str]) -> LoadedReward:
    path = model_path(entry.name)
    function = find_function(entry.name) if path is None else _model(path, entry.label)
    inner = getattr(function, "func", function)  # functools.partial
    name = str(getattr(inner, "__name__", type(inner).__name__))
    alike = sum(other == name or (other.startswith(f"{name}_") and other[len(name) + 1 :].isdigit()) for other in taken)
    return LoadedReward(
        f"{name}_{alike + 1}" if alike else name,
        entry.weight,
        function,
        own_process=OwnProcess(entry.name) if path is None else None,
        context=copy_context(),
        solution_class=_beside(function, "solution_class"),
        known_classes=_beside(function, "known_classes"),
        extract=extract if getattr(function, "judges_answers", False) else "whole",
        is_model=path is not None,
    )


def model_path(given: str) -> str | None:
    """The directory or hub id of `model:PATH`; None for the name of a function."""
    return given.removeprefix(MODEL) if given.startswith(MODEL) else None


def _model(path: str, label: int | None) -> Callable[..., Any]:
    from vdr_cli.rewards.model import RewardModel  # brings torch, which the checks before the start do without

    return RewardModel(path, label)


def check_reward(entry: RewardFunction) -> None:
    """The name of a function can be one, and files are there; nothing is imported. Raises ConfigError."""
    path = model_path(entry.name)
    if path is not None:
        resolve_model_path(path, f"rewards.functions {MODEL}")
    else:
        check_name(entry.name)
    if entry.label is not None and path is None:
        raise ConfigError(f"rewards.functions: {entry.name} has label {entry.label}, which only {MODEL}PATH reads")


def _beside(function: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """The function of this name that belongs to a reward function: its attribute, or one in its module."""
    inner = getattr(function, "func", function)  # functools.partial
    module = sys.modules.get(getattr(inner, "__module__", None) or type(inner).__module__)
    found = (getattr(place, name, None) for place in (function, inner, module))
    return next(filter(callable, found), None)


def find_function(given: str, key: str = "rewards.functions") -> Callable[..., Any]:
    """The function that a name stands for. key: the setting, for errors. ConfigError, one line, when there is none."""
    place, attribute = check_name(given, key)
    if not place:
        return built_in(given)
    module = _import_file(place, key) if place.endswith(".py") else _import_module(place, given, key)
    return _attribute(module, attribute, given, key)


def check_name(given: str, key: str = "rewards.functions") -> tuple[str, str]:
    """("", built-in), (module, function) or (file.py, function), without importing anything. ConfigError on others."""
    place, colon, attribute = given.rpartition(":")
    if not colon:
        if given in BUILT_IN:
            return "", given
        hint = did_you_mean(given, BUILT_IN, f"the built-in ones are {', '.join(BUILT_IN)}.")
        forms = "module:function, file.py:function or, for a reward model, model:PATH"
        raise ConfigError(f"{key}: no built-in {given or 'without a name'}; {hint} Or give {forms}")
    if not place or not attribute:
        raise ConfigError(f"{key}: {given} must be module:function or file.py:function")
    if not place.endswith(".py"):
        return place, attribute
    try:
        path = Path(path_text(place)).resolve()
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    if not path.is_file():
        raise ConfigError(f"{key}: {given}: no such file {path}")
    return str(path), attribute


def _import_file(place: str, key: str) -> ModuleType:
    path = Path(place)
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    try:
        with exit_is_an_error():
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: importing {path} failed: {one_line(error)}") from error


def _import_module(place: str, given: str, key: str) -> ModuleType:
    make_importable(Path.cwd())
    try:
        with exit_is_an_error():
            return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ConfigError(f"{key}: {given}: no module {place} here or among the installed packages") from error
        raise ConfigError(f"{key}: importing {place} failed: {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: importing {place} failed: {one_line(error)}") from error


def _attribute(module: ModuleType, attribute: str, given: str, key: str) -> Callable[..., Any]:
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    if found is not None:
        raise ConfigError(f"{key}: {given}: {attribute} is not a function")
    there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    hint = f"; it has {nearest(attribute, there) or ', '.join(there[:5])}" if there else ""
    raise ConfigError(f"{key}: {given}: no function {attribute} there{hint}")


def one_line(error: BaseException) -> str:
    """`ValueError: what it says (file.py:12)`: an exception of the user's code, safe for a terminal."""
    if isinstance(error, RaisedThereError):  # has become one line where it was raised
        return str(error)
    text = " ".join(str(error).split())
    shown = "".join(character if character.isprintable() else "?" for character in text)
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != exiting.__file__]
    if isinstance(error, SyntaxError):
        place = f" ({Path(error.filename or '').name}:{error.lineno})" if error.lineno else ""
        shown = str(error.msg)
    else:
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' * bool(shown)}{shown}{place}"
