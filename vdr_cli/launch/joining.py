"""Several processes on one job that needs no engine: `vdr eval` and `vdr score` under a launcher."""

from __future__ import annotations

import os

import torch

from vdr_cli.engine import collectives
from vdr_cli.launch.rank import processes_started


def join_processes(device: str) -> torch.device:
    """Join the process group when a launcher started us. device: auto is this process's accelerator, else the CPU."""
    if processes_started() > 1 and not torch.distributed.is_initialized():
        from vdr_cli.engine.processes import start_distributed
        from vdr_cli.launch import watchdog

        own = start_distributed()
        watchdog.connect(collectives.rank(), collectives.world_size(), collectives.broadcast_object)
        return own if device == "auto" else torch.device(device)
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
