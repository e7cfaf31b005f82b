"""scripts/bench/harness.py: result files and cases in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", ROOT / "scripts" / "bench" / "harness.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_result_file_says_how_its_numbers_came_about(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "case.json"
    script = str(ROOT / "scripts" / "bench" / "bench_step.py")
    monkeypatch.setattr(sys, "argv", [script, "--case", "qwen2 long", "--json", str(path), "--bonus"])
    harness.write_results(path, {"seconds": {"vdr": 1.23456789}, "ratios": [0.33333333], "kills": 30, "none": None})
    record = json.loads(path.read_text())
    assert record["command"] == "python scripts/bench/bench_step.py --case 'qwen2 long' --bonus"
    assert record["results"] == {"seconds": {"vdr": 1.235}, "ratios": [0.3333], "kills": 30, "none": None}
    assert record["provenance"] == "measured" and record["machine"]["cores"] and record["versions"]["python"]
    harness.write_results(None, {})
    monkeypatch.setattr(sys, "argv", [script, f"--json={path}", "--bonus"])
    assert harness.command_line() == "python scripts/bench/bench_step.py --bonus"


def test_a_case_runs_in_a_process_of_its_own(harness: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "case.py"
    script.write_text("import json, sys\nprint('noise')\nprint(json.dumps({'given': len(sys.argv) - 1}))\n")
    assert harness.in_own_process(str(script), "a", "b") == {"given": 2}
    script.write_text("raise SystemExit('no memory')")
    with pytest.raises(SystemExit, match=r"(?s)case.py a failed.*no memory"):
        harness.in_own_process(str(script), "a")


def test_medians_are_taken_key_by_key(harness: ModuleType) -> None:
    runs = [{"step": 3.0, "rollout": 1.0}, {"step": 1.0, "rollout": 2.0}, {"step": 2.0, "rollout": 9.0}]
    assert harness.medians(runs) == {"step": 2.0, "rollout": 2.0}


def test_both_clocks_run(harness: ModuleType) -> None:
    wall, processor = harness.seconds_of(lambda: sum(range(10**6)))
    assert wall > 0 and processor > 0
