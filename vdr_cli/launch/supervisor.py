"""The process that starts the ranks, passes signals on, and knows how the run ended.

The exit code of a launcher over ssh cannot be trusted (it is 0 when a node's launcher is killed), so
success is the `finished.json` that the run writes as its last act.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from vdr_cli.errors import MachineError
from vdr_cli.launch import outcome
from vdr_cli.launch.arguments import named_checkpoint
from vdr_cli.launch.processes import RUNNER, ranks_below
from vdr_cli.system import processes

POLL = 0.2
HOST_ENDED = re.compile(rb"pdsh@[^:]+: ([^:]+): ssh (?:exited with exit code|killed by signal) (\d+)")
FOLLOW = 20.0
SLACK = 5.0
USERS_OWN = (2, 3)
"""Exit codes of configuration and data errors: a restart would meet them again."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of ranks that saved and ended after a signal, whoever sent it, and to which of them."""


@dataclass(frozen=True)
class Plan:
    """The command that starts all ranks of one attempt."""

    command: Callable[[Sequence[str]], list[str]]
    """Arguments of vdr to a command line."""
    environment: Mapping[str, str]
    directory: Path | None
    """The run directory, where the run says how it ended; None: the launcher's exit code is all there is."""
    over_ssh: bool
    """Ranks are on other hosts too: signals reach them through the run directory, ends are read off pdsh's stderr."""
    fault_timeout: float
    resumes: Path | None = None
    """The run directory in which a restart looks for checkpoints, on every host; None: the command is just repeated.
    A host that does not share it waits for plan.fault_timeout after a signal."""


class HostEnds:
    """Reads the end of each host's launcher off pdsh's stderr, and passes all of it on to our stderr."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.code = 0
        """The first failed host's exit code."""
        self._failed_at: float | None = None
        if child.stderr is not None:
            threading.Thread(target=self._read, args=(child.stderr,), daemon=True).start()

    def failed_for(self) -> float:
        """Seconds since the first host failed; 0 while none has."""
        return 0.0 if self._failed_at is None else time.monotonic() - self._failed_at

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            _pass_on(line)
            ended = HOST_ENDED.match(line)
            if ended and self._failed_at is None:
                self.code = int(ended[2])
                self._failed_at = time.monotonic()


