"""`vdr train` with several processes or hosts: this process starts the ranks under DeepSpeed's launcher."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vdr_cli.config.schema import LaunchConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.launch.ancestors import OVER_SSH, SUPERVISOR
from vdr_cli.launch.commands import Target, check_plain, node_command, runner_command, srun_command
from vdr_cli.launch.environment import (
    DEFAULT_PORT,
    checked,
    environment_file_text,
    free_port,
    slurm_hosts,
    translated,
    travelling,
)
from vdr_cli.launch.hostfile import LOCAL_NAMES, Hosts, hostfile_text, read_hostfile, select
from vdr_cli.launch.preflight import Question, check_hosts, meeting_of, reachable_hosts
from vdr_cli.launch.rank import is_rank
from vdr_cli.launch.supervisor import Plan, supervise
from vdr_cli.system.variables import check_for_deepspeed, whole_number

LAUNCHER_PROGRAMS = {"pdsh": ("pdsh",), "openmpi": ("mpirun", "ompi_info"), "slurm": ("srun",)}
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax={count}"


def wants_ranks(launch: LaunchConfig) -> bool:
    """True when this process only starts others."""
    if is_rank():
        return False
    several = (launch.num_processes or 1) > 1 or launch.hostfile is not None
    return several or (launch.max_restarts > 0 and not translated(os.environ))


def hosts_of(launch: LaunchConfig) -> Hosts:
    """The hosts and slots of a launch, in rank order. ConfigError for a bad hostfile or filter."""
    if launch.hostfile is not None:
        return select(read_hostfile(launch.hostfile), launch.include, launch.exclude, launch.num_processes)
    if launch.include or launch.exclude:
        raise ConfigError("launch.include and launch.exclude choose from a hostfile; give launch.hostfile (--hostfile)")
    slots = list(range(launch.num_processes or 1))
    if _one_task_a_node():
        return dict.fromkeys(slurm_hosts(os.environ), slots)
    return {"localhost": slots}


def world_size(launch: LaunchConfig) -> int:
    """Processes over all hosts."""
    return sum(len(slots) for slots in hosts_of(launch).values())


def launch(
    launch: LaunchConfig, arguments: Sequence[str], directory: str | None = None, question: Question | None = None
) -> int:
    """Start every rank with the arguments of this command, wait, and return the exit code.

    directory: the run directory, where the run says how it ended; None for commands without one.
    question: to every host (preflight.question_for); None: about the software alone.
    """
    place = Path(directory).absolute() if directory else None
    hosts = check_launch(launch, place)
    if _node_rank(launch, hosts) is None:
        _check_programs(launch)
    if launch.check_hosts and _node_rank(launch, hosts) is None and launch.launcher != "slurm":
        check_hosts(launch, hosts, question or Question(meeting=meeting_of(launch, hosts)))
    with tempfile.TemporaryDirectory(prefix="vdr-launch-") as scratch:
        plan = make_plan(launch, hosts, place, Path(scratch))

        def renew(plan: Plan) -> Plan:
            if not (launch.drop_lost_hosts and plan.over_ssh):
                return plan
            return make_plan(*remaining(launch, hosts), place, Path(scratch))

        return supervise(plan, list(arguments), launch.max_restarts, _say, renew)


def check_launch(launch: LaunchConfig, directory: Path | None) -> Hosts:
    """The hosts of a launch; ConfigError for whatever can be wrong with it before any host is contacted."""
    hosts = hosts_of(launch)
    check_for_deepspeed({**os.environ, **checked(launch.env)})
    if _node_rank(launch, hosts) is None:
        check_plain(launch, str(Path.cwd()), directory)
        travelling(os.environ, launch.env)
    return hosts


def _check_programs(launch: LaunchConfig) -> None:
    """Raise MachineError when this machine lacks a program that the launcher consists of."""
    missing = [name for name in LAUNCHER_PROGRAMS[launch.launcher] if shutil.which(name) is None]
    if missing:
        raise MachineError(
            f"launch.launcher {launch.launcher} needs {missing[0]}, which is not on the PATH; install it, choose "
            "another --launcher, or start vdr on every host with --no-ssh"
        )


def remaining(launch: LaunchConfig, hosts: Hosts) -> tuple[LaunchConfig, Hosts]:
    """The launch without the hosts that do not answer any more."""
    left = reachable_hosts(launch, hosts)
    if not left:
        raise MachineError("no host answers over ssh any more; the newest checkpoint is intact: --resume auto")
    lost = [host for host in hosts if host not in left]
    if lost:
        count = sum(map(len, left.values()))
        _say(f"without {', '.join(lost)}, which no longer answers: {count} process{'es' * (count > 1)} left")
    if next(iter(hosts)) in lost:  # rank 0 moves, and launch.master_addr was where it listened
        launch = launch.model_copy(update={"master_addr": None})
    return launch, left


def make_plan(launch: LaunchConfig, hosts: Hosts, directory: Path | None, scratch: Path) -> Plan:
    """The plan of this launch: ranks here, through DeepSpeed's runner over ssh, or through srun."""
    environment = {**os.environ, **checked(launch.env)}
    if directory is not None:
        environment["VDR_RUN_DIRECTORY"] = str(directory)
    node_rank = _node_rank(launch, hosts)
    if node_rank is None:
        return _plan_over_hosts(launch, hosts, directory, scratch, environment)
    address, port = _rendezvous(launch, hosts)
    environment[SUPERVISOR] = str(os.getpid())

    def command(arguments: Sequence[str]) -> list[str]:
        return node_command(Target(tuple(arguments)), hosts, node_rank, address, port or free_port())

    # Only the first host's supervisor judges by the run directory: others may not see it.
    own = directory if node_rank == 0 else None
    return Plan(command, environment, own, False, launch.fault_timeout, directory)


