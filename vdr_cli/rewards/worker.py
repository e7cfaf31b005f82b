"""A process that calls reward functions: python -m vdr_cli.rewards.worker SOCKET PARENT. It imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from vdr_cli.rewards.base import listed
from vdr_cli.rewards.leaving import leaving_is_an_error
from vdr_cli.rewards.loading import find_function, one_line

PR_SET_PDEATHSIG = 1
MANY = 1_000_000  # answers of a function that is told of no completions


def main() -> None:
    """Answer (name, arguments) with (value, None) or (None, what went wrong) until the socket is closed."""
    socket, parent = int(sys.argv[1]), int(sys.argv[2])
    _end_with(parent)
    with Connection(socket) as connection, contextlib.suppress(EOFError):
        while True:
            name, arguments = connection.recv()
            connection.send_bytes(_answer(name, arguments))


def _answer(name: str, arguments: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps((_value(find_function(name), arguments), None))
    except BaseException as error:  # SystemExit too: the run is told, not the process ended
        return pickle.dumps((None, one_line(error)))


def _value(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with leaving_is_an_error():
        value = function(**arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        counts = (len(argument) for argument in arguments.values() if isinstance(argument, list))
        return listed(value, next(counts, MANY))


def _end_with(parent: int) -> None:
    """Linux: whatever a function does, also inside C, it does not outlive the run."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    main()
