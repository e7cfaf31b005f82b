"""scripts/gpu_check.sh: every part at toy size on the CPU, and what a cut, a failure and a missing package leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "scripts" / "bench" / "gpu"
sys.path.insert(0, str(PROGRAMS))

import check as gpu_check  # noqa: E402

from tests.conftest import Run, environment  # noqa: E402

IN_FORKS = ("step-plain", "step-bonus", "step-trl", "step-zero2-micro64", "decode", "disagreement", "profile")


@pytest.mark.integration
def test_parts_run_at_toy_size_as_typed(tmp_path: Path) -> None:
    parts = ("machine", "starter-float32")
    command = ["bash", "scripts/gpu_check.sh", "--dry-run", "--only", ",".join(parts), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    for part in parts:
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert done.returncode == 0, f"{done.stdout}{result.get('log')}"
        assert result["ok"] and result["headlines"]
        assert part in done.stdout


@pytest.mark.integration
@pytest.mark.parametrize(
    "part",
    [part for stage in gpu_check.STAGES for part in stage if part.name in IN_FORKS],
    ids=lambda part: part.name,
)
def test_every_other_part_runs_at_toy_size(part: Any, tmp_path: Path, forked: Run) -> None:
    file = tmp_path / "result.json"
    places = ["--json", str(file), "--work", str(tmp_path), "--toy"]
    ended = forked(str(PROGRAMS / part.script), *part.arguments, *places)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(file.read_text())
    assert result.get("ok", True) and result["headlines"]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The check with parts of its own: one that counts its runs, one that hangs, one that fails, one that lacks TRL."""
    programs = {
        "works": "Path('ran').open('a').write('x')\nargs.json.write_text('{\"headlines\": [\"ran\"]}')",
        "hangs": "args.json.write_text('{\"known\": 1}')\nimport time; time.sleep(600)",
        "fails": "print('what went wrong'); raise SystemExit(5)",
        "lacks": "",
    }
    start = (
        "import argparse\nfrom pathlib import Path\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--json', type=Path)\nparser.add_argument('--work')\nargs = parser.parse_args()\n"
    )
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(start + program)
    limits = {"works": 30.0, "hangs": 2.0, "fails": 30.0, "lacks": 30.0}
    made = tuple(
        gpu_check.Part(name, str(tmp_path / f"{name}.py"), (), limit, ("no_such_module",) if name == "lacks" else ())
        for name, limit in limits.items()
    )
    monkeypatch.setattr(gpu_check, "STAGES", tuple((part,) for part in made))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return gpu_check


def run(check: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["check.py", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    return int(str(ended.value.code)), {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}


def test_what_failed_is_on_file_and_only_that_runs_again(
    parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, found = run(parts, monkeypatch, out)
    assert code == 1
    assert {name: result["ok"] for name, result in found.items()} == {
        "works": True,
        "hangs": False,
        "fails": False,
        "lacks": False,
    }
    assert "limit" in found["hangs"]["reason"] and found["hangs"]["known"] == 1
    assert found["fails"]["reason"] == "exit code 5" and "what went wrong" in found["fails"]["log"]
    assert found["lacks"]["reason"] == "needs no_such_module"
    assert "needs no_such_module" in capsys.readouterr().out
    (tmp_path / "fails.py").write_text((tmp_path / "works.py").read_text())
    _, again = run(parts, monkeypatch, out)
    assert again["fails"]["ok"]
    assert (tmp_path / "ran").read_text() == "xx", "works once, and what failed before"


def test_an_unknown_part_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["check.py", "--only", "decoding", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no part decoding; there are decode"):
        gpu_check.main()
