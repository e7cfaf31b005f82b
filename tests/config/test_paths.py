"""Names as a user types them: what no file system can hold is refused, and what can only be a path is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdr_cli.config.paths import LONGEST_NAME, checked_path, looks_like_path, path_text
from vdr_cli.errors import ConfigError


def test_a_plain_name_stays() -> None:
    assert path_text("runs/wide") == "runs/wide"
    assert path_text("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert path_text("~/runs") == "/home/me/runs"
    assert checked_path("~/runs", "train.output") == Path("/home/me/runs")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\x00b", "a character that cannot be printed"),
        ("a\nb", "a character that cannot be printed"),
        ("ok/" + "é" * (LONGEST_NAME // 2 + 1), "longer than a file name can be"),
        ("~nosuchuser/a", "there is no such user"),
    ],
)
def test_what_no_file_system_can_hold_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        path_text(text)
    with pytest.raises(ConfigError, match=f"^train.output .*{reason}"):
        checked_path(text, "train.output")


def test_each_part_of_a_path_may_be_as_long_as_a_name() -> None:
    assert path_text("/".join(["x" * LONGEST_NAME] * 3))


@pytest.mark.parametrize(
    ("name", "is_path"),
    [("owner/name", False), ("gpt2", False), ("./gpt2", True), ("/m", True), ("~/m", True), ("a/b/c", True)],
)
def test_paths_are_told_from_hub_ids(name: str, is_path: bool) -> None:
    assert looks_like_path(name) is is_path


def test_an_existing_directory_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert looks_like_path("gpt2")
