"""Calls of a user's code beside each other, each with a time limit; sync functions on threads, async ones on a loop."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.system.event_loop import event_loop, leave_event_loop

MOST_THREADS = 32
"""Sync calls that run at once."""


@dataclass
class Call:
    """One call, which ends with a value or an error, or is late."""

    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    error: BaseException | None = None
    is_late: bool = False
    """It had not returned in time; its thread is left behind."""
    began: float | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Call it here and now."""
        self.began = time.monotonic()
        try:
            with exit_is_an_error():
                value = self.function(**self.arguments)
                self.value = asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            self.error = error
        self.done.set()

    async def await_it(self) -> None:
        """Await it on the loop of this process."""
        self.began = time.monotonic()
        try:
            with exit_is_an_error():
                self.value = await self.function(**self.arguments)
        except BaseException as error:
            self.error = error
        self.done.set()

    def wait(self, timeout: float) -> None:
        """Until it is done, or late: `timeout` seconds after it began."""
        while not self.done.wait(0.05 if self.began is None else max(self.began + timeout - time.monotonic(), 0.0)):
            if self.began is not None and time.monotonic() - self.began >= timeout:
                self.is_late = True
                return


class Workers:
    """Daemon threads for the life of a run, and the process's event loop; what hangs is replaced."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._threads = 0

    def run(self, calls: Sequence[Call], timeout: float) -> None:
        """Make the calls and wait for all of them, `timeout` seconds for each."""
        plain = [call for call in calls if not inspect.iscoroutinefunction(call.function)]
        for call in calls:
            if inspect.iscoroutinefunction(call.function):
                asyncio.run_coroutine_threadsafe(call.await_it(), event_loop())
        for call in plain:
            self._queue.put(call)
        while self._threads < min(len(plain), MOST_THREADS):
            self._start()
        for call in calls:
            call.wait(timeout)
            if call.is_late:
                self._replace(call)

    def close(self) -> None:
        """End the threads that wait for work."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _replace(self, call: Call) -> None:
        if inspect.iscoroutinefunction(call.function):
            leave_event_loop()
        else:
            self._threads -= 1
            self._start()

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call.run()
            if call.is_late:  # another thread has taken this one's place
                return


async def _awaited(value: Any) -> Any:
    return await value
