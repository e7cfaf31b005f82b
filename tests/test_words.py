"""Docstrings name the thing: none opens with a question word or a bare "Of"."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENINGS = {"What", "How", "Where", "Whether", "When", "Of", "Who", "Which", "Why"}


def docstrings(source: str) -> list[tuple[int, str]]:
    """(line, text) of every docstring: of modules, classes and functions, and below attributes and constants."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    values = [node.value for node in statements if isinstance(node.value, ast.Constant)]
    return [(value.lineno, value.value) for value in values if isinstance(value.value, str)]


@pytest.mark.parametrize("tree", ["vdr_cli", "scripts", "tests"])
def test_docstrings_open_with_the_thing(tree: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted((ROOT / tree).rglob("*.py"))
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if text.split() and text.split()[0] in OPENINGS
    ]
    assert found == []


def test_every_kind_of_docstring_is_seen() -> None:
    source = '"""A."""\nX = 1\n"""B."""\nclass C:\n    """D."""\n    y: int = 0\n    """E."""\n'
    assert [text for _, text in docstrings(source)] == ["A.", "B.", "D.", "E."]
