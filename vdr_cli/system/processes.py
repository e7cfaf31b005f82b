"""Starting a process so that it never outlives us, and ending everything below us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

end_process = os._exit
"""Ends this process at once. Reward functions that call os._exit get an exception instead (rewards/leaving.py)."""


def start(command: Sequence[str], environment: Mapping[str, str], stderr: int | None = None) -> subprocess.Popen[bytes]:
    """A child in a session of its own (Ctrl-C in the terminal reaches only us) that gets SIGTERM when we die.

    stderr: subprocess.PIPE to read it here; None: ours.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def follow_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        command, env=dict(environment), stderr=stderr, start_new_session=True, preexec_fn=follow_parent
    )


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that none of them gets away (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(patience: float, killed_first: str | None = None) -> int:
    """SIGTERM to everything below this process, SIGKILL after `patience` seconds; how many needed that.

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
    return len(alive)
