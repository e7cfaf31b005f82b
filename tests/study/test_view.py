"""The display of `vdr study`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from rich.console import Console

from vdr_cli.study.plan import tasks_of
from vdr_cli.study.running import Job
from vdr_cli.study.view import StudyView, last_step, time_left


class Process:
    pid = 0

    def poll(self) -> None:
        return None


def shown(make_study: Callable[..., Any], terminal: bool) -> tuple[str, list[Job]]:
    study, directory = make_study(seeds=3)
    jobs = [Job(task) for task in tasks_of(study)]
    for job in jobs[:5]:
        job.phase, job.seconds = "done", 60.0
    jobs[5].phase, jobs[5].process = "training", Process()
    jobs[6].phase, jobs[6].reason, jobs[6].seconds = "failed", "training ended with exit code 3: \x1b[31mno", 2.0
    said = io.StringIO()
    console = Console(file=said, force_terminal=terminal, width=100, highlight=False)
    with StudyView(study, directory, 2, console) as view:
        view.update(jobs)
        view.ended(jobs[4])
        view.ended(jobs[6])
    return said.getvalue(), jobs


def test_lines_where_there_is_no_terminal(make_study: Callable[..., Any]) -> None:
    text, _ = shown(make_study, terminal=False)
    done, failed = text.splitlines()
    assert done.startswith("5/13 starter/bald_per_token seed 0: solves 0.")
    assert done.endswith("of completions in 0:01:00; 0:03:30 left")  # 7 runs, 2 at a time
    assert failed == "starter/disagreement seed 1: failed after 0:00:02: training ended with exit code 3: ␛[31mno"


def test_a_table_on_a_terminal(make_study: Callable[..., Any]) -> None:
    text, _ = shown(make_study, terminal=True)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "starter/grpo            ■▶·" in text and "starter/disagreement    ■✗·" in text
    assert "training starter/" in text and "step 40/40" in text
    assert "5 done" in text and "about 0:03:30 left" in text


def test_time_left_needs_a_run_to_go_by(make_study: Callable[..., Any]) -> None:
    _, jobs = shown(make_study, terminal=False)
    assert time_left(jobs[5:], 1) is None
    assert last_step(make_study(seeds=1, folder="x")[1].path) is None