def _plan_over_hosts(
    launch: LaunchConfig, hosts: Hosts, directory: Path | None, scratch: Path, environment: dict[str, str]
) -> Plan:
    hostfile = scratch / "hostfile"
    hostfile.write_text(hostfile_text(hosts))
    variables = travelling(environment, launch.env)
    # DeepSpeed's openmpi launcher tells the ranks no address; the first host listens under the name it has here.
    address = launch.master_addr or (next(iter(hosts)) if launch.launcher == "openmpi" else None)
    if address is not None:
        variables |= {"MASTER_ADDR": address, "MASTER_PORT": str(launch.master_port or DEFAULT_PORT)}
    if launch.launcher == "pdsh":
        variables[OVER_SSH] = "1"
    variables_file = scratch / "deepspeed_env"
    variables_file.write_text(environment_file_text(variables))
    count = max(2, round(launch.fault_timeout / 5))
    ssh_options = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS.format(count=count)}".strip()
    environment = {**environment, "DS_ENV_FILE": str(variables_file), "PDSH_SSH_ARGS_APPEND": ssh_options}

    def command(arguments: Sequence[str]) -> list[str]:
        target = Target(tuple(arguments))
        if launch.launcher == "slurm":
            return srun_command(target, hosts)
        return runner_command(target, hosts, hostfile, launch)

    return Plan(command, environment, directory, True, launch.fault_timeout, directory)


def _node_rank(launch: LaunchConfig, hosts: Hosts) -> int | None:
    """This machine's place among the hosts when only its own ranks are to be started; None: start those of all."""
    if launch.no_ssh:
        rank = whole_number(os.environ, "SLURM_NODEID", -1) if launch.node_rank is None else launch.node_rank
        if rank < 0:
            raise ConfigError("launch.no_ssh needs --node-rank: this host's place in the hostfile, from 0")
        if rank >= len(hosts):
            raise ConfigError(f"launch.node_rank {rank}: there are {len(hosts)} hosts, numbered from 0")
        return rank
    if launch.node_rank is not None:
        raise ConfigError("launch.node_rank is set without launch.no_ssh; give both, or neither")
    if _one_task_a_node() and launch.hostfile is None:
        return whole_number(os.environ, "SLURM_NODEID", 0)
    name = next(iter(hosts))
    return 0 if len(hosts) == 1 and name in (*LOCAL_NAMES, socket.gethostname()) else None


def _rendezvous(launch: LaunchConfig, hosts: Hosts) -> tuple[str, int | None]:
    """The port of rank 0. Several hosts must agree without a word; one host takes a free port at each start."""
    if len(hosts) == 1:
        return launch.master_addr or "127.0.0.1", launch.master_port
    if launch.master_addr is None and not _one_task_a_node():
        raise ConfigError("launch.no_ssh with several hosts needs --master-addr: the address of the first host")
    address = launch.master_addr or next(iter(hosts))
    job = os.environ.get("SLURM_JOB_ID")
    return address, launch.master_port or (20000 + int(job) % 20000 if job else DEFAULT_PORT)


def _one_task_a_node() -> bool:
    """Started by srun with one task on each of several nodes, so each starts the ranks of its own."""
    nodes, tasks = (whole_number(os.environ, f"SLURM_STEP_NUM_{each}", 1) for each in ("NODES", "TASKS"))
    return nodes > 1 and tasks == nodes and "SLURM_NODEID" in os.environ


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # a full disk, or a closed stream: the run goes on
        print(f"vdr: {line}", file=sys.stderr, flush=True)


__all__ = ["check_launch", "hosts_of", "is_rank", "launch", "make_plan", "wants_ranks", "world_size"]
