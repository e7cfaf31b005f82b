"""vdr_cli/config/schema.json from the settings in config/sections/, and docs/configuration.md from that.

python scripts/build/config_reference.py           # write both
python scripts/build/config_reference.py --check   # exit 1 when one is out of date
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from vdr_cli.config import Config
from vdr_cli.config.described import SCHEMA_FILE, Setting, sections, settings_in

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

INTRODUCTION = """\
# Settings

<!-- Made by scripts/build/config_reference.py from vdr_cli/config/sections/: change it there. -->

A setting is a key in a section. Its value comes from the following places, each overriding the ones before it: the
default below, the recipe of a bed (when `model.name` is the bed's name; this holds for `Config(...)` in Python too),
a YAML file, `--set section.key=value`, and the setting's own flag (`vdr train --help`):

```yaml
rollout:
  group_size: 16
train: {steps: 200, learning_rate: 1.0e-6}
```

```bash
vdr train run.yaml --set rollout.temperature=0.9 --set 'rollout.stop=["\\n\\n"]' --steps 300
vdr train run.yaml --dry-run          # the plan, and the settings that differ from the defaults (--all: every one)
```

Unknown keys, values out of range and combinations that cannot work are refused before any weights are loaded, with a
one-line error that names the key and where it was given. `null` stands for None. A run writes all its settings
to `config.yaml`; `vdr recipes` has complete files to start from.

An editor with a YAML language server can complete and check a settings file that names the JSON schema. Recipes from
`vdr recipes copy` name it in a comment, `# yaml-language-server: $schema=...`; copy that line into your own files.
"""


class _Untitled(GenerateJsonSchema):
    """Titles would repeat every key in capitals."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_text() -> str:
    """The JSON schema of a configuration file."""
    made = _tidy(Config.model_json_schema(schema_generator=_Untitled))
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of vdr",
        "$comment": "Made by scripts/build/config_reference.py from vdr_cli/config/sections/: change it there.",
    }
    return json.dumps({**head, **made}, indent=1, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """The same schema, descriptions on one line and classes' names left out."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _tidy(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(inspect.cleandoc(kept["description"]).split())
    return kept


def page() -> str:
    """The reference page, from schema.json as it lies there."""
    return "\n".join([INTRODUCTION, *(_section(section) for section in sections())])


def _section(section: Setting, level: int = 2) -> str:
    lines = [f"{'#' * level} {section.key}", ""]
    if description := section.section.get("description"):
        lines += [description, ""]
    inside = list(settings_in(section.key))
    lines += ["| key | values | default | |", "|---|---|---|---|", *map(_row, inside)]
    below = [_section(inner, level + 1) for inner in inside if inner.section]
    return "\n".join([*lines, "", *below])


def _row(setting: Setting) -> str:
    default = setting.default
    if default not in ("to be given", "below", "null"):
        default = f"`{default}`" if default else "empty"
    cells = (f"`{setting.key.rpartition('.')[2]}`", setting.values, default, setting.description)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(arguments: list[str]) -> int:
    check = arguments == ["--check"]
    stale = []
    # The page is made from schema.json, so it comes second.
    for path, make in ((SCHEMA_FILE, schema_text), (PAGE, page)):
        text = make()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"{' and '.join(stale)} out of date: run python scripts/build/config_reference.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
