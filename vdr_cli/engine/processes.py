"""This process as a rank: joining the process group, its device, leaving.

A process stays in its group until it ends: DeepSpeed keeps references to the first one, and several runs in one process
(a notebook, a sweep) share it.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch

from vdr_cli.config import Config
from vdr_cli.engine.cpu import keep_to_one_thread_each, reuse_freed_memory
from vdr_cli.engine.deepspeed_import import deepspeed
from vdr_cli.engine.determinism import fixed_kernels
from vdr_cli.errors import MachineError
from vdr_cli.system.text import first_line

PATIENCE = 3600.0
"""Least seconds that a collective waits for the slowest rank; the watchdog notices one that is gone long before."""


def patience_of(config: Config) -> float:
    """Seconds that ranks wait for one whose rewards and tools all take as long as they may, and more."""
    rewards = config.rewards.timeout * max(len(config.rewards.functions), 1)
    return max(PATIENCE, 2 * (rewards + config.rollout.tool_timeout * config.rollout.max_turns))


def start_distributed(patience: float = PATIENCE) -> torch.device:
    """Join the process group and choose this rank's device. The launcher's environment must be set.

    patience: seconds that a collective waits for the slowest rank, unless DEEPSPEED_TIMEOUT (minutes) is set.

    In a group already: stay. Raises MachineError when rank 0 cannot listen, or cannot be reached, and when this host
    has more ranks than GPUs.
    """
    if torch.cuda.is_available():
        _check_gpus(os.environ, torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        atexit.register(leave_process_group)
    if not torch.cuda.is_available():
        # Compiling DeepSpeed's shared-memory collective takes a minute and a compiler; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _join_group(patience)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        fixed_kernels()
        return device
    reuse_freed_memory()
    keep_to_one_thread_each()
    return torch.device("cpu")


def _check_gpus(environ: Mapping[str, str], gpus: int) -> None:
    """Every rank of a host finds this out alone, before it waits for the others."""
    ranks = int(environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or int(environ["LOCAL_RANK"]) + 1)
    if ranks > gpus:
        raise MachineError(
            f"host {socket.gethostname()}: {ranks} processes but {gpus} GPU{'s' * (gpus != 1)}; start one process for "
            "each GPU (--num-processes), or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def _join_group(patience: float) -> None:
    try:
        deepspeed.init_distributed(verbose=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = first_line(error)
        if os.environ.get("RANK") == "0":
            raise MachineError(f"rank 0 cannot listen on {place}: {reason}; give another --master-port") from error
        raise MachineError(f"rank 0 cannot be reached at {place}: {reason}; give --master-addr") from error
    if "DEEPSPEED_TIMEOUT" not in os.environ:  # now that they have met: a rank that never comes is not waited for
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=patience))


def leave_process_group() -> None:
    """Destroy the process group, if there is one. DeepSpeed cannot be used in this process any more."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
