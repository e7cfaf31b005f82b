"""`vdr eval` and `vdr score` on two processes: one process's numbers, one line for an error of either."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROWS = 1500  # two windows of vdr score: one for each process

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Prompts and completions in the starter's alphabet, of many lengths."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(ROWS):
            completion = f"{n % 9 + 1}+{n % 7 + 1}*{n % 5 + 1}"[: n % 5 + 1]
            file.write(
                json.dumps({"prompt": f"{n % 9 + 1},{n % 7 + 1},{n % 5 + 1}={n % 60}:", "completion": completion})
            )
            file.write("\n")
    return path


def test_eval_on_two_processes_is_eval(tmp_path: Path, forked: Command) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    flags = ("eval", "starter", "-n", "8", "--prompts", "70")
    assert forked(*flags, "--json", str(one)).returncode == 0
    done = forked(*flags, "--json", str(two), ranks=2)
    assert done.returncode == 0, done.stderr
    assert two.read_text() == one.read_text()
    assert "distinct_solved_share" in one.read_text(), "solution classes too"
    assert done.stdout.count("pass@1") == 1, "only the first process shows the table"


def test_score_on_two_processes_is_score(tmp_path: Path, rows: Path, vdr: Command, forked: Command) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    flags = ("score", str(rows), "--model", "starter", "--members", "2", "--tokens")
    assert forked(*flags, "-o", str(one)).returncode == 0
    done = vdr(*flags, "-o", str(two), "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    assert two.read_bytes() == one.read_bytes()
    assert done.stdout.count("rows scored") == 1
    assert not (tmp_path / "two.jsonl.parts").exists()


def test_an_error_of_the_second_process_is_one_line(tmp_path: Path, rows: Path, forked: Command) -> None:
    lines = rows.read_text().splitlines()
    lines[1200] = '{"prompt": "1,2,3=6:"}'
    rows.write_text("\n".join(lines) + "\n")
    flags = ("score", str(rows), "--model", "starter", "--members", "0", "-o", str(tmp_path / "o.jsonl"))
    done = forked(*flags, ranks=2)
    ours = [line for line in done.stderr.splitlines() if line.startswith("vdr")]
    assert done.returncode == 3 and len(ours) == 1, done.stderr
    assert "rows.jsonl line 1201" in ours[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "o.jsonl").exists()


def test_launch_mistakes_before_anything_starts(tmp_path: Path, vdr: Command) -> None:
    for command in (("eval", "starter"), ("score", "x.jsonl", "--model", "starter")):
        done = vdr(*command, "--hostfile", str(tmp_path / "none"))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "none" in done.stderr
        done = vdr(*command, "--launcher", "ssh")
        assert (
            done.returncode == 2 and "--launcher: launch.launcher must be 'pdsh', 'openmpi' or 'slurm'" in done.stderr
        )
