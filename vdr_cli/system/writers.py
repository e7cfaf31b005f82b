"""One process at a time writes a run directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdr_cli.errors import ConfigError

LOCK = ".lock"
"""File in a run directory that is locked by the process that writes there."""


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keep other processes from writing this run until the block, or this process, ends.

    Raises ConfigError when one writes there. A file system without locks lets everybody in.
    """
    with (directory / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by what we fork
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"train.output {directory}: another process is writing this run; wait for it, end it, or give another "
                "--output"
            ) from None
        except OSError:
            pass
        yield
