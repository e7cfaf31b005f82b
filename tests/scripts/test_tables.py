"""The tables of README and docs are what benchmarks/ holds, and each result says where it comes from."""

from __future__ import annotations

import json
import re
import runpy
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks").glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "evidence").glob("*.md"))]
TEMPLATES = sorted((ROOT / "benchmarks" / "tables").glob("*.md"))


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "build" / "tables.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_up_to_date(page: Path, tables: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == tables["page"](text), "run make generated"
    assert text.count("<!-- table:") == len(tables["BLOCK"].findall(text)) == text.count("<!-- /table -->")


def test_a_changed_result_changes_its_table(tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = deepcopy(tables["results"]())
    found["rollout"]["ratio"] = 0.123
    monkeypatch.setitem(tables["table"].__globals__, "results", lambda: found)
    assert " 0.12 " in tables["table"]("measured")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"] and record["machine"] and record["results"]
    assert record["provenance"].startswith(("measured", "transcribed from the earlier docs"))
    scripts = re.findall(r"scripts/\S+", record["command"])
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_every_result_and_template_is_used() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [path.stem for path in TEMPLATES if f"<!-- table:{path.stem} -->" not in pages] == []
    templates = "".join(path.read_text(encoding="utf-8") for path in TEMPLATES)
    assert [path.stem for path in RESULTS if not re.search(rf"\b{path.stem.replace('-', '_')}\b", templates)] == []


def test_numbers_are_written_for_readers(tables: dict[str, Any]) -> None:
    assert [tables["number"](*given) for given in ((1234567.0, 0), (0.125, 2), (-0.5, 1))] == [
        "1,234,567",
        "0.12",
        "\N{MINUS SIGN}0.5",
    ]


def test_words_that_the_numbers_no_longer_bear_out_are_an_error(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = deepcopy(tables["results"]())
    found["evidence_countdown4"]["pass@64"]["end_of_sequence"]["difference"]["verdict"] = "better"
    monkeypatch.setitem(tables["table"].__globals__, "results", lambda: found)
    with pytest.raises(ValueError, match="does not hold any more"):
        tables["table"]("evidence-answer")


def test_studies_pooled_are_one_table_of_all_their_seeds(tables: dict[str, Any]) -> None:
    """One study's is its own difference; that of two weighs them by their seeds."""
    names, found = ("countdown4-confirm", "countdown4-surprisal"), tables["results"]()
    own = [found[f"evidence_{name.replace('-', '_')}"]["pass@64"]["surprisal"]["difference"] for name in names]
    pooled = tables["pooled"](names[:1], "surprisal", 64)
    assert pooled == pytest.approx({name: own[0][name] for name in pooled})
    both = tables["pooled"](names, "surprisal", 64)
    assert both["n"] == sum(one["n"] for one in own)
    assert both["value"] == pytest.approx(sum(one["n"] * one["value"] for one in own) / both["n"])
