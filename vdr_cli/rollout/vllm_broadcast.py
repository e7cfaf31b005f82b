"""The trainer's end of a broadcast of weights: rank 0 of a process group whose other ranks are the servers' workers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import TCPStore

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout.in_vllm.vdr_weights import broadcast, described, open_group, own_address
from vdr_cli.rollout.vllm_client import VllmClient
from vdr_cli.system.text import first_line

Result = TypeVar("Result")

GRACE = 2.0
"""Seconds for a server's own account of a failure that our end of the connection noticed."""


class Broadcast:
    """Opened on a set of servers; `send` brings all their workers to the same weights at once.

    A server that ends, or refuses, in the middle is a MachineError that names it; the group is of no use then.
    """

    def __init__(self, clients: Sequence[VllmClient], on_gpu: bool, timeout: float) -> None:
        """on_gpu: the trainer's weights are on one. timeout: seconds to meet the workers, and to send the weights."""
        self.clients = [replace(client, retries=0) for client in clients]  # a broadcast cannot be joined twice
        self.timeout = timeout
        self._pool = ThreadPoolExecutor(max_workers=len(clients) + 1, thread_name_prefix="vdr-push")
        places = [_places(client) for client in self.clients]
        devices = {place["device"] for server in places for place in server}
        self.backend = "nccl" if on_gpu and devices == {"cuda"} else "gloo"
        address = _address([urlsplit(client.url).hostname or "" for client in clients])
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port, size = listener.getsockname()[1], 1 + sum(map(len, places))
        self._store = TCPStore(
            address,
            port,
            size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
            master_listen_fd=listener.detach(),
        )
        meeting = {"address": address, "port": port, "size": size, "backend": self.backend, "timeout": timeout}
        firsts = [1 + sum(map(len, places[:server])) for server in range(len(places))]
        joined = self._ask("vdr_join", [meeting | {"first": first} for first in firsts])
        self._group = self._beside(joined, open_group, self._store, address, 0, size, self.backend, timeout)

    def send(self, weights: dict[str, Tensor]) -> None:
        """Returns when every server has loaded the tensors, which may lie on any device."""
        with self.sending(weights) as send_some:
            send_some(weights)

    @contextmanager
    def sending(self, weights: dict[str, Tensor]) -> Iterator[Callable[[dict[str, Tensor]], None]]:
        """Yields a function that sends some tensors after others: those of `weights`, in this order, over its calls.

        weights: names, types and shapes are read, no data. Leaving the block waits until every server has loaded all.
        """
        received = self._ask("vdr_receive", [described(weights)] * len(self.clients))
        try:
            yield lambda tensors: self._beside([], self._broadcast, list(tensors.values()), watched=received)
            self._beside(received, lambda: None)
        except BaseException:
            self._group.abort()  # what is under way would wait for the failed one
            raise

    def _broadcast(self, tensors: list[Tensor]) -> None:
        device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        sent = [tensor.to(device).contiguous() for tensor in tensors]
        for work in [broadcast(self._group, tensor) for tensor in sent]:
            work.wait()

    def _ask(self, method: str, arguments: Sequence[dict[str, Any]]) -> list[Future[Any]]:
        """The method on every server's workers, at once."""
        return [
            self._pool.submit(client.call_workers, method, each)
            for client, each in zip(self.clients, arguments, strict=True)
        ]

    def _beside(
        self,
        requests: list[Future[Any]],
        own: Callable[..., Result],
        *arguments: Any,
        watched: Sequence[Future[Any]] = (),
    ) -> Result:
        """Do our part while the servers do theirs; the first failure of either ends it, a server's by preference.

        watched: requests that go on after our part, but whose failure ends it too.
        """
        part = self._pool.submit(own, *arguments)
        _wait_for([*requests, part], watched, self.timeout)
        if part.done() and part.exception():
            wait([*requests, *watched], GRACE, FIRST_EXCEPTION)
        for request in [*requests, *watched]:
            if request.done():
                request.result()
        if all(each.done() for each in (*requests, part)) and not part.exception():
            return part.result()
        error = part.exception() if part.done() else None
        reason = first_line(error) if error else f"not done within {self.timeout:.0f} s"
        names = ", ".join(client.url for client in self.clients)
        raise MachineError(
            f"rollout.vllm.push broadcast to {names} over {self.backend}: {reason}; rollout.vllm.push=directory needs "
            "no such connection"
        ) from error


def _wait_for(needed: Sequence[Future[Any]], watched: Sequence[Future[Any]], seconds: float) -> None:
    """Until all needed ones are done, one of all fails, or the time is over."""
    deadline = time.monotonic() + seconds
    while not all(each.done() for each in needed):
        pending = [each for each in (*needed, *watched) if not each.done()]
        ended = wait(pending, deadline - time.monotonic(), FIRST_COMPLETED).done
        if not ended or any(each.exception() for each in ended):
            return


def _places(client: VllmClient) -> list[dict[str, Any]]:
    """The places of the server's workers, in order. Raises ConfigError when they cannot be reached one by one."""
    try:
        places: list[dict[str, Any]] = client.call_workers("vdr_place", {})
    except (ConfigError, MachineError) as error:
        raise ConfigError(
            f"rollout.vllm.push broadcast: {client.url} cannot take it ({error}); start it with VLLM_SERVER_DEV_MODE=1 "
            "and --worker-extension-cls vdr_weights.Receiver (docs/rollout.md), or set rollout.vllm.push=directory"
        ) from None
    if any(place["copies"] > 1 for place in places):
        raise ConfigError(
            f"rollout.vllm.push broadcast: {client.url} holds several copies of the model and reaches one of them; "
            "start a server for each copy, or set rollout.vllm.push=directory"
        )
    theirs, ours = (_release(str(version)) for version in (places[0].get("torch", ""), torch.__version__))
    if theirs and theirs != ours:
        raise ConfigError(
            f"rollout.vllm.push broadcast: {client.url} has torch {theirs} and vdr torch {ours}, whose process groups "
            "may be incompatible; install the same release, or set rollout.vllm.push=directory"
        )
    return places


def _release(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu`."""
    return version.partition("+")[0]


def _address(hosts: Sequence[str]) -> str:
    """This host's address for all of these: loopback where they all are on it."""
    addresses = [own_address(host) for host in hosts]
    return next((address for address in addresses if address not in ("127.0.0.1", "::1")), addresses[0])
