"""The processes of a launch: DeepSpeed's runner, and the ranks below this process."""

from __future__ import annotations

import contextlib

import psutil

RUNNER = "vdr_cli.launch.runner"
"""The module that runs DeepSpeed's runner. It must never get SIGTERM (tether.py says why)."""


def ranks_below() -> list[psutil.Process]:
    """The ranks among this process's descendants: RANK is in their environment, and not in their parent's.

    What a rank starts itself (a reward function's programs) inherits RANK, and is not to be signalled.
    """
    found: dict[int, psutil.Process] = {}
    parents: dict[int, int] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if "RANK" in process.environ():
                found[process.pid], parents[process.pid] = process, process.ppid()
    return [process for pid, process in found.items() if parents[pid] not in found]
