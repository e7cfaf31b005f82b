from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_cli.errors import ConfigError
from vdr_cli.launch.hostfile import hostfile_text, include_text, is_host_name, parse_hostfile, read_hostfile, select

HOSTS = {"h1": [0, 1], "h2": [0, 1, 2]}


def test_hosts_in_the_order_of_the_file() -> None:
    text = "# cluster\n\nnode-1.example slots=2\n  10.0.0.2   slots=1  # spare\n"
    assert parse_hostfile(text, "hosts") == {"node-1.example": [0, 1], "10.0.0.2": [0]}


def test_a_file_from_windows(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfh1 slots=2\r\n# spare\r\n\r\nh2\tslots=1#x\r\n")
    assert read_hostfile(str(tmp_path / "hosts")) == {"h1": [0, 1], "h2": [0]}


@pytest.mark.parametrize("content", [b"\xff\xfeh\x001\x00", b"\x80 slots=1\n"])
def test_what_is_no_text_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(ConfigError, match=r"launch\.hostfile .*hosts: cannot be read"):
        read_hostfile(str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1 slots=1\nh2\n", "hosts:2: 'h2' is not a host; write `name slots=N`"),
        ("h1 slots=x\n", "hosts:1"),
        ("h1 slots=1 h2 slots=2\n", "hosts:1"),
        ("h1 slots=0\n", "hosts:1: h1 has 0 slots"),
        ("h1 slots=1\n\n#\nh1 slots=2\n", "hosts:4: h1 is already in line 1"),
        ("# none\n", "hosts: names no host"),
        ("$(reboot) slots=1\n", "hosts:1: '\\$\\(reboot\\)' is not a host name"),
        ("-oProxyCommand=x slots=1\n", "hosts:1"),
        ("a;b slots=1\n", "hosts:1"),
        ("a`b` slots=1\n", "hosts:1"),
        ("h1 slots=1\nH1 slots=1\n", "hosts:2: H1 is already in line 1"),
        ("h1 slots=٣\n", "hosts:1"),
        ("h1 slots=-1\n", "hosts:1"),
        ("h1 slots=1\x0bh2 slots=1\n", "hosts:1"),
        ("h1 slots=1\u2028h2 slots=1\n", "hosts:1"),
        ("h1 slots=2 max_slots=4\n", "hosts:1"),
        ("[fe80::1] slots=1\n", "an IPv6 address, a user or a port goes into ~/.ssh/config"),
        ("root@h1 slots=1\n", "an IPv6 address, a user or a port goes into ~/.ssh/config"),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_hostfile(text, "hosts")


def test_a_missing_hostfile_is_an_error_not_a_local_run() -> None:
    with pytest.raises(ConfigError, match=r"launch.hostfile nowhere: no such file"):
        read_hostfile("nowhere")


@given(st.text(max_size=20))
def test_no_host_name_has_a_character_that_a_shell_reads(name: str) -> None:
    if is_host_name(name):
        assert not set(name) & set(" \t\n;&|<>$`\"'\\()[]{}*?~!#%=/:@,")
        assert not name.startswith("-")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, HOSTS),
        ("h2", None, {"h2": [0, 1, 2]}),
        ("h2:0,2@h1", None, {"h1": [0, 1], "h2": [0, 2]}),
        (None, "h1", {"h2": [0, 1, 2]}),
        (None, "h2:1@h1:0", {"h1": [1], "h2": [0, 2]}),
    ],
)
def test_filters(include: str | None, exclude: str | None, expected: dict[str, list[int]]) -> None:
    assert select(HOSTS, include, exclude) == expected


@pytest.mark.integration
@pytest.mark.parametrize("include", ["h2", "h1@h2:1", "h2:2,0"])
def test_filters_mean_what_they_mean_to_deepspeed(include: str) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert select(HOSTS, include, None) == {
        host: sorted(slots) for host, slots in runner.parse_resource_filter(HOSTS, include_str=include).items()
    }


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("h3", None, "'h3' is not in the hostfile"),
        ("h1:5", None, "host h1 has no slot 5"),
        ("h1:", None, "is not name:SLOT,SLOT"),
        ("h1:x", None, "is not name:SLOT,SLOT"),
        ("h1", "h2", "both given"),
        (None, "h1@h2", "leaves no host"),
    ],
)
def test_impossible_filters(include: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(HOSTS, include, exclude)


def test_processes_a_host() -> None:
    assert select(HOSTS, None, None, 2) == {"h1": [0, 1], "h2": [0, 1]}
    with pytest.raises(ConfigError, match=r"launch\.num_processes 3: host h1 has 2 slots"):
        select(HOSTS, None, None, 3)


def test_what_the_runner_is_given_reads_back() -> None:
    chosen = {"h1": [0, 1], "h2": [0, 2]}
    assert select(parse_hostfile(hostfile_text(chosen), "own"), include_text(chosen), None) == chosen
