"""Weights by broadcast, over gloo, to the workers of vLLM servers, which are threads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.conftest import KEYS, PROMPTS, change, connect, tiny
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout import in_vllm
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.in_vllm.vdr_weights import Receiver, own_address
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_broadcast import Broadcast
from vdr_cli.rollout.vllm_client import VllmClient
from vdr_cli.rollout.weights import WEIGHTS, served_weights
from vdr_cli.samples import Sampling


def clients_of(servers: list[Any]) -> list[VllmClient]:
    return [VllmClient(server.url, push_timeout=20.0) for server in servers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_of_every_server_has_the_trainers_bits(dtype: torch.dtype, servers: list[Any]) -> None:
    model = tiny(tied=True).to(dtype)
    for server in servers:
        server.model = tiny().to(dtype)
    group = Broadcast(clients_of(servers), on_gpu=False, timeout=20.0)
    assert group.backend == "gloo"
    for _ in range(2):
        change(model)
        group.send(served_weights(model))
        for server in servers:
            held = server.model.state_dict()
            assert torch.equal(held.pop("lm_head.weight"), model.model.embed_tokens.weight)
            assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in held.items())
    assert [server.broadcasts for server in servers] == [4, 2]


def test_a_run_that_pushes_by_broadcast_writes_no_weights_after_the_first(servers: list[Any], tmp_path: Path) -> None:
    model = tiny()
    urls = [server.url for server in servers]
    rollout = connect(servers[0], tmp_path, urls=urls, push="broadcast", start_timeout=20)
    for step in range(3):
        out = rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))
        own = TransformersRollout(0, [1]).generate(
            model, RolloutRequest(PROMPTS, 2, Sampling(6), [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids)
        if step == 0:
            (tmp_path / WEIGHTS).unlink()
        change(model)
    assert not (tmp_path / WEIGHTS).exists()
    assert servers[0].reloads == servers[1].reloads == 0


@pytest.mark.parametrize("fault", ["stale", "keeps_head"])
def test_wrong_weights_after_a_broadcast_stop_the_run(fault: str, fake_vllm: Any, tmp_path: Path) -> None:
    model, fake_vllm.model = tiny(), tiny()
    rollout = connect(fake_vllm, tmp_path, push="broadcast", start_timeout=20)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))
    setattr(fake_vllm, fault, True)
    change(model)
    with pytest.raises(ConfigError, match="differ from the trainer's by"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))


def test_a_server_that_fails_in_the_middle_is_named_at_once(servers: list[Any]) -> None:
    group = Broadcast(clients_of(servers), on_gpu=False, timeout=6.0)
    servers[1].breaks = True
    with pytest.raises(
        MachineError, match=f"{servers[1].url} answered /collective_rpc with 500: .*planted in the middle"
    ):
        group.send(served_weights(tiny()))  # and not that the time is over


def test_a_server_without_the_extension_or_with_copies_is_refused(fake_vllm: Any) -> None:
    fake_vllm.copies = 2
    with pytest.raises(ConfigError, match=f"{fake_vllm.url} holds several copies of the model"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)
    fake_vllm.receives = False
    with pytest.raises(ConfigError, match=r"cannot take it .*--worker-extension-cls vdr_weights.Receiver"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)
    fake_vllm.development = False
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)


def test_another_release_of_torch_is_refused(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Receiver.vdr_place
    monkeypatch.setattr(Receiver, "vdr_place", lambda self: place(self) | {"torch": "1.2.3+cpu"})
    with pytest.raises(ConfigError, match=f"{fake_vllm.url} has torch 1.2.3 and vdr torch .*push=directory"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)


def test_workers_that_do_not_come_are_not_waited_for_without_end(
    fake_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Receiver, "vdr_join", lambda self, **_: None)
    with pytest.raises(MachineError, match=f"{fake_vllm.url} over gloo: "):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=1.0)


def test_it_stays_on_loopback_where_the_servers_are() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") in ("127.0.0.1", "::1")


def test_nothing_else_lies_where_vllm_imports_from() -> None:
    """That directory is the PYTHONPATH of vLLM's processes: a module in it would hide theirs of the same name."""
    assert in_vllm.__file__ is not None
    files = {file.name for file in Path(in_vllm.__file__).parent.iterdir()} - {"__pycache__"}
    assert files == {"__init__.py", "vdr_weights.py"}
