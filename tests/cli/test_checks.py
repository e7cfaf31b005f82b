"""Checks of what was typed: one line, and the exit code that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdr_cli.cli import checks
from vdr_cli.errors import ConfigError, MachineError


def test_one_of_the_allowed_words() -> None:
    assert checks.one_of("skip", ("stop", "skip"), "--on-error") == "skip"
    with pytest.raises(ConfigError, match=r"^--on-error cry: give one of stop, skip$"):
        checks.one_of("cry", ("stop", "skip"), "--on-error")


def test_an_unread_section_is_refused() -> None:
    checks.refuse_unread(["rollout.top_p=0.9", "no.such=1"], ("rollout",), "vdr eval")
    checks.refuse_unread(None, ("rollout",), "vdr eval")
    with pytest.raises(ConfigError, match=r"--set train.steps=3: vdr eval does not read train; it reads rollout"):
        checks.refuse_unread(["train.steps=3"], ("rollout",), "vdr eval")


def test_a_file_that_could_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checks.writable_file("~/new.json", "--json") == str(tmp_path / "new.json")  # as in --json=~/new.json
    with pytest.raises(ConfigError, match=r"--json .*no such user"):
        checks.writable_file("~nosuchuser/new.json", "--json")
    with pytest.raises(ConfigError, match="a directory; give a file"):
        checks.writable_file(str(tmp_path), "--json")
    with pytest.raises(ConfigError, match="no directory"):
        checks.writable_file(str(tmp_path / "none" / "new.json"), "--json")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(MachineError, match=r"--json .*: no permission to write in"):
        checks.writable_file(str(tmp_path / "new.json"), "--json")


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    checks.check_package("json", "json", "--png")
    with pytest.raises(ConfigError, match="--png needs no-such: pip install no-such"):
        checks.check_package("no_such", "no-such", "--png")
