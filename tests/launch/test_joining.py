"""`vdr eval` and `vdr score` as ranks: the device and the process group."""

from __future__ import annotations

import pytest
import torch

from vdr_cli.engine import collectives, processes
from vdr_cli.launch import joining, watchdog


def test_alone_there_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert joining.join_processes("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert joining.join_processes("auto") == torch.device("cuda:1")
    assert joining.join_processes("cpu") == torch.device("cpu")


def test_a_rank_joins_and_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[tuple[int, int]] = []
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "start_distributed", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(watchdog, "connect", lambda rank, size, share: connected.append((rank, size)))
    assert joining.join_processes("auto") == torch.device("cuda:3")
    assert joining.join_processes("cpu") == torch.device("cpu")
    assert connected == [(1, 2), (1, 2)]
