"""Starting a process so that it never outlives us, and ending everything below us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

end_process = os._exit
"""Ends this process at once. Reward functions that call os._exit get an exception instead (rewards/exiting.py)."""


def start(command: Sequence[str], environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[bytes]:
    """A child in a session of its own (Ctrl-C in the terminal reaches only us) that gets SIGTERM when we die.

    streams: stdin, stdout and stderr as of subprocess.Popen; each is ours unless it is given. Raises OSError.
    """
    follow = partial(end_with_parent, os.getpid())
    return subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=follow, **streams)


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """In a child: get this signal when the parent dies, kill -9 included; exit with 1 when it has died already (Linux).

    parent: its process id. The signal comes when the thread that started this process ends.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        end_process(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that none of them gets away (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(patience: float, killed_first: str | None = None) -> None:
    """SIGTERM to everything below this process, SIGKILL after `patience` seconds.

    killed_first: a word of the command lines of those that get SIGKILL at once.
    """
    below = psutil.Process().children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            if killed_first is not None and killed_first in process.cmdline():
                process.kill()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(below, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
