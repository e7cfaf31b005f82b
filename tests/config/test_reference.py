"""schema.json says what sections/ says, and docs/configuration.md what schema.json says, about every key."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from vdr_cli.config.described import SCHEMA_FILE, setting
from vdr_cli.config.load import dump_config, load_config
from vdr_cli.config.messages import dotted_keys

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "build" / "config_reference.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.skipif(pydantic.VERSION.startswith(("2.8", "2.9")), reason="this pydantic spells bounds another way")
def test_the_schema_is_up_to_date(script: dict[str, Any]) -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == script["schema_text"](), "run make generated"


def test_the_page_is_up_to_date(script: dict[str, Any]) -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run make generated"


def test_every_key_is_described(script: dict[str, Any]) -> None:
    rows = [line for line in script["page"]().splitlines() if line.startswith("| `")]
    assert len(rows) >= len(list(dotted_keys())) - 10  # sections themselves are headings
    assert [line for line in rows if line.endswith("|  |")] == []


def test_the_description_needs_no_pydantic() -> None:
    code = "import sys, vdr_cli.config.described as d; d.setting('train.steps'); print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_defaults_are_the_models() -> None:
    tree = yaml.safe_load(dump_config(load_config(overrides=["model.name=other", "model.lora={}"])))
    compared = 0
    for key in dotted_keys():
        described = setting(key)
        if described.section or "default" not in described.node or key == "model.name":
            continue
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        assert value == described.node["default"], key
        compared += 1
    assert compared > 100


def test_words_of_a_key() -> None:
    assert setting("disagreement.mode").choices == ("none", "per_token", "end_of_sequence")
    assert setting("disagreement.scope").choices == ("full", "last_k"), "null is no word"
    assert setting("grpo.loss").choices[:2] == ("grpo", "dr_grpo")
    assert setting("train.steps").choices == setting("model.lora").choices == ()
    assert setting("model.lora.targets").choices == (), "it takes names of modules too"
    assert [setting(f"train.{key}").type for key in ("steps", "learning_rate", "output", "keep_best")] == [
        int,
        float,
        str,
        bool,
    ]
    with pytest.raises(KeyError):
        setting("train.stepz")
