#!/usr/bin/env python3
"""Several hosts on this machine, for tests: network namespaces with own addresses, sshd, keys and pdsh.

    sudo scripts/verify/cluster_hosts.py up [--hosts 2] [--slots 1] [--dir /tmp/vdr-hosts]
    sudo scripts/verify/cluster_hosts.py exec h1 COMMAND...      # inside host h1, with ssh and pdsh to the others
    sudo scripts/verify/cluster_hosts.py cut h2 | join h2        # the network cable of h2
    sudo scripts/verify/cluster_hosts.py lose h2                 # h2 vanishes: cable out and every process killed
    sudo scripts/verify/cluster_hosts.py status | down

`up` is idempotent and leaves DIR/hostfile; `down` removes everything it made. Files are shared by all
hosts, as on a cluster with a shared file system. Linux, root. scripts/install_test_tools.sh installs the programs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NETWORK = "10.77.0"
BRIDGE = "vdrbr0"
PORT = 22
PROGRAMS = ("ip", "sshd", "ssh", "pdsh")


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, text=True, capture_output=True)


def namespace(host: str) -> str:
    return f"vdr-{host}"


def names(count: int) -> list[str]:
    return [f"h{number}" for number in range(1, count + 1)]


def address(host: str) -> str:
    return f"{NETWORK}.{host.removeprefix('h')}"


def existing() -> list[str]:
    listed = run("ip", "netns", "list", check=False).stdout.split()
    return sorted((name.removeprefix("vdr-") for name in listed if name.startswith("vdr-h")), key=lambda h: int(h[1:]))


def check_programs() -> None:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        sys.exit(f"cluster_hosts: {', '.join(missing)} not found; bash scripts/install_test_tools.sh installs them")


def up(hosts: list[str], slots: int, directory: Path) -> None:
    check_programs()
    directory.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    write_keys(directory)
    write_files(hosts, slots, directory)
    if run("ip", "link", "show", BRIDGE, check=False).returncode:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "link", "set", BRIDGE, "up")
    for host in hosts:
        if host not in existing():
            add_host(host)
        join(host)
        start_sshd(host, directory)
    wait_for_ssh(hosts, directory)


def add_host(host: str) -> None:
    inside, outside = namespace(host), f"vdr{host}"
    run("ip", "netns", "add", inside)
    run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", inside)
    run("ip", "link", "set", outside, "master", BRIDGE, "up")
    enter = ("ip", "netns", "exec", inside, "ip")
    run(*enter, "address", "add", f"{address(host)}/24", "dev", "eth0")
    run(*enter, "link", "set", "eth0", "up")
    run(*enter, "link", "set", "lo", "up")


def write_keys(directory: Path) -> None:
    for name in ("host_key", "client_key"):
        if not (directory / name).exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
    (directory / "authorized_keys").write_text((directory / "client_key.pub").read_text())
    (directory / "authorized_keys").chmod(0o600)


def write_files(hosts: list[str], slots: int, directory: Path) -> None:
    (directory / "hostfile").write_text("".join(f"{host} slots={slots}\n" for host in hosts))
    (directory / "sshd_config").write_text(
        f"Port {PORT}\nHostKey {directory}/host_key\nAuthorizedKeysFile {directory}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 100\nMaxSessions 100\n"
    )
    entries = "".join(f"Host {host}\n  HostName {address(host)}\n" for host in hosts)
    common = (
        f"Host *\n  Port {PORT}\n  User root\n  IdentityFile {directory}/client_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {directory}/known_hosts\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )
    (directory / "ssh_config").write_text(entries + common)
    binaries = directory / "bin"
    binaries.mkdir(exist_ok=True)
    # DeepSpeed and pdsh call plain `ssh`; this one comes first on the PATH of `exec`.
    real = shutil.which("ssh", path="/usr/bin:/bin:/usr/local/bin")
    (binaries / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {directory}/ssh_config "$@"\n')
    (binaries / "ssh").chmod(0o755)


def start_sshd(host: str, directory: Path) -> None:
    pid_file = directory / f"sshd.{host}.pid"
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(pid_file.read_text()), 0)
        return
    kill_all(host)  # an sshd with the keys of another DIR may hold the port
    sshd = shutil.which("sshd")
    log = directory / f"sshd.{host}.log"
    command = f'{sshd} -f {directory}/sshd_config -o "PidFile {pid_file}" -E {log}'
    run("ip", "netns", "exec", namespace(host), "unshare", "--uts", "sh", "-c", f"hostname {host} && {command}")


def wait_for_ssh(hosts: list[str], directory: Path) -> None:
    for host in hosts:
        for _ in range(50):
            if run(*inside(hosts[0], directory, ["ssh", host, "true"]), check=False).returncode == 0:
                break
            time.sleep(0.1)
        else:
            sys.exit(f"cluster_hosts: {host} does not answer; see {directory}/sshd.{host}.log")


def inside(host: str, directory: Path, command: list[str]) -> list[str]:
    """The command as it is run on a host: in its namespace, under its name, with our ssh first on the PATH."""
    setup = f'hostname {host} && export PATH={directory}/bin:"$PATH":/usr/sbin && exec "$@"'
    return ["ip", "netns", "exec", namespace(host), "unshare", "--uts", "sh", "-c", setup, "sh", *command]


def lose(host: str) -> None:
    """Cable first, so that no goodbye of a dying process gets out."""
    cut(host)
    kill_all(host)


def cut(host: str) -> None:
    run("ip", "link", "set", f"vdr{host}", "down")


def join(host: str) -> None:
    run("ip", "link", "set", f"vdr{host}", "up")


def kill_all(host: str) -> None:
    for pid in run("ip", "netns", "pids", namespace(host), check=False).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def down(directory: Path) -> None:
    for host in existing():
        kill_all(host)
        run("ip", "netns", "delete", namespace(host), check=False)
        run("ip", "link", "delete", f"vdr{host}", check=False)
    run("ip", "link", "delete", BRIDGE, check=False)
    shutil.rmtree(directory, ignore_errors=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/vdr-hosts"), help="keys, hostfile, logs")
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("up")
    making.add_argument("--hosts", type=int, default=2)
    making.add_argument("--slots", type=int, default=1)
    actions.add_parser("down")
    actions.add_parser("status")
    for name in ("cut", "join", "lose", "exec"):
        actions.add_parser(name).add_argument("host")
    actions.choices["exec"].add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if os.geteuid() != 0:
        sys.exit("cluster_hosts: needs root (network namespaces)")
    if arguments.action == "up":
        up(names(arguments.hosts), arguments.slots, arguments.dir)
    elif arguments.action == "down":
        down(arguments.dir)
    elif arguments.action == "status":
        print("\n".join(f"{host} {address(host)}" for host in existing()))
    elif arguments.host not in existing():
        sys.exit(f"cluster_hosts: no host {arguments.host}; there are {', '.join(existing()) or 'none, say up'}")
    elif arguments.action == "exec":
        command = inside(arguments.host, arguments.dir, arguments.command or ["bash"])
        os.execvp(command[0], command)
    else:
        {"cut": cut, "join": join, "lose": lose}[arguments.action](arguments.host)


if __name__ == "__main__":
    main()
