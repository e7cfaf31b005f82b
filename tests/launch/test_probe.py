"""A host's account of itself: files, disks, versions, and whether ranks could meet there."""

from __future__ import annotations

import json
import runpy
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import vdr_cli
from vdr_cli.launch import probe
from vdr_cli.launch.environment import free_port

REQUEST: dict[str, Any] = {
    "packages": ["torch", "no-such-package"], "files": [], "tokens": [], "disk": [], "meeting": None, "first": True,
    "path": [],
}  # fmt: skip


def test_the_answer_is_one_marked_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program that preflight.py sends, run as a script."""
    asked = {**REQUEST, "files": [str(tmp_path)], "disk": [str(tmp_path / "not" / "made" / "yet")]}
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(probe.__file__, {"REQUEST": json.dumps(asked)}, "__main__")
    answer = json.loads(capsys.readouterr().out.removeprefix(probe.MARK))
    assert answer["python"] == sys.version.split()[0] and answer["cores"] >= 1 and answer["memory"] > 0
    assert answer["packages"]["torch"] and answer["packages"]["no-such-package"] is None
    assert answer["files"] == {str(tmp_path): "directory of 0"}
    assert all(size > 0 for size in answer["disk"].values()), "of the nearest parent that exists"


def test_copies_of_a_file_are_told_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 3_000_000)
    other.write_bytes(b"a" * 2_999_999 + b"b")
    assert probe.describe(str(one)) != probe.describe(str(other))
    assert str(probe.describe(str(one))).startswith("3000000 bytes, ")
    assert probe.describe(str(tmp_path / "none")) is None


def test_the_code_has_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = probe.code_digest()
    assert digest is not None and len(digest) == 16
    read_bytes = Path.read_bytes
    changed = Path(vdr_cli.__file__)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"changed" if path == changed else read_bytes(path))
    assert probe.code_digest() not in (digest, None)


@pytest.mark.parametrize("address", ["127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])])
def test_rank_zeros_port_is_tried_from_both_sides(address: str) -> None:
    port = free_port()
    meeting = {"address": address, "port": port, "others": 1, "patience": 5.0}
    heard: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: heard.update(probe.rendezvous({"meeting": meeting, "first": True})))
    thread.start()
    assert probe.rendezvous({"meeting": meeting, "first": False}) == {"reached": None}
    thread.join()
    assert heard == {"port": None}


def test_a_port_in_use_and_a_host_out_of_reach_are_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        asked = {"address": "127.0.0.1", "port": port, "others": 0, "patience": 0.0}
        assert str(probe.listen(asked)["port"]).startswith("Address already in use")
    assert probe.reach(asked) == "Connection refused"
    assert probe.rendezvous({"meeting": None, "first": True}) == {}
    assert probe.rendezvous({"meeting": asked, "first": False}) == {}, "one host has nobody to reach"
