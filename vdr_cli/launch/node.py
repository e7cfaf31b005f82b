"""`python -m vdr_cli.launch.node`: DeepSpeed's launcher of one host's ranks, deaf to signals while its parent lives.

Its own handler kills the ranks. A terminal, or Slurm before pre-emption, signals every process of a job, so ranks
that want to finish their step and save would be killed on the way. They hear the signal themselves; the launcher
ends when they have.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from vdr_cli.launch.rank import GPU_DEVICES, gpu_names
from vdr_cli.system.imports import importing

Install = Callable[..., Any]


def orphans_only(install: Install, parent: int) -> Install:
    """signal.signal whose handlers of SIGINT and SIGTERM act only once the process `parent` is no longer our parent."""

    def chosen(number: int, handler: Any) -> Any:
        def act(received: int, frame: Any) -> None:
            if os.getppid() != parent:
                handler(received, frame)

        return install(number, act if number in (signal.SIGINT, signal.SIGTERM) else handler)

    return chosen


def show_own_gpus(environ: dict[str, str], slots: Sequence[int]) -> None:
    """Give the ranks of these slots their GPUs: slot i is the i-th one that this process may use.

    DeepSpeed would number all GPUs of the host, and so bring back those that CUDA_VISIBLE_DEVICES hides.
    """
    shown = gpu_names(os.environ[GPU_DEVICES])
    environ[GPU_DEVICES] = ",".join(shown[slot] for slot in slots if slot < len(shown))


def main() -> None:
    """Run the launcher with this process's arguments."""
    with importing():
        from vdr_cli.engine import deepspeed_import

    launch = deepspeed_import.module("launcher.launch")
    launch.signal.signal = orphans_only(signal.signal, os.getppid())
    if GPU_DEVICES in os.environ:
        launch.get_accelerator().set_visible_devices_envs = show_own_gpus
    launch.main()


if __name__ == "__main__":
    main()
