"""Several train, eval and score calls in one process, in any order, as in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run

pytestmark = pytest.mark.integration

REWARDS = """
import os, signal, time

def interrupting(completions, **_):
    "Ctrl-C in the first step after INTERRUPT is set; `twice`: again, when the first counts as another one."
    for _ in range({"once": 1, "twice": 2}.get(os.environ.pop("INTERRUPT", ""), 0)):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.5)
    return [float(len(text)) for text in completions]
"""


def test_jobs_follow_each_other_and_ctrl_c_leaves_a_usable_process(tmp_path: Path, forked: Run) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    program = Path(__file__).with_name("programs") / "many_jobs.py"
    ended = forked(str(program), str(tmp_path))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == "all done" and "stopped at once" in ended.stdout
