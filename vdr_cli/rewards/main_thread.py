"""Reward functions that need a main thread: noticed where they are called, then called in a process of their own.

A reward function runs on a thread of the rank, but only a main thread may handle signals (time limits by SIGALRM, as in
math_verify) and some objects work only on the thread that made them. Many functions catch such an error and return 0,
so the attempt is noticed, not the error.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vdr_cli.rewards.processes import RaisedThereError, RewardProcesses

logger = logging.getLogger(__name__)

_WATCHED = ("signal", "set_wakeup_fd", "alarm", "setitimer")
_SYMPTOMS = ("main thread", "no current event loop", "can only be used in that same thread")
"""Parts of the messages of CPython's signal, asyncio and sqlite3 modules."""

_attempts: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("attempts", default=None)


@contextmanager
def noticing_attempts() -> Iterator[list[str]]:
    """A list that takes the names of functions of `signal` that the block called although it is on another thread."""
    attempts: list[str] = []
    token = _attempts.set(attempts)
    try:
        yield attempts
    finally:
        _attempts.reset(token)


def need_of(attempts: list[str], error: BaseException | None) -> str | None:
    """The thing for which a call needs a main thread, from its attempts and its error; None: it needs none."""
    if attempts:
        return f"signal.{attempts[0]}"
    told = "" if error is None or isinstance(error, RaisedThereError) else str(error)
    return told[:100] if any(symptom in told for symptom in _SYMPTOMS) else None


def watch_signals() -> None:
    """Replace the functions of `signal` by ones that notice reward functions; before a user's module is imported."""
    for name in _WATCHED:
        real = getattr(signal, name)
        if not getattr(real, "is_watched", False):
            setattr(signal, name, _watched(name, real))


def _watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*arguments: Any, **named: Any) -> Any:
        attempts = _attempts.get()
        if attempts is not None and threading.current_thread() is not threading.main_thread():
            attempts.append(name)
            # alarm and setitimer would not raise: their signal would interrupt the run's main thread.
            raise ValueError(f"signal.{name} only works in main thread of the main interpreter")
        return real(*arguments, **named)

    call.is_watched = True  # type: ignore[attr-defined]
    return call


class OwnProcess:
    """A function of the configuration on the main thread of a process, once that is started."""

    def __init__(self, name: str) -> None:
        """name: as in the configuration."""
        self._name = name
        self._processes: RewardProcesses | None = None
        self._lock = threading.Lock()

    @property
    def is_used(self) -> bool:
        return self._processes is not None

    def start(self) -> None:
        """Start the process, unless it is there."""
        with self._lock:
            if self._processes is None:
                self._processes = RewardProcesses(1)

    def start_for(self, label: str, need: str) -> None:
        """Start the process, unless it is there, and say why. label: the function in messages."""
        if not self.is_used:
            logger.warning(
                "%s needs the main thread (%s): it is called in a process of its own; "
                "rewards.processes=1 does so from the start for reward functions",
                label,
                need,
            )
        self.start()

    def __call__(self, **arguments: Any) -> Any:
        assert self._processes is not None
        return self._processes.call(self._name, arguments)
