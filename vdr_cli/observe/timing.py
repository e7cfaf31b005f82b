"""Seconds spent in each phase of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from vdr_cli.launch import watchdog


class PhaseTimer:
    """Adds up the seconds of named phases until `take`. Phases may nest; each counts its own whole time."""

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None) -> None:
        """on_phase: told the name of each phase that begins."""
        self._seconds: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = perf_counter()
        watchdog.phase(name)
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - started

    def take(self) -> dict[str, float]:
        """The sums so far; starts anew."""
        taken, self._seconds = self._seconds, {}
        return taken
