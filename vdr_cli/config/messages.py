"""Messages of a refused configuration: key, value, what is allowed, where it was given."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vdr_cli.config.described import bound
from vdr_cli.config.schema import Config
from vdr_cli.config.yaml_text import KeyPath
from vdr_cli.system.text import nearest, shown_value

Where = Callable[[KeyPath], str]
"""The place a key was given, e.g. `run.yaml:12` or `--set`; empty when it was not given."""

MOST_PROBLEMS = 3


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `LoraConfig | None` or `list[RewardFunction]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next(filter(None, map(section_of, get_args(annotation))), None)
    return None


def dotted_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted, in the order of the schema."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = section_of(info.annotation)
        if inner is not None and get_origin(info.annotation) is not list:
            yield from dotted_keys(inner, f"{prefix}{name}.")


def nearest_key(path: KeyPath, model: type[BaseModel] = Config) -> str | None:
    """The valid dotted key that an unknown one most likely stands for: of the same section first, then of any.

    Sections that share the key's name are all given, joined by "or".
    """
    *parents, last = [str(part) for part in path]
    prefix = "".join(f"{part}." for part in parents)
    keys = list(dotted_keys(model))
    siblings = [key for key in keys if key.startswith(prefix) and "." not in key[len(prefix) :]]
    if near := nearest(str(last), [key[len(prefix) :] for key in siblings], cutoff=0.6):
        return prefix + near
    exact = [key for key in keys if key.rsplit(".", 1)[-1] == last]
    if exact:
        return " or ".join(exact)
    by_name = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    if near := nearest(str(last), by_name, cutoff=0.75):
        return by_name[near]
    return nearest(".".join(map(str, path)), keys, cutoff=0.6)


def unknown_key(path: KeyPath, model: type[BaseModel] = Config) -> str:
    """`train.stepz is not a setting; did you mean train.steps?`"""
    dotted = _dotted(path)
    if dotted in dotted_keys(model):  # one key with a dot in it, where a section was meant
        section, _, key = dotted.rpartition(".")
        return f"{dotted} is written as a section in a file: {section}: {{{key}: ...}}"
    near = nearest_key(path, model)
    hint = f"did you mean {near}?" if near else f"the sections are {', '.join(model.model_fields)}"
    return f"{dotted} is not a setting; {hint}"


def refusal(error: ValidationError, where: Where, model: type[BaseModel] = Config) -> str:
    """One line for everything pydantic found, the first few problems in the order of the schema."""
    problems: list[str] = []
    refused: set[KeyPath] = set()
    found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    for entry in found:
        path = _key_path(entry["loc"])
        if entry["type"] in ("missing", "extra_forbidden"):
            path = (*path, entry["loc"][-1]) if path[-1:] != (entry["loc"][-1],) else path
        if path in refused:
            continue
        refused.add(path)
        place = where(path)
        problems.append((f"{place}: " if place else "") + _problem(path, dict(entry), model))
    more = len(problems) - MOST_PROBLEMS
    shown = "; ".join(problems[:MOST_PROBLEMS])
    return shown + (f"; and {more} more" if more > 0 else "")


def _problem(path: KeyPath, entry: dict[str, Any], model: type[BaseModel]) -> str:
    if entry["type"] == "extra_forbidden":
        return unknown_key(path, model)
    if entry["type"] == "value_error":
        message = str(entry["ctx"]["error"])
        colon = "" if message.startswith("is ") else ":"
        return f"{_dotted(path)}{colon} {message}" if path else message
    if entry["type"] == "missing":
        return f"{_dotted(path)} is required"
    return f"{_dotted(path)} must be {_allowed(entry)}, not {_shown(entry['input'])}"


def _allowed(entry: dict[str, Any]) -> str:
    kind, context = entry["type"], entry.get("ctx", {})
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "below {lt}",
        "literal_error": "{expected}",
        "finite_number": "a finite number",
        "string_too_short": "non-empty text",
        "too_short": "longer",
        "too_long": "shorter",
    }
    if kind in bounds:
        return bounds[kind].format(**{name: bound(value) for name, value in context.items()})
    families = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text (put it in quotes)",
        "list": "a list, such as [a, b]",
        "tuple": "a list, such as [a, b]",
        "dict": "keys and values, such as {a: b}",
        "model": "a section with keys below it",
    }
    return families.get(kind.split("_")[0], entry["msg"])


def _shown(value: Any) -> str:
    words = {None: "nothing", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shown_value(value)


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _key_path(location: KeyPath) -> KeyPath:
    """The part of pydantic's location that a user typed: without the names of union members."""
    path: list[str | int] = []
    for part in location:
        if isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool")):
            break
        path.append(part)
    return tuple(path)
