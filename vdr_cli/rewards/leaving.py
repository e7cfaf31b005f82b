"""os._exit in a reward function: an exception there, as sys.exit is.

It would end the run's process at once, with the code that the function chose: whoever started the run would take 0 for
a run that is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from vdr_cli.system.processes import end_process

_process = 0
"""The process in which a user's code runs; one that it forks ends as it likes."""
_called: SystemExit | None = None
"""The last os._exit there that no block has raised yet."""


@contextmanager
def leaving_is_an_error() -> Iterator[None]:
    """os._exit raises SystemExit from now on, on every thread; one whose exception stayed unseen is raised at the end.

    It stays unseen in a thread that the code inside, or inside an earlier block, has started.
    """
    global _process, _called
    os._exit, _process = _leave, os.getpid()
    try:
        yield
        called = _called
        if called is not None:
            raise called
    finally:
        _called = None


def _leave(status: int) -> NoReturn:
    global _called
    if os.getpid() != _process:
        end_process(status)
    caller = sys._getframe(1)
    place = TracebackType(None, caller, caller.f_lasti, caller.f_lineno)
    _called = SystemExit(f"os._exit({status})").with_traceback(place)
    raise SystemExit(f"os._exit({status})")
