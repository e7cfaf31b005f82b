"""The rank that this process is, and the GPUs that it may use, as its environment says."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vdr_cli.errors import ConfigError

GPU_DEVICES = "CUDA_VISIBLE_DEVICES"
_UNSET = "unset RANK and WORLD_SIZE, or start vdr with a launcher that sets them all (deepspeed, torchrun, srun)"


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """True when a launcher started this process as one of several."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def is_first(environ: Mapping[str, str] = os.environ) -> bool:
    """True in the process that prints and writes: rank 0, one that is no rank, or one that nothing makes a rank."""
    try:
        return processes_started(environ) == 1 or int(environ["RANK"]) == 0
    except ConfigError:
        return True


def speaks_for_host(environ: Mapping[str, str] = os.environ) -> bool:
    """True in the first rank of a host, and in one whose launcher does not say that it started others beside it."""
    return environ.get("LOCAL_RANK", "0") == "0" or not any(
        name in environ for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    )


def processes_started(environ: Mapping[str, str] = os.environ) -> int:
    """The number of ranks that a launcher started; 1 without one. ConfigError for variables that make no rank."""
    if not is_rank(environ):
        return 1
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = environ.get(name)
        if not value:
            raise ConfigError(f"the environment has RANK and WORLD_SIZE but no {name}; {_UNSET}")
        if name != "MASTER_ADDR":
            _check_number(name, value)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):  # not every launcher sets one
        _check_number(name, environ.get(name) or "1")
        if int(environ.get(name) or "1") == 0:
            raise ConfigError(f"the environment variable {name} is 0, and this rank is one; {_UNSET}")
    rank, size, port = (int(environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size:
        raise ConfigError(f"the environment variable RANK is {rank}, not below WORLD_SIZE {size}; {_UNSET}")
    if not 0 < port < 65536:
        raise ConfigError(f"the environment variable MASTER_PORT is {port}; a port is 1 to 65535")
    return size


def _check_number(name: str, value: str) -> None:
    if not value.isdecimal():
        raise ConfigError(f"the environment variable {name} is {value!r}, not a whole number; {_UNSET}")


def gpu_names(visible: str) -> list[str]:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES shows: numbers or UUIDs. None of them for an empty one, or -1."""
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
