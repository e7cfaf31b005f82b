"""A command on a tether: its exit code, and its end with all that it started."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from vdr_cli.launch import tether

STARTS_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def tethered(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", tether.__name__, sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("program", "code"),
    [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL)],
)
def test_the_exit_code_is_the_commands(program: str, code: int) -> None:
    assert tethered(program).wait(60) == code


def test_sigterm_ends_everything_that_was_started() -> None:
    process = tethered(STARTS_A_CHILD)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    child.wait(60)
    assert not child.is_running()
