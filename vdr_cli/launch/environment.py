"""The environment of a rank: who it is, and which variables travel to other hosts.

A rank is told who it is by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (the deepspeed
launcher, torchrun); srun and mpirun say the same in their own words, which are translated here.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vdr_cli.config.schema import LaunchConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.launch import ancestors, watchdog
from vdr_cli.launch.rank import GPU_DEVICES, gpu_names, is_rank, processes_started
from vdr_cli.system.variables import whole_number

DEFAULT_PORT = 29500
TRAVELLING = (
    "VDR_",
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "GLOO_",
    "DS_",
    "DEEPSPEED_",
    "WANDB_",
    "LD_LIBRARY_PATH",
)
"""Prefixes of the variables that every rank gets, besides launch.env and those DeepSpeed sends itself."""
SENT_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
STAYS_HERE = ("DS_ENV_FILE", ancestors.SUPERVISOR, ancestors.OVER_SSH)
_SECRET = re.compile(r"TOKEN$|KEY$|SECRET|PASSWORD")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_@+=:,./^ -]*")


def translated(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of srun or mpirun under the names that DeepSpeed reads; empty when neither started this task.

    SLURM_STEP_NUM_TASKS is set by srun alone: inside an sbatch script, where SLURM_PROCID is 0 as well,
    a plain `vdr train` stays one process.
    """
    if is_rank(environ):
        return {}
    if whole_number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environ:
        job = whole_number(environ, "SLURM_JOB_ID", 0)
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        address = slurm_hosts(environ)[0]
        port = str(20000 + job % 20000)  # the same for all tasks without a word between them
    elif whole_number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        names = {
            "RANK": "OMPI_COMM_WORLD_RANK",
            "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
            "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
        }
        if "MASTER_ADDR" not in environ:
            raise ConfigError("started by mpirun without MASTER_ADDR; export it (mpirun -x MASTER_ADDR=...)")
        address, port = environ["MASTER_ADDR"], str(DEFAULT_PORT)
    else:
        return {}
    found = {ours: environ[theirs] for ours, theirs in names.items() if theirs in environ}
    # Such a task sees its own GPU alone, as number 0, unless --gpu-bind=none shows it those of all tasks.
    if "SLURM_GPUS_PER_TASK" in environ and len(gpu_names(environ.get(GPU_DEVICES, ""))) == 1:
        found["LOCAL_RANK"] = "0"
    return {
        **found,
        "MASTER_ADDR": environ.get("MASTER_ADDR", address),
        "MASTER_PORT": environ.get("MASTER_PORT", port),
    }


def slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    """The hosts of this job step, in the order of SLURM_NODEID."""
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise MachineError("inside Slurm but SLURM_JOB_NODELIST is not set; start with srun or sbatch")
    return expand_nodelist(listed)


def expand_nodelist(text: str) -> list[str]:
    """`a[01-03,7],b` to [a01, a02, a03, a7, b]: what `scontrol show hostnames` prints."""
    hosts: list[str] = []
    for node in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        hosts += _expand(node.strip())
    return hosts


def single_process() -> dict[str, str]:
    """The variables of a run of one process that no launcher started; without them DeepSpeed asks MPI."""
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def become_single_rank() -> None:
    """Make this process the only rank of a run, when no launcher said otherwise."""
    if not is_rank():
        os.environ.update(single_process())


def prepare_process(launch: LaunchConfig) -> None:
    """Complete a rank's environment, before torch is imported: launch.env, who it is, its threads, its watchdog.

    Raises ConfigError when a variable of the environment makes no sense.
    """
    os.environ.update(checked(launch.env))
    os.environ.update(translated(os.environ))
    become_single_rank()
    if processes_started() > 1:
        watchdog.begin(os.environ.get("VDR_RUN_DIRECTORY"), launch.fault_timeout)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(os.environ)))


@contextmanager
def environment_restored() -> Iterator[None]:
    """Afterwards the variables that make this process a rank are as before: its children are not that rank."""
    before = {name: os.environ.get(name) for name in single_process()}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def threads_per_process(environ: Mapping[str, str]) -> int:
    """The cores this process may use, shared between the processes of this host."""
    beside = int(environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, len(os.sched_getaffinity(0)) // beside)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def checked(env: Mapping[str, str]) -> dict[str, str]:
    """launch.env, refused when a name or value could mean anything to a shell (DeepSpeed pastes them into one)."""
    for name, value in env.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"launch.env: {name!r} is not a variable name; use letters, digits and underscores")
        if not is_plain(value):
            raise ConfigError(f"launch.env.{name}: {value!r} has {_offending(value)!r} in it, {_ALLOWED}")
    return dict(env)


def is_plain(value: str) -> bool:
    """True when every shell, and pdsh, takes the text as it is between double quotes."""
    return _VALUE.fullmatch(value) is not None


def travelling(environ: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """The variables every rank on every host gets: launch.env over what this shell has under TRAVELLING.

    Credentials (…TOKEN, …KEY) stay: they would stand in every host's process list. Log in on the hosts, or
    name them in launch.env.
    """
    found = {
        name: value
        for name, value in environ.items()
        if name.startswith(TRAVELLING) and name not in STAYS_HERE and not _SECRET.search(name)
    }
    sent = {name: value for name, value in environ.items() if name.startswith(SENT_BY_DEEPSPEED)}
    for name, value in {**found, **sent}.items():
        if name not in env and not is_plain(value):
            raise ConfigError(
                f"the environment variable {name} would be sent to every host and has {_offending(value)!r} in it, "
                f"{_ALLOWED}, or unset it"
            )
    return {**found, **checked(env)}


def environment_file_text(variables: Mapping[str, str]) -> str:
    """DeepSpeed's format: one NAME=value per line, no blank lines, no comments (either one crashes its reader)."""
    return "".join(f"{name}={value}\n" for name, value in variables.items())


_ALLOWED = "which a shell could interpret; use letters, digits, spaces and _ @ + = : , . / ^ -"


def _offending(value: str) -> str:
    return next((char for char in value if not is_plain(char)), "")


def _expand(node: str) -> list[str]:
    bracket = re.search(r"\[([^\]]*)\]", node)
    if bracket is None:
        return [node]
    head, tail = node[: bracket.start()], node[bracket.end() :]
    names: list[str] = []
    for part in bracket[1].split(","):
        first, dash, last = part.partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        for number in numbers:
            names += _expand(f"{head}{number:0{len(first)}d}{tail}")
    return names
