"""docs/configuration.md says what the schema says, and says something about every key."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from vdr_cli.config.messages import allowed_values, dotted_keys

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "config_reference.py"


@pytest.fixture(scope="module")
def made() -> str:
    return runpy.run_path(str(SCRIPT))["page"]()


def test_the_page_is_up_to_date(made: str) -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == made, "run python scripts/config_reference.py"


def test_every_key_is_described(made: str) -> None:
    rows = [line for line in made.splitlines() if line.startswith("| `")]
    assert len(rows) >= len(list(dotted_keys())) - 10  # sections themselves are headings
    assert [line for line in rows if line.endswith("|  |")] == []


def test_words_of_a_key() -> None:
    assert allowed_values("disagreement.mode") == ["none", "per_token", "end_of_sequence"]
    assert allowed_values("grpo.loss")[:2] == ["grpo", "dr_grpo"]
    assert allowed_values("train.steps") == [] and allowed_values("model.lora") == []
