"""Threads on a CPU: gloo's may not start OpenMP teams of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
PROGRAM = (PROGRAMS / "gloo_threads.py").read_text(encoding="utf-8")


def started(keep: bool) -> list[int]:
    """Threads that this thread may use, and threads that large collectives started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    program = [sys.executable, "-c", PROGRAM, "keep" if keep else "leave"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_gloos_threads_copy_alone() -> None:
    assert started(keep=False)[1] > 0, "what the function is for no longer happens: it may go"
    for _ in range(3):
        assert started(keep=True) == [3, 0]
