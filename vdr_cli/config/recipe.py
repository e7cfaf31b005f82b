"""The settings that suit an embedded model: defaults of every Config of it, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

STARTER = "starter"
Tree = dict[str, Any]


def on_recipe(given: Mapping[str, Any]) -> Tree:
    """The sections given, over the starter's recipe when the model is the starter."""
    tree = {key: _as_tree(value) for key, value in given.items()}
    return deep_merge(starter_recipe(), tree) if _model_name(tree) == STARTER else tree


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """A new tree: `over` on `base`; mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def starter_recipe() -> Tree:
    """The settings that suit the embedded starter, under everything the user gives."""
    from vdr_cli.starter import paths

    return paths.recipe()


def _as_tree(value: Any) -> Any:
    """A section that was built by itself counts for the keys that it was given."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _model_name(tree: Tree) -> Any:
    section = tree.get("model", {})
    return section.get("name", STARTER) if isinstance(section, dict) else None