def _pass_on(line: bytes) -> None:
    """To our stderr, if it can be written: its disk may be full, or it may be closed, and the reader must read on."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


@dataclass
class Signals:
    """SIGINT and SIGTERM that this process received, in order."""

    received: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def remember(self, number: int, _: FrameType | None) -> None:
        # The terminal, the user's shell and Slurm may all pass the same one on within moments.
        if not self.times or time.monotonic() - self.times[-1] > 1.0:
            self.received.append(number)
            self.times.append(time.monotonic())


def supervise(
    plan: Plan,
    arguments: Sequence[str],
    max_restarts: int,
    say: Callable[[str], None],
    renew: Callable[[Plan], Plan] = lambda plan: plan,
) -> int:
    """Run to the end, restarting from the last checkpoint after a fault; the exit code.

    renew: the plan of the next attempt, which may leave out hosts that are gone.
    """
    processes.adopt_orphans()
    earlier = checkpoints_in(plan.resumes)
    with listening() as signals:
        for attempt in range(max_restarts + 1):
            code = run_once(plan, arguments, signals)
            fault = outcome.read_fault(plan.directory) if plan.directory and code else None
            if fault is not None and code not in USERS_OWN:  # of those rank 0 has spoken
                say(fault.line())
            if code == 0 or code in USERS_OWN + STOPPED or signals.received or attempt == max_restarts:
                return code
            whence = ""
            if plan.resumes is not None:
                arguments = resuming(arguments, has_own=bool(checkpoints_in(plan.resumes) - earlier))
                whence = f" from {named_checkpoint(arguments) or 'the newest checkpoint'}"
            say(f"ended with exit code {code}; restart {attempt + 1} of {max_restarts}{whence}")
            plan = renew(plan)
    raise AssertionError("unreachable")


def checkpoints_in(directory: Path | None) -> set[tuple[str, int]]:
    """Name of each checkpoint in a run directory, and the time in ns at which it was complete."""
    found = set()
    for path in directory.glob("checkpoints/step_*") if directory is not None else ():
        with suppress(OSError):  # no checkpoint, or one that was just removed
            found.add((path.name, (path / "manifest.json").stat().st_mtime_ns))
    return found


def resuming(arguments: Sequence[str], has_own: bool) -> list[str]:
    """The same command, going on from the newest complete checkpoint of the run directory.

    has_own: this launch has written a checkpoint. Before that: again from the one that --resume names, which may be
    older than what the run directory holds, or else from the newest, or from the start.
    """
    if not has_own and named_checkpoint(arguments) is not None:
        return list(arguments)
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        skip = argument == "--resume"
    return [*kept, "--resume", "auto"]


def run_once(plan: Plan, arguments: Sequence[str], signals: Signals) -> int:
    """One attempt: start, wait, pass signals on, leave nothing behind. The exit code."""
    finished_before = None
    if plan.directory is not None:
        outcome.forget_faults(plan.directory)
        finished_before = outcome.finished_at(plan.directory)
    child = processes.start(
        plan.command(arguments), plan.environment, stderr=subprocess.PIPE if plan.over_ssh else None
    )
    hosts = HostEnds(child)
    try:
        launcher_code = _wait(child, plan, signals, hosts)
    finally:
        processes.end_descendants(min(5.0, plan.fault_timeout), killed_first=RUNNER)
        if plan.directory is not None:
            outcome.forget_stop(plan.directory)
    return exit_code(plan, launcher_code or hosts.code, signals, finished_before)


def exit_code(plan: Plan, launcher_code: int, signals: Signals, finished_before: int | None) -> int:
    """The exit code, from the run's own record and the launcher's code; 0 only when both say success.

    finished_before: the time of an earlier attempt's record, which says nothing about this one. What a reward function
    started and left behind has no say in it.
    """
    fault = outcome.read_fault(plan.directory) if plan.directory else None
    if fault is not None:
        return fault.exit_code
    complete = plan.directory is None or outcome.finished_at(plan.directory) not in (None, finished_before)
    if launcher_code == 0 and complete:
        return 0
    if signals.received:
        return 128 + signals.received[0]
    if launcher_code in STOPPED:
        return launcher_code
    # 247: a rank killed with SIGKILL, through a launcher that exits with the negative code; ssh says 255.
    return launcher_code if 0 < launcher_code < 128 else MachineError.exit_code


def _wait(child: subprocess.Popen[bytes], plan: Plan, signals: Signals, hosts: HostEnds) -> int:
    """Until the launcher ends, or must be ended.

    A first signal asks the ranks to save and end, a second one ends everything now, and so does time: after a signal
    ranks end themselves in the seconds that rank 0 tells (plan.fault_timeout, if it does not), unless nothing of theirs
    can run any more. When one host's ranks have failed, the others have FOLLOW seconds (plan.fault_timeout, if that is
    less) to end as well: those that had met it notice at once, and pdsh itself would wait for the rest for ever.
    """
    passed_on = 0
    while child.poll() is None:
        if len(signals.received) > passed_on:
            passed_on += 1
            if passed_on > 1 or not _ask_ranks_to_stop(plan, signals.received[0]):
                break
        if hosts.failed_for() > min(FOLLOW, plan.fault_timeout):
            break
        if passed_on and time.monotonic() - signals.times[0] > _patience(plan) + SLACK:
            break
        time.sleep(POLL)
    return child.returncode if child.returncode is not None else MachineError.exit_code


def _patience(plan: Plan) -> float:
    """Seconds in which the ranks end after a signal."""
    told = outcome.patience_told(plan.resumes) if plan.resumes is not None else None
    return max(plan.fault_timeout, told or 0.0)


def _ask_ranks_to_stop(plan: Plan, number: int) -> bool:
    """Pass the signal on; False when no rank could hear it: they are still being started, or run on other hosts
    without a run directory."""
    ranks = ranks_below()
    for process in ranks:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    has_left_word = plan.over_ssh and plan.directory is not None and outcome.ask_to_stop(plan.directory, number)
    return has_left_word or bool(ranks)


@contextmanager
def listening() -> Iterator[Signals]:
    """SIGINT and SIGTERM are remembered, not obeyed, while inside."""
    signals = Signals()
    previous = {number: signal.signal(number, signals.remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
