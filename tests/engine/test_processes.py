"""This process as a rank: its device."""

from __future__ import annotations

import socket

import pytest
import torch

from vdr_cli.engine import processes
from vdr_cli.errors import MachineError


@pytest.mark.parametrize("told", [{"LOCAL_SIZE": "3"}, {"LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}])
def test_a_host_with_more_ranks_than_gpus_says_so(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_RANK": "0", **told}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match=rf"host {socket.gethostname()}: 3 processes but 2 GPUs; start one process"):
        processes.start_distributed()
