"""A thread in every rank that ends it when the run around it is gone: its launcher, its peers, or its time.

A rank that waits in a collective for one that died would wait for minutes or for ever. What is noticed:

- a launcher above this process ended (every half second): exit at once
- another rank ended or cannot be reached (peers.py): exit at once, the cause passed on to all
- another rank ended with an error and `timeout` seconds later this one still runs: exit
- Ctrl-C or SIGTERM arrived and the step and its checkpoint were not done in `timeout` seconds and twice the longest
  step so far: exit
- a `stop` file in the run directory: raise that signal here (how a signal reaches other hosts)

It ends the process with os._exit: a collective that will never complete cannot be left in any other way,
and checkpoints are complete or absent whenever a process stops.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdr_cli.errors import MachineError, VdrError
from vdr_cli.launch import outcome
from vdr_cli.launch.ancestors import Watched
from vdr_cli.launch.peers import Loss, Peers
from vdr_cli.launch.rank import processes_started
from vdr_cli.system.processes import end_process

POLL = 0.5
DEFAULT_TIMEOUT = 60.0
TOGETHER = 5.0
"""Seconds by which ranks may differ in when a signal reaches them."""
STEPS_AFTER_SIGNAL = 2.0
"""Number of longest steps that ranks wait for after a signal, beside the timeout. Steps grow as completions do."""


@dataclass(frozen=True)
class _Stop:
    """The first signal."""

    number: int
    at: float
    patience: float
    """Seconds in which the step in progress must end."""


class Watchdog:
    """One per process; `begin` as early as possible, `connect` once ranks can talk, `end` when all is done."""

    def __init__(self, directory: Path | None, timeout: float) -> None:
        self.directory, self.timeout = directory, timeout
        self.phase = "start"
        self.longest_step = 0.0
        self._watched = Watched()
        self._peers: Peers | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._told_to_stop: _Stop | None = None
        self._farewell_at = 0.0
        self._signals = _signal_pipe()
        threading.Thread(target=self._run, name="vdr-watchdog", daemon=True).start()

    def connect(self, rank: int, world_size: int, share: Callable[[Any], Any]) -> None:
        """Begin to watch the other ranks. share: a broadcast from rank 0; collective."""
        if world_size > 1:
            peers = Peers(rank, world_size, self.timeout, os.environ.get("MASTER_ADDR", "127.0.0.1"), share)
            with self._lock:
                self._peers = peers

    def end(self, error: BaseException | None) -> None:
        """This rank has done its part, or fails with `error`; after a bug the others are told to end."""
        if isinstance(error, SystemExit) and not error.code:
            error = None
        if error is not None and not isinstance(error, VdrError):
            # A collective fails on every rank when one dies: let the thread find out whose death is the cause.
            time.sleep(4 * POLL)
        self._ended.set()
        with self._lock:
            if self._peers is None:
                return
            if error is None or isinstance(error, VdrError):
                self._peers.leave(None if error is None else str(error))
            else:
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                self._peers.tell(Loss(self._peers.rank, socket.gethostname(), what))

    def close(self) -> None:
        """Let go of all connections, in a copy of this process."""
        if self._peers is not None:
            self._peers.close()

    def _run(self) -> None:
        is_stopping = False
        while not self._ended.wait(0 if self._peers else POLL):
            gone = self._watched.gone()
            if gone is not None:
                self._exit(f"its launcher ({gone.name}, process {gone.pid}) is gone")
            self._look_at_signals()
            if self.directory is not None and not is_stopping:
                number = outcome.asked_to_stop(self.directory)
                if number is not None:
                    is_stopping = True
                    os.kill(os.getpid(), number)
            peers = self._peers
            loss = peers.step(POLL) if peers is not None else None
            if peers is not None and peers.farewell is not None:  # whoever ended since ended for it
                loss = self._overdue(peers.farewell) if loss is None else peers.farewell
            if loss is not None and not self._ended.is_set():
                self._lose(loss)

    def _look_at_signals(self) -> None:
        try:
            received = [n for n in os.read(self._signals, 64) if n in (signal.SIGINT, signal.SIGTERM)]
        except BlockingIOError:
            received = []
        if received and self._told_to_stop is None:
            patience = self.timeout + STEPS_AFTER_SIGNAL * self.longest_step
            self._told_to_stop = _Stop(received[0], time.monotonic(), patience)
            if self.directory is not None and "VDR_RUN_DIRECTORY" in os.environ and os.environ.get("RANK") == "0":
                outcome.tell_patience(self.directory, patience)
        self._stop_if_late()

    def _stop_if_late(self, early: float = 0.0) -> None:
        """End when the time after a signal is over, or will be in `early` seconds."""
        stop = self._told_to_stop
        if stop is not None and time.monotonic() - stop.at > stop.patience - early:
            self._exit(
                f"not done {round(stop.patience, 1):g} s after {signal.Signals(stop.number).name}, so ending without a "
                "checkpoint of this step; raise launch.fault_timeout if a step needs longer",
                128 + stop.number,
            )

    def _overdue(self, farewell: Loss) -> Loss | None:
        """An error that a rank ended with must end this one too, `timeout` seconds later at most."""
        self._farewell_at = self._farewell_at or time.monotonic()
        return farewell if time.monotonic() - self._farewell_at > self.timeout else None

    def _lose(self, loss: Loss) -> None:
        """The first to know tells the others, then everyone ends."""
        self._stop_if_late(min(TOGETHER, self.timeout / 2))  # the other rank ended because its time was over
        peers = self._peers
        if peers is not None and peers.rank == 0:
            peers.tell(loss)
            if self.directory is not None:
                outcome.write_fault(self.directory, loss.rank, loss.message, MachineError.exit_code, host=loss.host)
        self._exit(f"{loss.line()}; ending too")

    def _exit(self, reason: str, code: int = MachineError.exit_code) -> None:
        rank = os.environ.get("RANK", "0")
        line = f"vdr: host {socket.gethostname()}, rank {rank}, during {self.phase}: {reason}\n"
        try:
            os.write(sys.stderr.fileno(), line.encode())
        finally:
            end_process(code)


_watchdog: Watchdog | None = None
_watches_forks = False  # hooks at a fork stay for the life of the process


def begin(directory: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Start watching, from the main thread. directory: the run's; timeout: launch.fault_timeout, seconds."""
    global _watchdog, _watches_forks
    if _watchdog is None:
        # A launch by vdr has done so, and may have asked this run to stop since; nobody else asks a single process.
        if directory and processes_started() == 1 and "VDR_RUN_DIRECTORY" not in os.environ:
            outcome.forget_stop(Path(directory))
        _watchdog = Watchdog(Path(directory) if directory else None, timeout)
    if not _watches_forks:
        _watches_forks = True
        os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_through, after_in_child=_be_no_rank)


