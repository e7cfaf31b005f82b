"""Dates and earlier versions of files, from the git history of a full clone."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vdr_cli.errors import MachineError


@dataclass(frozen=True)
class Version:
    """A commit that added or changed a file."""

    commit: str
    date: datetime
    """Committer's date: later than the author's where the commit was rebased."""


class History:
    """The history of the repository whose root is `root`. Raises MachineError where there is none, or not all of it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        try:
            found = self._git("rev-parse", "--show-toplevel", "--is-shallow-repository")
        except FileNotFoundError:
            raise MachineError("git is not installed; the check reads dates from the repository's history") from None
        top, _, is_shallow = found.stdout.strip().partition("\n")
        if found.returncode or Path(top).resolve() != self.root:
            reason = next(iter(found.stderr.splitlines()), "not the root of a git repository")
            raise MachineError(f"{root}: no git history ({reason}); check in a clone of the repository")
        if is_shallow == "true":
            raise MachineError(f"{root}: a shallow clone has no dates; fetch the rest: git fetch --unshallow")

    def versions(self, path: Path) -> list[Version]:
        """The file's versions, newest first; none while it has not been committed."""
        lines = self._output("log", "--diff-filter=AM", "--format=%H %ct", "--", self._name(path)).splitlines()
        pairs = [line.split() for line in lines]
        return [Version(commit, datetime.fromtimestamp(int(seconds), UTC)) for commit, seconds in pairs]

    def added(self, path: Path) -> datetime:
        """The date of the file's first commit. Raises MachineError where there is none."""
        versions = self.versions(path)
        if not versions:
            raise MachineError(f"{path}: not committed")
        return versions[-1].date

    def at(self, path: Path, moment: datetime) -> str:
        """The file as the last commit before this moment left it. Raises MachineError where none has it."""
        version = next((version for version in self.versions(path) if version.date < moment), None)
        if version is None:
            raise MachineError(f"{path}: not committed before {moment}")
        return self._output("show", f"{version.commit}:{self._name(path)}")

    def published(self, path: Path) -> datetime:
        """The date of the commit that gave the file its present content; now, where none has."""
        versions = self.versions(path)
        is_committed = versions and not self._git("diff", "--quiet", "HEAD", "--", self._name(path)).returncode
        return versions[0].date if is_committed else datetime.now(UTC)

    def _name(self, path: Path) -> str:
        return path.resolve().relative_to(self.root).as_posix()

    def _output(self, *arguments: str) -> str:
        found = self._git(*arguments)
        if found.returncode:
            reason = next(iter(found.stderr.splitlines()), "no reason given")
            raise MachineError(f"git {' '.join(arguments)}: {reason}")
        return found.stdout

    def _git(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(self.root), *arguments]
        return subprocess.run(command, env=environment | {"LC_ALL": "C"}, capture_output=True, text=True, check=False)
