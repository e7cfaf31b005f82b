"""The settings that suit an embedded model: defaults of every Config of it, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from vdr_cli.beds.registry import BEDS, DEFAULT

Tree = dict[str, Any]


def on_recipe(given: Mapping[str, Any]) -> Tree:
    """The sections given, over the recipe of the bed whose model it is."""
    tree = {key: _as_tree(value) for key, value in given.items()}
    return deep_merge(bed_recipe(_model_name(tree)), tree)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """A new tree: `over` on `base`; mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def bed_recipe(model: Any) -> Tree:
    """The settings that suit an embedded model, under everything the user gives; none for another model."""
    bed = BEDS.get(model) if isinstance(model, str) else None
    return bed.recipe() if bed else {}


def _as_tree(value: Any) -> Any:
    """A section that was built by itself counts for the keys that it was given."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _model_name(tree: Tree) -> Any:
    section = tree.get("model", {})
    return section.get("name", DEFAULT) if isinstance(section, dict) else None
