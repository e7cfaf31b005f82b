"""Every setting as data, read from schema.json: its type, values, default and description.

The command line's options and docs/configuration.md are made from this. It needs no pydantic, so `vdr --help` and a
shell's TAB wait for none. `scripts/build/config_reference.py` writes schema.json from sections/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA_FILE = Path(__file__).with_name("schema.json")

Node = dict[str, Any]
"""A JSON schema, or a part of one."""

TYPES: dict[str, type] = {"integer": int, "number": float, "string": str, "boolean": bool}
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Setting:
    """A key of a section, or a section."""

    key: str
    """Dotted, such as `train.steps`."""
    node: Node

    @property
    def description(self) -> str:
        """The setting's docstring, on one line; of a section, its class's."""
        return str(self.node.get("description", "") or self.section.get("description", ""))

    @property
    def section(self) -> Node:
        """The JSON schema of a section; empty for a setting that is none."""
        return next((found for part in _parts(self.node) if (found := _resolved(part))), {})

    @property
    def type(self) -> type:
        """int, float, str or bool: the type of one value."""
        return next((TYPES[part["type"]] for part in _parts(self.node) if part.get("type") in TYPES), str)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be; empty where it takes other values too."""
        values = [part for part in _parts(self.node) if part.get("type") != "null"]
        return tuple(map(str, values[0]["enum"])) if len(values) == 1 and "enum" in values[0] else ()

    @property
    def examples(self) -> tuple[str, ...]:
        """Words that it may be among others."""
        return tuple(map(str, self.node.get("examples", ())))

    @property
    def values(self) -> str:
        """The values allowed, in words, with bounds."""
        return _in_words(self.node)

    @property
    def default(self) -> str:
        """The default as YAML writes it: `null`, `true`, `0.1`; "" for an empty text; "below" for a section."""
        if "default" not in self.node:
            return "to be given"
        value = self.node["default"]
        if isinstance(value, dict) and self.section:
            return "below"
        return value if isinstance(value, str) else json.dumps(value)


def sections() -> Iterator[Setting]:
    """The top-level sections, in the order of the schema."""
    yield from settings_in("")


def setting(key: str) -> Setting:
    """The setting of a dotted key. KeyError for an unknown one."""
    node = _schema()
    for part in key.split("."):
        node = _properties(node)[part]
    return Setting(key, node)


def settings_in(section: str) -> Iterator[Setting]:
    """The settings of a section, in the order of the schema."""
    node = setting(section).node if section else _schema()
    prefix = f"{section}." if section else ""
    for name, below in _properties(node).items():
        yield Setting(prefix + name, below)


@cache
def _schema() -> Node:
    return dict(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def _properties(node: Node) -> dict[str, Node]:
    inner = node if "properties" in node else Setting("", node).section
    return dict(inner["properties"])


def _parts(node: Node) -> list[Node]:
    """The members of a union; the node itself where it is none."""
    return list(node.get("anyOf", [node]))


def _resolved(node: Node) -> Node:
    """The section that a reference, or a list of references, points to; empty for anything else."""
    reference = node.get("$ref") or node.get("items", {}).get("$ref")
    return dict(_schema()["$defs"][reference.rpartition("/")[2]]) if reference else {}


def _in_words(node: Node) -> str:
    if "anyOf" in node:
        return " or ".join(map(_in_words, node["anyOf"]))
    words = ", ".join(f"`{value}`" for value in node.get("enum", [node["const"]] if "const" in node else []))
    kind = node.get("type")
    if kind == "array" and "prefixItems" in node:
        words = f"list of {len(node['prefixItems'])} numbers"
    elif kind == "array":
        words = "list of sections" if _resolved(node) else f"list of {_in_words(node['items'])}"
    elif not words:
        words = "section" if _resolved(node) else "keys and values" if kind == "object" else WORDS[str(kind)]
    bounds = [f"{sign} {bound(node[name])}" for name, sign in BOUNDS.items() if name in node]
    return ", ".join([words, *bounds])


def bound(value: Any) -> str:
    """1 for 1.0; 0.5 and 4294967295 as they are."""
    return f"{value:g}" if isinstance(value, float) else str(value)
