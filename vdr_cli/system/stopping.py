"""Ctrl-C and SIGTERM: the first one lets the step end and saves, the second one stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

from vdr_cli.system.processes import end_process

ONE_SIGNAL = 1.0
"""Seconds within which several are one: the terminal, Slurm, a launcher and vdr itself may all pass the same one on."""

_command = False


def this_is_a_command() -> None:
    """Say that this process runs a `vdr` command and nothing else: a second signal ends it."""
    global _command
    _command = True


class StopSignal:
    """Remembers the first SIGINT or SIGTERM of this process."""

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def received(self) -> int:
        """The first signal's number; 0 before any."""
        return self._received

    def _remember(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
        elif now - self._received_at > ONE_SIGNAL:
            if _command:
                end_process(128 + number)
            raise KeyboardInterrupt  # a notebook or a script goes on
