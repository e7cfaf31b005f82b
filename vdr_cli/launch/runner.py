"""`python -m vdr_cli.launch.runner`: DeepSpeed's runner, with an exit code when pdsh or mpirun is killed.

It passes on positive codes only, and a process that a signal ended has a negative one: it would return 0.
"""

from __future__ import annotations

import subprocess
from typing import Any

from vdr_cli.system.imports import importing


class Heard(subprocess.Popen[Any]):
    """A process whose end by a signal is 128 + signal, as in a shell."""

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self.returncode = code if code >= 0 else 128 - code
        return self.returncode


def main() -> None:
    """Run the runner with this process's arguments."""
    with importing():
        from vdr_cli.engine import deepspeed_import

    runner = deepspeed_import.module("launcher.runner")
    runner.subprocess.Popen = Heard
    runner.main()


if __name__ == "__main__":
    main()
