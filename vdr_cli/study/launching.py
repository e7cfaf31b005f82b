"""Starts a study's processes: the command, its share of the machine, its lock."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vdr_cli.launch.environment import single_process
from vdr_cli.launch.rank import GPU_DEVICES, gpu_names
from vdr_cli.system import processes


class Process(Protocol):
    """A started command."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""


def train_command(settings: Path, output: Path) -> list[str]:
    """`vdr train`, from the newest checkpoint if there is one."""
    return [sys.executable, "-m", "vdr_cli", "train", str(settings), "--output", str(output), "--resume", "auto"]


def measure_command(request: Path) -> list[str]:
    """The evaluation of one model."""
    return [sys.executable, "-m", "vdr_cli.study.measure", str(request)]


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, lock: int) -> Process:
    """Start the command with its output in `log`; it holds the lock, too, until it ends. Raises OSError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        return processes.start(
            command, environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )


def end(process: Process, number: int) -> None:
    """Send a signal to the process; SIGKILL to everything in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


def environment_of(slot: int, slots: int, ranks: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the process in this slot (0, 1, ...): no rank of ours, its share of threads and GPUs.

    ranks: processes that it starts itself. What the user has set for threads stays.
    """
    env = {name: value for name, value in environ.items() if name not in single_process()}
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (slots * ranks))))
    if slots > 1 and (devices := visible_gpus(environ)):
        env[GPU_DEVICES] = ",".join(share_of(devices, slot, slots))
    return env


def visible_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> list[str]:
    """The GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if GPU_DEVICES in environ:
        return gpu_names(environ[GPU_DEVICES])
    count = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in dev.iterdir())
    return [str(index) for index in range(count)]


def share_of(devices: Sequence[str], slot: int, slots: int) -> list[str]:
    """The devices of one slot: equal shares, or one that several slots use where there are too few."""
    each = len(devices) // slots
    return list(devices[slot * each : slot * each + each]) if each else [devices[slot % len(devices)]]


def last_line(log: Path) -> str:
    """The last line with anything in it, such as `vdr: error: ...`; empty where nothing was said."""
    try:
        with log.open("rb") as said:
            said.seek(max(log.stat().st_size - 4096, 0))
            lines = said.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
