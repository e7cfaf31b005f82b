"""Settings that have a new place: the old key is accepted everywhere and means the new one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from vdr_cli.config.yaml_text import KeyPath
from vdr_cli.errors import ConfigError

MOVED = {
    f"disagreement.{key}": f"bonus.{key}"
    for key in ("weight", "shape", "gate", "schedule", "schedule_fraction", "clip")
}
"""Old dotted key to the key that it means."""


def with_moved_keys(tree: Mapping[str, Any], places: MutableMapping[KeyPath, str] | None = None) -> dict[str, Any]:
    """The tree with old keys under their new names; `places` follow.

    ConfigError when an old key and its new one have different values.
    """
    found = dict(tree)
    for old, new in MOVED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        below, target = found.get(section), found.get(new_section, {})
        if not isinstance(below, Mapping) or name not in below or not isinstance(target, Mapping):
            continue
        if target.get(new_name, below[name]) != below[name]:
            raise ConfigError(
                f"{_place(places, old)}{old} is {below[name]} and {_place(places, new)}{new} is {target[new_name]}, "
                f"but they are one setting: keep {new}"
            )
        found[section] = {key: value for key, value in below.items() if key != name}
        found[new_section] = {**target, new_name: below[name]}
        if places is not None and (section, name) in places:
            places[new_section, new_name] = places.pop((section, name))
    return found


def _place(places: Mapping[KeyPath, str] | None, dotted: str) -> str:
    place = (places or {}).get(tuple(dotted.split(".")))
    return f"{place}: " if place else ""
