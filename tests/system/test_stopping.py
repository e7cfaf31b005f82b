"""The second Ctrl-C stops at once, whatever runs then."""

import signal
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
IMPORTING = (PROGRAMS / "importing.py").read_text(encoding="utf-8")


def test_while_a_reward_file_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os, signal\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n")
    ended = subprocess.run([sys.executable, "-c", IMPORTING, f"{file}:f"], capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
