"""os._exit in a reward function: an exception there, as sys.exit is.

It would end the run's process at once, with the code that the function chose: whoever started the run would take 0 for
a run that is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

end_process = os._exit
"""For vdr itself, which ends the process also while a user's code runs."""
_inside: ContextVar[int | None] = ContextVar("inside", default=None)
"""The process in which a user's code runs here; a process that it forks ends as it likes."""


@contextmanager
def leaving_is_an_error() -> Iterator[None]:
    """os._exit raises SystemExit inside, on this thread or in this task."""
    os._exit = _leave
    before = _inside.set(os.getpid())
    try:
        yield
    finally:
        _inside.reset(before)


def _leave(status: int) -> NoReturn:
    if _inside.get() == os.getpid():
        raise SystemExit(f"os._exit({status})")
    end_process(status)
