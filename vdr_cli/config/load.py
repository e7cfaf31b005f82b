"""From a YAML file, --set overrides and flags to one frozen Config, and back to YAML.

Precedence: flag, then --set, then the file, then the default (recipe.py). Sections merge key by key; lists replace
each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vdr_cli.config.messages import Where, refusal, unknown_key
from vdr_cli.config.moved import with_moved_keys
from vdr_cli.config.paths import path_text
from vdr_cli.config.recipe import Tree, deep_merge
from vdr_cli.config.schema import Config, LaunchConfig, ModelConfig, Section
from vdr_cli.config.yaml_text import Document, KeyPath, dump_tree, parse_document, parse_value
from vdr_cli.errors import ConfigError

SECTIONS_WITHOUT_EFFECT = ("launch", "observe")
"""Start of ranks and display: never part of what a run computes."""


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    flag_names: Mapping[str, str] | None = None,
) -> Config:
    """The configuration of a run.

    path: YAML file. overrides: `a.b=value` as typed after --set. flags: dotted key to value; None: not given.
    flag_names: what was typed for a dotted key of `flags`, for error messages.
    Raises ConfigError, one line that names the key and where it was given.
    """
    places: dict[KeyPath, str] = {}
    file_tree = with_moved_keys(_read_file(path, places), places) if path is not None else {}
    return validate(deep_merge(file_tree, _typed(overrides, flags, flag_names, places)), places)


def settings_typed(flags: Mapping[str, Any], flag_names: Mapping[str, str]) -> Config:
    """The configuration typed, over the defaults, without a file. Raises ConfigError."""
    places: dict[KeyPath, str] = {}
    tree = _typed((), flags, flag_names, places)
    return validate(tree, places)


class _OnlyLaunch(Section):
    launch: LaunchConfig = LaunchConfig()


def load_launch(
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    flag_names: Mapping[str, str] | None = None,
) -> LaunchConfig:
    """The launch settings of a command that is not a training run, from what was typed alone.

    A run's own launch section says how it was trained, on machines that may be gone.
    """
    places: dict[KeyPath, str] = {}
    tree = _typed(overrides, flags, flag_names, places)
    try:
        return _OnlyLaunch.model_validate({"launch": tree.get("launch", {})}).launch
    except ValidationError as error:
        raise ConfigError(refusal(error, places_of(places))) from None


def validate(tree: Tree, places: Mapping[KeyPath, str] | None = None) -> Config:
    """The Config of a complete or partial tree; ConfigError with the places where keys were given."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(refusal(error, places_of(places or {}))) from None


def places_of(known: Mapping[KeyPath, str]) -> Where:
    """The place of a key, or of the nearest one above or below it that was given."""

    def where(key: KeyPath) -> str:
        above = (key[:n] for n in range(len(key), 0, -1))
        below = (given for given in known if given[: len(key)] == key)
        return next((known[given] for given in (*above, *below) if given in known), "") if key else ""

    return where


def dump_config(config: Config) -> str:
    """Complete YAML in the schema's order; load_config of it gives an equal Config."""
    return dump_tree(config.model_dump(mode="json"))


def dump_given(config: Config) -> str:
    """YAML of what differs from the defaults of its model; load_config of it gives an equal Config."""
    defaults = Config(model=ModelConfig(name=config.model.name)).model_dump(mode="json")
    given = _differences(config.model_dump(mode="json"), defaults)
    model = {"name": config.model.name, **given.pop("model", {})}
    return dump_tree({"model": model, **given})


def _differences(tree: Tree, defaults: Mapping[str, Any]) -> Tree:
    """The part of the tree that is not in `defaults`; mappings that only one side has are whole."""
    found: Tree = {}
    for key, value in tree.items():
        other = defaults.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and set(value) == set(other):
            if below := _differences(value, other):
                found[key] = below
        elif value != other:
            found[key] = value
    return found


def dump_run_record(config: Config) -> str:
    """A run's config.yaml: everything but where it lies, so `vdr train that/config.yaml` starts a new run."""
    return dump_config(with_output(config, None))


def with_output(config: Config, output: str | None) -> Config:
    """The same configuration with another run directory."""
    return config.model_copy(update={"train": config.train.model_copy(update={"output": output})})


def config_hash(config: Config) -> str:
    """16 hex digits of everything that decides what a run computes: not launch, observe, or the output's name."""
    return hashlib.sha256(json.dumps(computed_settings(config), sort_keys=True).encode()).hexdigest()[:16]


def computed_settings(config: Config) -> Tree:
    """The settings that decide what a run computes."""
    return config.model_dump(mode="json", exclude={**dict.fromkeys(SECTIONS_WITHOUT_EFFECT, True), "train": {"output"}})


def _read_file(path: str | Path, places: dict[KeyPath, str]) -> Tree:
    document = read_document(path)
    places |= {key: f"{path}:{line}" for key, line in document.lines.items()}
    # A section whose keys are all commented out is read as null and means: nothing given.
    return {key: value for key, value in document.tree.items() if not (value is None and key in Config.model_fields)}


def read_document(path: str | Path) -> Document:
    """The tree of a YAML file and its lines. Raises ConfigError, one line."""
    try:
        text = Path(path_text(str(path))).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory, not a configuration file; a run's is {path}/config.yaml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; give a YAML configuration") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the configuration file {error}") from None
    return parse_document(text, str(path))


def _typed(
    overrides: Iterable[str],
    flags: Mapping[str, Any] | None,
    flag_names: Mapping[str, str] | None,
    places: dict[KeyPath, str],
) -> Tree:
    """The settings of the command line: flags over --set."""
    tree = _parse_overrides(overrides, places)
    for key, value in (flags or {}).items():
        if value is not None:
            put(tree, key, value)
            places[tuple(key.split("."))] = (flag_names or {}).get(key, "command line")
    return with_moved_keys(tree, places)


def _parse_overrides(overrides: Iterable[str], places: dict[KeyPath, str]) -> Tree:
    tree: Tree = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {override}: needs KEY=VALUE, such as --set train.steps=100")
        try:
            value = parse_value(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: the value is not valid YAML; quote it") from None
        if key in Config.model_fields and not isinstance(value, dict):
            raise ConfigError(f"--set {override}: {key} is a section; set one of its keys, such as {_example(key)}")
        if key.split(".")[0] not in Config.model_fields:
            raise ConfigError(f"--set: {unknown_key(tuple(key.split('.')))}")
        put(tree, key, value)
        places[tuple(key.split("."))] = "--set"
    return tree


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set tree[a][b][c] for `a.b.c`; a later whole section merges into an earlier key."""
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        below = node.get(parent)
        if not isinstance(below, dict):
            below = node[parent] = {}
        node = below
    both = isinstance(node.get(last), dict) and isinstance(value, dict)
    node[last] = deep_merge(node[last], value) if both else value


def _example(section: str) -> str:
    return f"{section}.{next(iter(Config.model_fields[section].annotation.model_fields))}"  # type: ignore[union-attr]
