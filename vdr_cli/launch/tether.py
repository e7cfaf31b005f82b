"""`python -m vdr_cli.launch.tether COMMAND...`: run a command and end all of it when whoever started us ends.

DeepSpeed's runner must never get SIGTERM: its handler runs `pkill -f deepspeed.launcher.launch` on every host,
which ends every other run there too. So it is killed outright, then pdsh and its ssh connections are ended,
and the ranks notice that (watchdog.py).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from types import FrameType

from vdr_cli.launch.processes import RUNNER
from vdr_cli.system import processes


class _EndError(Exception):
    pass


def _end(number: int, _: FrameType | None) -> None:
    raise _EndError


def main() -> int:
    """The command's exit code; 128 + signal when it was killed."""
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, _end)
    code = 128 + signal.SIGTERM
    try:
        child = subprocess.Popen(sys.argv[1:])
        code = child.wait()
    except _EndError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        processes.end_descendants(3.0, killed_first=RUNNER)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
