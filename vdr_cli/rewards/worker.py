"""A process that calls reward functions: python -m vdr_cli.rewards.worker SOCKET PARENT. It imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from vdr_cli.rewards.base import listed
from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.rewards.loading import find_function, one_line
from vdr_cli.rewards.logs import log_in
from vdr_cli.system.processes import end_with_parent

MANY = 1_000_000  # answers of a function that is told of no completions


def main() -> None:
    """Answer (name, arguments) until the socket is closed.

    Answers are (value, None, what it logged) or (None, what went wrong, None).
    """
    socket, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent, signal.SIGKILL)  # whatever a function does, also inside C, it does not outlive the run
    with Connection(socket) as connection, contextlib.suppress(EOFError):
        while True:
            name, arguments = connection.recv()
            connection.send_bytes(_answer(name, arguments))


def _answer(name: str, arguments: dict[str, Any]) -> bytes:
    try:
        value = _value(find_function(name), arguments)
        return pickle.dumps((value, None, log_in(arguments)))
    except BaseException as error:  # SystemExit too: the run is told, not the process ended
        return pickle.dumps((None, one_line(error), None))


def _value(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with exit_is_an_error():
        value = function(**arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        counts = (len(argument) for argument in arguments.values() if isinstance(argument, list))
        return listed(value, next(counts, MANY))


if __name__ == "__main__":
    main()
