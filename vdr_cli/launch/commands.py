"""The command lines that start the ranks, as pure functions of what was asked for."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from vdr_cli.config.schema import LaunchConfig
from vdr_cli.errors import ConfigError
from vdr_cli.launch.arguments import encode
from vdr_cli.launch.environment import DEFAULT_PORT, is_plain
from vdr_cli.launch.hostfile import Hosts, include_text, is_host_name
from vdr_cli.launch.processes import RUNNER

NODE_LAUNCHER = "vdr_cli.launch.node"
LOG_LEVEL = "--log_level=warning"


@dataclass(frozen=True)
class Target:
    """The command of every rank: the arguments of vdr, and the Python whose modules DeepSpeed's launchers find."""

    arguments: tuple[str, ...]
    python: str = sys.executable


def node_command(target: Target, hosts: Hosts, node_rank: int, master_addr: str, master_port: int) -> list[str]:
    """DeepSpeed's launcher of the ranks of one host; hosts[node_rank] is this machine."""
    world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
    return [
        target.python, "-u", "-m", NODE_LAUNCHER, f"--world_info={world}", f"--node_rank={node_rank}",
        f"--master_addr={master_addr}", f"--master_port={master_port}", LOG_LEVEL, "--no_local_rank",
        "--module", "vdr_cli", *target.arguments,
    ]  # fmt: skip


def runner_command(target: Target, hosts: Hosts, hostfile: Path, launch: LaunchConfig) -> list[str]:
    """DeepSpeed's runner, which starts the node launchers over ssh. `hostfile` holds hostfile_text(hosts)."""
    tether = [target.python, "-m", "vdr_cli.launch.tether"]
    command = [*tether, target.python, "-m", RUNNER, "--hostfile", str(hostfile), "--force_multi", LOG_LEVEL]
    if launch.launcher == "openmpi":
        _refuse_picked_slots(hosts)
        command += ["--launcher", "openmpi"]
    else:
        command += ["--launcher", launch.launcher, "--include", include_text(hosts), "--no_local_rank"]
    if launch.master_addr is not None:
        command += ["--master_addr", launch.master_addr]
    command += ["--master_port", str(launch.master_port or DEFAULT_PORT)]
    if launch.ssh_port is not None:
        command += ["--ssh_port", str(launch.ssh_port)]
    return [*command, "--module", "vdr_cli", encode(list(target.arguments))]


def srun_command(target: Target, hosts: Hosts) -> list[str]:
    """Slurm starts every rank itself: DeepSpeed's own slurm launcher forgets --module."""
    _refuse_picked_slots(hosts)
    counts = {len(slots) for slots in hosts.values()}
    if len(counts) > 1:
        raise ConfigError(
            "launch.launcher slurm needs the same number of slots on every host; give every host the same slots"
        )
    per_host = counts.pop()
    return [
        "srun", f"--nodes={len(hosts)}", f"--nodelist={','.join(hosts)}", f"--ntasks={len(hosts) * per_host}",
        f"--ntasks-per-node={per_host}", "--kill-on-bad-exit=1", "--export=ALL",
        target.python, "-u", "-m", "vdr_cli", *target.arguments,
    ]  # fmt: skip


def check_plain(launch: LaunchConfig, directory: str, output: Path | None = None) -> None:
    """Refuse what DeepSpeed would paste into a shell on every host and the shell would read differently."""
    if launch.master_addr is not None and not is_host_name(launch.master_addr):
        raise ConfigError(f"launch.master_addr {launch.master_addr!r} is not a host name or IPv4 address")
    for what, path in (("the working directory", directory), ("the path of Python", sys.executable)):
        if not is_plain(path) or " " in path:
            raise ConfigError(f"{what} {path!r} has a character that a shell on the hosts would interpret; move it")
    if output is not None and not is_plain(str(output)):
        raise ConfigError(
            f"train.output {str(output)!r} has a character that a shell on the hosts could interpret; use "
            "letters, digits, spaces and _ @ + = : , . / -"
        )


def _refuse_picked_slots(hosts: Hosts) -> None:
    for name, slots in hosts.items():
        if slots != list(range(len(slots))):
            raise ConfigError(f"host {name}: slots {slots} cannot be picked with this launcher; use its first slots")
