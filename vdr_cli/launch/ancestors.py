"""Noticing that whoever started this rank is gone.

A rank must not outlive its launcher: nobody would stop it, and it would go on writing into the run
directory. Over ssh the chain ends at the session's sshd, which dies when the connection does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import psutil

SUPERVISOR = "VDR_SUPERVISOR"
"""Environment variable: the process on this machine that started the launch, to be found above every rank."""
OVER_SSH = "VDR_OVER_SSH"
"""Environment variable: the launch came over ssh, so an sshd is to be found above every rank."""
PROGRAMS = {"deepspeed", "ds", "torchrun", "vdr", "mpirun", "mpiexec", "orted", "prted", "srun", "slurmstepd"}
MODULES = ("deepspeed.launcher.", "torch.distributed.", "vdr_cli")
SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}


@dataclass(frozen=True)
class Ancestor:
    pid: int
    name: str
    command: tuple[str, ...]


def launchers(chain: Sequence[Ancestor]) -> list[Ancestor]:
    """The part of the chain (nearest first) that belongs to the launch: to be watched.

    It ends before a user's own shell or script, which may well end before the run does; the shell that ssh
    started for the launcher (some replace themselves by it), and the sshd above it, belong to the launch.
    """
    watched: list[Ancestor] = []
    for ancestor in chain:
        over_ssh = bool(watched) and ancestor.name.startswith("sshd") and _came_over_ssh(watched[-1])
        if not (over_ssh or _is_launcher(ancestor) or _is_remote_shell(ancestor)):
            break
        watched.append(ancestor)
        if over_ssh:
            break
    return watched


def missing(chain: Sequence[Ancestor], environ: Mapping[str, str]) -> Ancestor | None:
    """The ancestor that the launch names and that is not there: it ended before this process looked."""
    supervisor = int(environ.get(SUPERVISOR, 0))
    if supervisor and all(ancestor.pid != supervisor for ancestor in chain):
        return Ancestor(supervisor, "vdr", ())
    if OVER_SSH in environ and not any(ancestor.name.startswith("sshd") for ancestor in chain):
        return Ancestor(0, "sshd", ())
    return None


def chain_above() -> list[Ancestor]:
    """This process's parents up to init, nearest first."""
    chain = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            chain.append(Ancestor(process.pid, process.name(), tuple(process.cmdline())))
    return chain


class Watched:
    """The launchers above this process as they are now."""

    def __init__(self) -> None:
        self._processes: list[tuple[psutil.Process, Ancestor]] = []
        chain = chain_above()
        self._lost = missing(chain, os.environ)
        for ancestor in launchers(chain):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._processes.append((psutil.Process(ancestor.pid), ancestor))

    def gone(self) -> Ancestor | None:
        """The first launcher that has ended since, or that was to be there and was not."""
        if self._lost is not None:
            return self._lost
        for process, ancestor in self._processes:
            try:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    return ancestor
            except psutil.NoSuchProcess:
                return ancestor
        return None


def _is_launcher(ancestor: Ancestor) -> bool:
    words = [PurePath(word).name for word in ancestor.command[:2]]
    if PROGRAMS & {*words, ancestor.name}:
        return True
    modules = [after for option, after in zip(ancestor.command, ancestor.command[1:], strict=False) if option == "-m"]
    return any(module.startswith(MODULES) for module in modules)


def _came_over_ssh(below: Ancestor) -> bool:
    """True when an sshd right above is the launch's connection: this process is a node's launcher, or its shell."""
    return _is_remote_shell(below) or "deepspeed.launcher.launch" in below.command


def _is_remote_shell(ancestor: Ancestor) -> bool:
    """`bash -c 'export ...; cd ...; python -m deepspeed.launcher.launch ...'`"""
    command = ancestor.command
    is_shell = bool(command) and PurePath(command[0]).name.lstrip("-") in SHELLS
    return is_shell and "-c" in command and any("deepspeed.launcher." in word for word in command)
