"""DeepSpeed's compiled operators, as `vdr doctor` lists them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vdr_cli.engine import operators


class Builder:
    def __init__(self, compatible: bool) -> None:
        self.compatible = compatible

    def is_compatible(self, verbose: bool) -> bool:
        print("a warning of DeepSpeed's")
        return self.compatible


def test_installed_and_buildable_are_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    modules = {
        "git_version_info": SimpleNamespace(installed_ops={"cpu_adam": True, "fused_adam": False}),
        "ops.op_builder.all_ops": SimpleNamespace(ALL_OPS={"cpu_adam": Builder(True), "fused_adam": Builder(False)}),
    }
    monkeypatch.setattr("vdr_cli.engine.deepspeed_import.module", modules.__getitem__)
    assert operators.operators() == [
        ("cpu_adam", True, True),
        ("fused_adam", False, False),
        ("async_io", False, False),
        ("transformer_inference", False, False),
    ]
    assert capsys.readouterr().out == "", "what DeepSpeed prints meanwhile is not for the table"


def test_the_real_list_has_a_line_per_operator() -> None:
    assert [name for name, _, _ in operators.operators()] == list(operators.SHOWN)
