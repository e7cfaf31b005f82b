"""A user's environment class and tools: what they must look like, checked before a weight is loaded.

The contract of an environment is TRL's: a constructor without arguments, `reset(**columns) -> str | None`, and public
methods that are tools. Beside it: `respond(messages) -> str | None` for games in plain text, and `close()`.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from vdr_cli.environments.parsers import load_named
from vdr_cli.errors import ConfigError
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.loading import one_line

NOT_TOOLS = ("reset", "respond", "close", "get_reward")
"""Public methods that the model cannot call."""


@dataclass(frozen=True)
class Tool:
    """Something that the model can call by name."""

    name: str
    schema: dict[str, Any]
    """As chat templates take it."""
    function: Callable[..., Any] | None = None
    """None: the method of this name of the episode's environment."""


@dataclass(frozen=True)
class Contract:
    """The environment class and the tools of a run."""

    name: str = ""
    """The class, as errors name it; empty without one."""
    environment: type | None = None
    tools: tuple[Tool, ...] = ()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """One per tool, for the chat template."""
        return [tool.schema for tool in self.tools]

    @property
    def responds(self) -> bool:
        """True when the environment answers in plain text."""
        return callable(getattr(self.environment, "respond", None))

    @property
    def reward(self) -> LoadedReward | None:
        """The environments' own rewards (get_reward), named after the class as in TRL; None where it has none."""
        method = getattr(self.environment, "get_reward", None)
        if self.environment is None or not callable(method):
            return None
        function = _await_rewards if inspect.iscoroutinefunction(method) else _get_rewards
        return LoadedReward(self.environment.__name__, 1.0, function)


def _get_rewards(environments: Sequence[Any]) -> list[Any]:
    return [environment.get_reward() for environment in environments]


async def _await_rewards(environments: Sequence[Any]) -> list[Any]:
    return [await environment.get_reward() for environment in environments]


def load_contract(environment: str | None, tools: Sequence[str]) -> Contract | None:
    """The class and the functions that settings name; None without any. ConfigError, one line, for what cannot be used.

    The modules are imported; nothing is made or called.
    """
    if environment is None and not tools:
        return None
    key = "rollout.environment"
    found = [_tool(f"rollout.tools {given}", load_named(given, "rollout.tools", "function"), False) for given in tools]
    cls = None
    if environment is not None:
        named = load_named(environment, key, "Class")
        if not inspect.isclass(named):
            raise ConfigError(f"{key} {environment}: it is not a class; give file.py:Class or module:Class")
        cls = named
        _check_class(f"{key} {environment}", cls)
        found += [_tool(f"{key} {environment}", method, True) for method in _public_methods(cls)]
        if not found and not callable(getattr(cls, "respond", None)):
            raise ConfigError(
                f"{key} {environment}: the model has nothing to do: add a public method, which it can call as a tool, "
                "or respond(messages), which answers in plain text"
            )
    names = [tool.name for tool in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"rollout.tools: two tools are called {name}; rename one of them")
    return Contract(environment or "", cls, tuple(found))


def _check_class(where: str, cls: type) -> None:
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(cls).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        needed = []
    if needed:
        raise ConfigError(
            f"{where}: its constructor needs {', '.join(needed)}; give defaults, and take what differs from row to row "
            "in reset(**columns)"
        )
    if not callable(getattr(cls, "reset", None)):
        raise ConfigError(f"{where}: it has no method reset(**columns), which begins an episode; add one")
    respond = getattr(cls, "respond", None)
    if callable(respond):
        arguments = [name for name in inspect.signature(respond).parameters if name != "self"]
        if not arguments:
            raise ConfigError(f"{where}: respond takes no argument; write respond(self, messages)")


def _public_methods(cls: type) -> list[Callable[..., Any]]:
    """The methods that are tools, in the order of their names, as TRL has it."""
    members = inspect.getmembers(cls, predicate=inspect.isfunction)
    return [method for name, method in members if not name.startswith("_") and name not in NOT_TOOLS]


def _tool(where: str, function: Callable[..., Any], is_method: bool) -> Tool:
    name = getattr(function, "__name__", type(function).__name__)
    what = f"{where}: method {name}" if is_method else where
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"{what}: the model calls a tool by named arguments; {parameter} cannot be one")
        if parameter.annotation is parameter.empty:
            raise ConfigError(f"{what}: argument {parameter.name} has no type; annotate it ({parameter.name}: int)")
    if not inspect.getdoc(function):
        raise ConfigError(
            f"{what}: it has no docstring, which tells the model what it does; add one with an Args: section, or start "
            "the name with an underscore if it is not a tool"
        )
    try:
        schema = get_json_schema(function)
    except Exception as error:  # missing Args:, types without a schema
        raise ConfigError(f"{what}: no schema can be made of it: {one_line(error)}") from None
    if keyword.iskeyword(schema["function"]["name"]):
        raise ConfigError(f"{what}: {name} is a keyword of Python; rename it")
    return Tool(name, schema, None if is_method else function)
