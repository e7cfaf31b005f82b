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


def shown(answers: dict[str, Answer], problems: list[Problem]) -> str:
    """The table as a terminal of 80 columns shows it."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(host_table(answers, problems))
    return console.export_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_few_hosts_stand_side_by_side_in_80_columns() -> None:
    answers = {"h1": Answer(FACTS, seconds=0.4, clock=0.1), "h2": Answer(silence="Connection refused")}
    problems = [Problem("h1", "/runs is not shared", "mount it"), Problem("h2", "no answer over ssh", "start sshd")]
    lines = [cells(line) for line in shown(answers, problems).splitlines() if line[0] in "│┃"]
    h1, h2 = ([line[column] for line in lines] for column in (1, 2))
    assert h1 == ["h1", "1 problem", "8 x H100", "64", "512 GiB", "100 GiB", "3.11.7", "2.13.0", "0.19.8",
                  "0.4 s", "no", "+0.1 s"]  # fmt: skip
    assert h2 == ["h2", "1 problem", *["-"] * 7, "no", "-", "-"]


def test_of_many_hosts_only_what_differs_has_a_column() -> None:
    answers = {f"node{n}": Answer(FACTS | {"memory": (512 - n) << 30}, seconds=0.4, clock=0.1) for n in range(5)}
    page = shown(answers, [Problem("node3", "/runs is not shared", "mount it")])
    (odd,) = (line for line in page.splitlines() if "node3" in line)
    assert cells(odd) == ["node3", "1 problem", "509 GiB"]
    assert "on every host: accelerators 8 x H100, cores 64, disk free 100 GiB" in " ".join(page.split())


def test_a_port_in_use_is_a_problem_with_its_host_and_cure(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert app.run(["doctor", "--hostfile", str(hosts), "--master-port", port]) == 4
    assert f"host localhost: port {port} cannot be used" in capsys.readouterr().out
