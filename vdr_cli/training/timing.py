"""Seconds spent in each phase of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from vdr_cli.launch import watchdog


class PhaseTimer:
    """Adds up the seconds of named phases until `take`, and tells the watchdog where the process is.

    Phases may nest; each counts its own whole time.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = perf_counter()
        watchdog.phase(name)
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - started

    def take(self) -> dict[str, float]:
        """The sums so far, which start again from 0."""
        taken, self._seconds = self._seconds, {}
        return taken
