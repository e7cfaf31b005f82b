"""The audit imports nothing of what it audits."""

from __future__ import annotations

import ast
from pathlib import Path

import vdr_cli.audit

ALLOWED = ("audit", "beds", "config", "errors", "rewards", "system")


def test_only_settings_errors_and_reward_functions_are_shared():
    for file in Path(vdr_cli.audit.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("vdr_cli."):
                    assert name.split(".")[1] in ALLOWED, f"{file.name} imports {name}"
