"""The second Ctrl-C stops at once, whatever runs then."""

import signal
import subprocess
import sys
from pathlib import Path

IMPORTING = """
import sys
from vdr_cli.system import stopping
from vdr_cli.rewards.loading import find_function
stopping.ONE_SIGNAL = -1.0
with stopping.StopSignal():
    find_function(sys.argv[1])
"""


def test_while_a_reward_file_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os, signal\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n")
    ended = subprocess.run([sys.executable, "-c", IMPORTING, f"{file}:f"], capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
