"""docs/configuration.md from the settings' own docstrings.

python scripts/config_reference.py           # write it
python scripts/config_reference.py --check   # exit 1 when it is not up to date
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vdr_cli.config.messages import bound, section_of
from vdr_cli.config.schema import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Settings

<!-- Made by scripts/config_reference.py from vdr_cli/config/schema.py: change it there. -->

A setting is a key in a section. It is given, the later over the earlier, by its default below, by the starter's recipe
(when `model.name` is `starter`), in a YAML file, with `--set section.key=value`, or with the flag that stands for it
(`vdr train --help`):

```yaml
rollout:
  group_size: 16
train: {steps: 200, learning_rate: 1.0e-6}
```

```bash
vdr train run.yaml --set rollout.temperature=0.9 --set 'rollout.stop=["\\n\\n"]' --steps 300
vdr train run.yaml --dry-run          # every setting as it will be used, and what it amounts to
```

A key that does not exist, a value out of its range and a combination that cannot work are refused before any weight is
loaded, in one line that names the key and where it was given. `null` stands for None. A run writes all its settings
to `config.yaml`; `vdr recipes` has complete files to start from.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None
        parts.append(_section(name, section))
    return "\n".join(parts)


def _section(name: str, section: type[BaseModel], level: int = 2) -> str:
    lines = [f"{'#' * level} {name}", ""]
    if section.__doc__ and section.__doc__ != getattr(section.__base__, "__doc__", None):
        lines += [_prose(section.__doc__), ""]
    lines += ["| key | values | default | |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {_values(field)} | {_default(field)} | {_said(field)} |" for key, field in _rows(section)]
    below = [
        _section(f"{name}.{key}", inner, level + 1)
        for key, field in section.model_fields.items()
        if (inner := section_of(field.annotation)) is not None
    ]
    return "\n".join([*lines, "", *below])


def _rows(section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    yield from section.model_fields.items()


def _values(field: FieldInfo) -> str:
    text = _words(field.annotation)
    bounds = _bounds(field.metadata)
    return f"{text}{', ' if bounds else ''}{bounds}".replace("|", "\\|")


def _words(annotation: Any) -> str:
    """What a user may write, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = _bounds(list(arguments[1:]))
        return _words(arguments[0]) + (f", {bounds}" if bounds else "")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is list:
        inner = section_of(annotation)
        return "list of sections" if inner is not None else f"list of {_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} numbers"
    if origin is dict:
        return "keys and values"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "null"}[annotation]


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    flat = [item for entry in metadata for item in getattr(entry, "metadata", [entry])]
    given = [(sign, getattr(item, name)) for item in flat for name, sign in signs.items() if hasattr(item, name)]
    return ", ".join(f"{sign} {bound(value)}" for sign, value in given)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else None
    if field.is_required():
        return "to be given"
    if isinstance(value, BaseModel):
        return "below"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`" if value != "" else "empty"


def _said(field: FieldInfo) -> str:
    return _prose(field.description or "").replace("|", "\\|")


def _prose(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        if not current:
            print(f"{PAGE} is not up to date: run python scripts/config_reference.py", file=sys.stderr)
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
