"""A process on a CPU: gloo's threads may not start OpenMP teams of their own, freed memory is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
PROGRAM = (PROGRAMS / "gloo_threads.py").read_text(encoding="utf-8")
FAULTS = (PROGRAMS / "page_faults.py").read_text(encoding="utf-8")


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


def page_faults(keep: bool) -> int:
    """Page faults of three pairs of tensors of 64 MB, after the first ten."""
    program = [sys.executable, "-c", FAULTS, "keep" if keep else "leave"]
    return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again() -> None:
    assert page_faults(keep=False) > 90_000, "what the function is for no longer happens: it may go"
    assert page_faults(keep=True) < 10_000
