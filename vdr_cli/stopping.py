"""Ctrl-C and SIGTERM: the first one lets the step end and saves, the second one stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

from vdr_cli.engine import collectives
from vdr_cli.rewards.leaving import end_process

ONE_SIGNAL = 1.0
"""Seconds within which several are one: the terminal, Slurm, a launcher and vdr itself may all pass the same one on."""


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; `agreed` tells every rank when any rank got one."""

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

    def agreed(self) -> int:
        """The signal number that any rank received, 0 if none. Collective."""
        return int(collectives.all_reduce_max([float(self._received)])[0])

    def _remember(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
        elif now - self._received_at > ONE_SIGNAL:
            end_process(128 + number)
