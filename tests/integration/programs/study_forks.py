"""`vdr study` in forks of this process, which has imported once what every run imports.

A line on stdin is a call, {"arguments": [...], "said": PATH}, whose answer on stdout is a process id; or such an id,
whose answer is that call's exit code, once it has ended. A study's runs and evaluations are forks of its call.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tests.forks import IMPORTED, import_all
from vdr_cli.study import launching, measure
from vdr_cli.system.processes import end_process, end_with_parent


class Forked:
    """A fork in the place of a started command."""

    def __init__(self, pid: int) -> None:
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, lock: int) -> Forked:
    """As launching.start: a session of its own, which ends with its parent and holds its own lock alone."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        end_with_parent(parent)
        keep_one_lock(lock)
        os.environ.clear()
        os.environ.update(environment)
        if command[2] == "vdr_cli":
            sys.argv = ["vdr", *command[3:]]
            ending(importlib.import_module("vdr_cli.cli.app").main, log)
        ending(lambda: sys.exit(measure.main(command[3])), log)
    return Forked(pid)


def keep_one_lock(lock: int) -> None:
    """Close the descriptors of other locks, which a program that is executed does not inherit."""
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if descriptor.readlink().suffix == ".lock" and int(descriptor.name) != lock:
                os.close(int(descriptor.name))


def ending(function: Callable[[], object], said: Path) -> NoReturn:
    """Call the function with its output in a file, and end this process with its exit code."""
    said.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    try:
        function()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    end_process(code)


def call(arguments: Sequence[str], said: str) -> int:
    """The process id of the started call."""
    pid = os.fork()
    if pid == 0:
        sys.argv = ["vdr", "study", *arguments]
        ending(importlib.import_module("vdr_cli.cli.app").main, Path(said))
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    import_all([*IMPORTED, "vdr_cli.evaluation.evaluate", "vdr_cli.study.page", "vdr_cli.study.view"])
    launching.start = start
    for line in sys.stdin:
        asked = json.loads(line)
        print(exit_code(asked) if isinstance(asked, int) else call(**asked), flush=True)
