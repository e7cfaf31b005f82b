"""Hostfiles in DeepSpeed's format (`name slots=N`), read strictly.

DeepSpeed trains locally when a hostfile is missing and pastes host names into shell commands, so
everything is checked here first; what it is given afterwards is a file that we wrote ourselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vdr_cli.errors import ConfigError

Hosts = dict[str, list[int]]
"""Host name to the slots used on it (device indices), in the order of the hostfile: the order of the ranks."""

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_ENTRY = re.compile(r"(\S+)\s+slots=([0-9]{1,4})\s*(#.*)?")
LOCAL_NAMES = ("localhost", "127.0.0.1")


def is_host_name(name: str) -> bool:
    """Letters, digits, dot, dash and underscore, at most 253: nothing that a shell would interpret."""
    return len(name) <= 253 and _NAME.fullmatch(name) is not None


def read_hostfile(path: str) -> Hosts:
    """The hosts of a file; ConfigError names the file and line."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")  # editors on Windows begin with a mark
    except FileNotFoundError:
        raise ConfigError(f"launch.hostfile {path}: no such file; give one line per host, `name slots=N`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.hostfile {path}: cannot be read: {error}") from None
    return parse_hostfile(text, path)


def parse_hostfile(text: str, source: str) -> Hosts:
    """Hosts with all their slots. `source` is the file's name in messages."""
    hosts: Hosts = {}
    first_line: dict[str, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{source}:{number}"
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            raise ConfigError(f"{where}: {line!r} is not a host; write `name slots=N`")
        name, slots = entry[1], int(entry[2])
        if not is_host_name(name):
            raise ConfigError(
                f"{where}: {name!r} is not a host name; use letters, digits, dots and dashes (an IPv6 address, a user "
                "or a port goes into ~/.ssh/config under such a name)"
            )
        if slots == 0:
            raise ConfigError(f"{where}: {name} has 0 slots; give at least 1 or remove the line")
        if name.lower() in first_line:
            raise ConfigError(f"{where}: {name} is already in line {first_line[name.lower()]}; write one line per host")
        hosts[name] = list(range(slots))
        first_line[name.lower()] = number
    if not hosts:
        raise ConfigError(f"{source}: names no host; write one line per host, `name slots=N`")
    return hosts


def select(hosts: Hosts, include: str | None, exclude: str | None, per_host: int | None = None) -> Hosts:
    """The hosts and slots to use.

    include, exclude: DeepSpeed's syntax, `host1@host2:0,2`; not both. per_host: processes on every host, its
    first slots; None: all.
    """
    if include and exclude:
        raise ConfigError("launch.include and launch.exclude are both given; give one of them")
    chosen = hosts
    if include:
        wanted = _parse_filter(include, hosts, "launch.include")
        chosen = {name: wanted[name] for name in hosts if name in wanted}
    elif exclude:
        unwanted = _parse_filter(exclude, hosts, "launch.exclude")
        kept = {name: [slot for slot in slots if slot not in unwanted.get(name, [])] for name, slots in hosts.items()}
        chosen = {name: slots for name, slots in kept.items() if slots}
        if not chosen:
            raise ConfigError(f"launch.exclude {exclude} leaves no host")
    return chosen if per_host is None else _first_slots(chosen, per_host)


def hostfile_text(hosts: Mapping[str, list[int]]) -> str:
    """A hostfile that offers every slot up to the highest one used."""
    return "".join(f"{name} slots={max(slots) + 1}\n" for name, slots in hosts.items())


def include_text(hosts: Mapping[str, list[int]]) -> str:
    """The same hosts and slots as an --include filter."""
    return "@".join(f"{name}:{','.join(map(str, slots))}" for name, slots in hosts.items())


def _first_slots(hosts: Hosts, per_host: int) -> Hosts:
    for name, slots in hosts.items():
        if len(slots) < per_host:
            raise ConfigError(
                f"launch.num_processes {per_host}: host {name} has {len(slots)} slot{'s' * (len(slots) != 1)}; "
                "ask for fewer processes per host or exclude it"
            )
    return {name: slots[:per_host] for name, slots in hosts.items()}


def _parse_filter(text: str, hosts: Hosts, key: str) -> Hosts:
    chosen: Hosts = {}
    for node in text.split("@"):
        name, colon, listed = node.partition(":")
        if name not in hosts:
            raise ConfigError(f"{key} {text}: {name!r} is not in the hostfile; it has {', '.join(hosts)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", listed):
            raise ConfigError(f"{key} {text}: {node!r} is not name:SLOT,SLOT")
        slots = [int(slot) for slot in listed.split(",")] if colon else hosts[name]
        missing = [slot for slot in slots if slot not in hosts[name]]
        if missing:
            raise ConfigError(f"{key} {text}: host {name} has no slot {missing[0]}; it has 0 to {len(hosts[name]) - 1}")
        chosen[name] = sorted({*chosen.get(name, []), *slots})
    return chosen
