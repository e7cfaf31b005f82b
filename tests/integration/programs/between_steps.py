"""The task's reward; rank 1 is killed before its optimizer step number KILL_BEFORE."""

import os
import signal

from vdr_cli.beds.countdown import countdown  # noqa: F401  the reward
from vdr_cli.engine.engine import Engine


def killed_before(number, step=Engine.step):
    calls = []

    def wrapped(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    return wrapped


if os.environ.get("RANK") == "1" and "KILL_BEFORE" in os.environ:
    Engine.step = killed_before(int(os.environ["KILL_BEFORE"]))
