"""The table of hosts: what was found, and what nobody answered."""

from __future__ import annotations

import io
import socket

import pytest
from rich.console import Console

from vdr_cli.cli import app
from vdr_cli.cli.doctor import host_table
from vdr_cli.launch.preflight import Answer, Problem

FACTS = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "shared": {"/runs/.token": False},
    "accelerators": ["H100, 81559 MiB"] * 8,
    "cores": 64,
    "memory": 512 << 30,
    "disk": {"/runs": 100 << 30},
}


def test_a_line_a_host_says_what_it_has_and_what_is_wrong() -> None:
    answers = {"h1": Answer(FACTS, seconds=0.4, clock=0.1), "h2": Answer(silence="Connection refused")}
    problems = [Problem("h1", "/runs is not shared", "mount it"), Problem("h2", "no answer over ssh", "start sshd")]
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(host_table(answers, problems))
    lines = console.export_text().splitlines()
    (h1,), (h2,) = ([line for line in lines if name in line] for name in ("h1", "h2"))
    shown = [cell.strip() for cell in h1.split("│")[1:-1]]
    assert shown == ["h1", "1 problem", "8 x H100", "64", "512 GiB", "100 GiB", "3.11.7", "2.13.0", "0.19.8",
                     "0.4 s", "no", "+0.1 s"]  # fmt: skip
    assert [cell.strip() for cell in h2.split("│")[1:-1]] == ["h2", "1 problem", *["-"] * 7, "no", "-", "-"]


def test_a_port_in_use_is_a_problem_with_its_host_and_cure(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert app.run(["doctor", "--hostfile", str(hosts), "--master-port", port]) == 4
    assert f"host localhost: port {port} cannot be used" in capsys.readouterr().out
