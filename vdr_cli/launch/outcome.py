"""The end of a run, written by the run itself: exit codes of launchers over ssh cannot be trusted.

finished.json stands in the run directory when the run ended as it should; fault.json when it ended
for a reason it knows. `stop` in the same directory asks every rank to save and end; `patience` is rank 0's
answer to a signal: the seconds in which the step in progress should end.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vdr_cli.system.files import write_whole

FINISHED = "finished.json"
FAULT = "fault.json"
STOP = "stop"
PATIENCE = "patience"


@dataclass(frozen=True)
class Fault:
    host: str
    rank: int
    message: str
    exit_code: int

    def line(self) -> str:
        """`host h2, rank 1: message`"""
        return f"host {self.host}, rank {self.rank}: {self.message}"


def clear(directory: Path) -> None:
    """Forget how an earlier run in this directory ended."""
    forget_faults(directory)
    (directory / FINISHED).unlink(missing_ok=True)


def forget_faults(directory: Path) -> None:
    """Forget an earlier run's fault and its stop, but not that it was complete: this one may yet be refused."""
    for name in (FAULT, STOP, PATIENCE):
        (directory / name).unlink(missing_ok=True)


def write_finished(directory: Path, **facts: object) -> None:
    """Say that the run is complete; written by rank 0 as its last act."""
    _write(directory / FINISHED, facts)


def write_fault(directory: Path, rank: int, message: str, exit_code: int, host: str | None = None) -> None:
    """Say why the run ended. The first word stands: what other ranks notice later is the consequence.

    host: where the rank was; None: here. Best effort: a full disk must not hide what happened.
    """
    fault = Fault(host or socket.gethostname(), rank, " ".join(message.split()), exit_code)
    if not (directory / FAULT).exists() and directory.is_dir():
        with suppress(OSError):
            _write(directory / FAULT, asdict(fault))


def finished(directory: Path) -> bool:
    """True when the run in this directory recorded that it is complete."""
    return finished_at(directory) is not None


def finished_at(directory: Path) -> int | None:
    """The time of that record, in ns; None: there is none."""
    try:
        return (directory / FINISHED).stat().st_mtime_ns
    except OSError:
        return None


def read_fault(directory: Path) -> Fault | None:
    """The reason that the run gave for its end, if it gave one."""
    try:
        return Fault(**json.loads((directory / FAULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def ask_to_stop(directory: Path, signal_number: int) -> bool:
    """Ask every rank, on every host that sees the directory, to behave as if it had this signal.

    Returns False before there is a directory, and on a full disk.
    """
    try:
        _write(directory / STOP, signal_number)
    except OSError:
        return False
    return True


def forget_stop(directory: Path) -> None:
    """Remove the files `stop` and `patience` that an earlier run left."""
    for name in (STOP, PATIENCE):
        with suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def asked_to_stop(directory: Path) -> int | None:
    """The signal number in the `stop` file, if it is there."""
    try:
        return int((directory / STOP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def tell_patience(directory: Path, seconds: float) -> None:
    """Tell the supervisor how long after a signal the ranks end themselves. Best effort, as for a fault."""
    with suppress(OSError):
        _write(directory / PATIENCE, seconds)


def patience_told(directory: Path) -> float | None:
    """The seconds in the `patience` file, if it is there."""
    try:
        return float((directory / PATIENCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, value: object) -> None:
    write_whole(path, json.dumps(value) + "\n")
