"""Files are there whole or not at all: after errors, kills, and beside another process that writes the same one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vdr_cli.system.files import create_whole, replacing, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "ü\n")
    before = file.stat().st_ino
    with replacing(file) as partial:
        partial.write_bytes(b"new")
        assert file.read_bytes() == "ü\n".encode() and partial.parent == tmp_path
    assert file.read_bytes() == b"new" and file.stat().st_ino != before
    assert names(tmp_path) == ["a.json"]


def test_everything_is_on_disk_before_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name.split(".")[-1])
        fsync(descriptor)

    def moved(path: Path, target: Path) -> Path:
        done.append("moved")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved)
    with replacing(tmp_path / "d") as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "weights").write_text("w")
    assert sorted(done[:3]) == ["inner", "partial", "weights"] and done[3:] == ["moved", tmp_path.name]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    (tmp_path / "f").write_text("old")
    for name in ("d", "f", "new"):
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / name) as partial:
            if name == "d":
                partial.mkdir()
                (partial / "new").write_text("half")
            else:
                partial.write_text("half")
            raise KeyboardInterrupt
    assert names(tmp_path) == ["d", "f"] and names(tmp_path / "d") == ["old"]
    assert (tmp_path / "f").read_text() == "old"


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replacing(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text("")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["second"]


KILLED = """
import os, signal, sys
from pathlib import Path
from vdr_cli.system.files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"


def test_links_stay_and_streams_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    write_whole(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()


def test_a_file_is_created_once(tmp_path: Path) -> None:
    create_whole(tmp_path / "a", "first")
    with pytest.raises(FileExistsError):
        create_whole(tmp_path / "a", "second")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "first"
