"""YAML in and out: plain trees with the line of every key, and text that loads back to the same tree.

PyYAML reads YAML 1.1, where `off` is a boolean and `1e-6` a string. Settings such as `observe.live: off`
and `learning_rate: 1e-6` mean what they say only under the YAML 1.2 core rules, so those are used here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from vdr_cli.errors import ConfigError

KeyPath = tuple[str | int, ...]

BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """SafeLoader under the YAML 1.2 core rules."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either YAML version would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML folds Unicode line breaks in every style but the double-quoted one.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """A YAML file as a plain tree, and the line (from 1) on which each key stands."""

    tree: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


def parse_value(text: str) -> Any:
    """One YAML value, as typed after `--set key=`. Raises yaml.YAMLError.

    Text without quotes is taken as it was typed: YAML would read `after ####` as `after` and a comment, and join lines.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        is_plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
        if is_plain and not text.lstrip().startswith(("!", "&")) and text.strip() not in ("", node and node.value):
            return text
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def parse_document(text: str, name: str) -> Document:
    """The tree of a configuration file. ConfigError (FILE:LINE) on bad syntax, duplicate keys, or a non-mapping."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document({})
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{name}: not a configuration; it must consist of sections such as `train:` with keys below"
            )
        lines: dict[KeyPath, int] = {}
        _walk(node, (), lines, name)
        return Document(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump_tree(tree: dict[str, Any]) -> str:
    """YAML text of a plain tree, in its own order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    """Record the line of every key below `node`; refuse a key given twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        dotted = ".".join(map(str, (*path, key)))
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{name}:{line}: a key must be one word")
        if key_node.tag not in KEY_TAGS:
            raise ConfigError(f"{name}:{line}: the key {key or 'before the colon'} must be text")
        if key in seen and key != "<<":
            raise ConfigError(f"{name}:{line}: {dotted} is given twice (first on line {seen[key]}); keep one")
        seen[key] = line
        lines[(*path, key)] = line
        _walk(value_node, (*path, key), lines, name)
