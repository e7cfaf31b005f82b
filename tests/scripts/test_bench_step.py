"""scripts/bench/bench_step.py: the hooks by which it times vdr's step are still called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import bench_step  # noqa: E402


@pytest.mark.integration
def test_a_step_is_timed_by_phase(tmp_path: Path, forked: Run) -> None:
    model, prompts = bench_step.make_inputs("starter", tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "reward.py").write_text(bench_step.REWARD)
    places = ["--side", "vdr", "--folder", str(tmp_path), "--model", model, "--case", "starter"]
    ended = forked(str(BENCH / "bench_step.py"), *places, "--steps", "1", "--threads", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    assert 0 < found["rollout"] < found["step"]
    assert 0 < found["update"] < found["step"]
