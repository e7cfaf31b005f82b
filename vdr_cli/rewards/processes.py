"""Reward functions in processes of their own: they compute beside the sampling, and their end is not the run's.

A function in Python holds the interpreter, for which sampling in the same process waits. One that hangs in C (a
runaway regular expression) never gives it back. Here it has another interpreter.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.logs import log_in

EXIT_SECONDS = 5.0
"""Seconds between a worker's closed socket and its end."""


class RaisedThereError(Exception):
    """An exception of a function in its process, as one line."""


class RewardProcesses:
    """Workers that know every function by its name in the configuration; a call takes the first that is free."""

    def __init__(self, count: int) -> None:
        self.count = count
        # A worker is killed when the thread that started it ends, so that thread lives as long as this process.
        self._starter = ThreadPoolExecutor(1, "reward processes")
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(count):
            self._free.put(self._start())

    def taking(self, name: str, reward: LoadedReward) -> LoadedReward:
        """This reward, called by the workers. Models stay, and async functions: they wait, they do not compute."""
        if reward.is_async or reward.is_model:
            return reward
        return replace(reward, function=_Elsewhere(name, reward.function, self), at_once=self.count)

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """The function's answer, or RaisedThereError. A worker that ended is replaced."""
        worker = self._free.get()
        try:
            return worker.call(name, arguments)
        except (EOFError, OSError):
            message = f"its process ended {worker.end()}"
            worker = self._start()
            raise RaisedThereError(message) from None
        finally:
            self._free.put(worker)

    def _start(self) -> _Worker:
        return self._starter.submit(_Worker).result()


class _Worker:
    def __init__(self) -> None:
        self.connection: Connection
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "vdr_cli.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        # In a session of its own: Ctrl-C is for the run, which still wants the rewards of its last step.
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        try:
            sent = pickle.dumps((name, arguments))
        except Exception as error:
            raise RaisedThereError(f"its arguments cannot go to another process: {error}") from None
        self.connection.send_bytes(sent)
        value, problem, recorded = pickle.loads(self.connection.recv_bytes())
        if recorded is not None and (log := log_in(arguments)) is not None:
            log.take(recorded)
        if problem is not None:
            raise RaisedThereError(problem)
        return value

    def end(self) -> str:
        """Its end in words: `with code 3`, `by SIGSEGV`."""
        self.connection.close()
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


class _Elsewhere:
    """A function of the configuration, called in one of the processes; it shows the function's own parameters."""

    def __init__(self, name: str, function: Callable[..., Any], processes: RewardProcesses) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]
        self._name, self._processes = name, processes

    def __call__(self, **arguments: Any) -> Any:
        return self._processes.call(self._name, arguments)