def connect(rank: int, world_size: int, share: Callable[[Any], Any]) -> None:
    """Watch the other ranks from now on; collective (one broadcast)."""
    if _watchdog is not None:
        _watchdog.connect(rank, world_size, share)


def phase(name: str) -> None:
    """Note the phase that this rank is in, for the line that it leaves when it is ended."""
    if _watchdog is not None:
        _watchdog.phase = name


def note_step(seconds: float) -> None:
    """Take in how long a step took, so that a signal in a later one gives it as long."""
    if _watchdog is not None:
        _watchdog.longest_step = max(_watchdog.longest_step, seconds)


def end(error: BaseException | None = None) -> None:
    """Stop watching: the run is over on this rank, after everything collective, or because of `error`."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.end(error)
        _watchdog = None


@contextmanager
def connected(rank: int, world_size: int, share: Callable[[Any], Any]) -> Iterator[None]:
    """Watch the other ranks inside; leave them in the way that fits how the block ends."""
    connect(rank, world_size, share)
    try:
        yield
    except BaseException as error:
        end(error)
        raise
    end()


_mask = threading.local()
"""The signals that the thread which forks now had blocked before."""


def _hold_signals() -> None:
    """Block signals while forking: a child that is signalled before it stops being a rank would report its signal."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _let_signals_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _be_no_rank() -> None:
    """In a forked child of a reward function: stop handling our signals, and do not report its end as a lost rank.

    It has our handlers, so SIGTERM would not end it and multiprocessing's pools would wait for ever; our pipe, on
    which it would tell us of its signals; and our connections, which would seem alive after our death. Ctrl-C stays
    ours: the terminal sends it to both, and the first one is to let the step, with its rewards, end.
    """
    global _watchdog
    if _watchdog is not None:
        _watchdog.close()
        _watchdog = None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_signals_through()


def _signal_pipe() -> int:
    """Signal numbers as bytes, written by the interpreter's C handler even while the main thread is stuck in C."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader
