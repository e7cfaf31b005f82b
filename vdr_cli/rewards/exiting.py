"""os._exit in a reward function: an exception there, as sys.exit is.

It would end the run's process at once, with the code that the function chose: whoever started the run would take 0 for
a run that is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from vdr_cli.system.processes import end_process

_process = 0
"""The process in which a user's code runs; one that it forks ends as it likes."""


@contextmanager
def exit_is_an_error() -> Iterator[None]:
    """os._exit raises SystemExit in this process, from now on and on every thread."""
    global _process
    os._exit, _process = _refuse, os.getpid()
    yield


def _refuse(status: int) -> NoReturn:
    if os.getpid() != _process:
        end_process(status)
    raise SystemExit(f"os._exit({status})")
