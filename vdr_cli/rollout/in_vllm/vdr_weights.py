"""Weights by broadcast from the trainer into the workers of vLLM servers: NCCL between GPUs, gloo otherwise.

Both sides run this file: vdr imports it, and a vLLM worker takes it in with `--worker-extension-cls
vdr_weights.Receiver`. It needs torch alone, because vLLM's environment has no vdr.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, Store, TCPStore, Work

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend  # torch.distributed.Backend is a class of names


class Receiver:
    """Becomes a base of vLLM's worker class; /collective_rpc calls the methods on every worker of a server."""

    rank: int
    device: torch.device
    vllm_config: Any
    reload_weights: Callable[..., None]
    vdr_group: Backend

    def vdr_place(self) -> dict[str, Any]:
        """This worker's rank within its server, its device's type, the number of copies of the model, its torch."""
        copies = self.vllm_config.parallel_config.data_parallel_size
        return {"rank": self.rank, "device": self.device.type, "copies": copies, "torch": str(torch.__version__)}

    def vdr_join(self, address: str, port: int, first: int, size: int, backend: str, timeout: float) -> None:
        """Meet the trainer at address:port. first: the rank of this server's first worker; size: ranks in all."""
        store = TCPStore(address, port, size, is_master=False, timeout=timedelta(seconds=timeout))
        self.vdr_group = open_group(store, own_address(address), first + self.rank, size, backend, timeout)

    def vdr_receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Load tensors of these names in this order, each as it arrives."""

        def arriving() -> Iterator[tuple[str, Tensor]]:
            device = self.device if self.vdr_group.name() == "nccl" else torch.device("cpu")
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                broadcast(self.vdr_group, tensor).wait()
                yield name, tensor

        self.reload_weights(weights_iterator=arriving())


def open_group(store: Store, address: str, rank: int, size: int, backend: str, timeout: float) -> Backend:
    """A process group beside torch's default one. address: of this host, where gloo listens.

    gloo returns when all ranks are there, NCCL meets them in the first broadcast. RuntimeError when they are not
    within `timeout` seconds.
    """
    seconds = timedelta(seconds=timeout)
    if backend == "nccl":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = seconds
        return ProcessGroupNCCL(store, rank, size, options)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = seconds
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return ProcessGroupGloo(store, rank, size, options)


def broadcast(group: Backend, tensor: Tensor) -> Work:
    """Rank 0's bytes into every rank's tensor, which is contiguous. Begun, not awaited."""
    options = BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([tensor.view(-1).view(torch.uint8)], options)  # type: ignore[attr-defined,no-any-return]


def own_address(peer: str) -> str:
    """The address of this host that `peer` sees. Nothing is sent."""
    family, kind, protocol, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def described(weights: dict[str, Tensor]) -> dict[str, Sequence[Any]]:
    """The arguments of `vdr_receive` for tensors that will be broadcast in this order."""
    return {
        "names": list(weights),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
        "shapes": [list(tensor.shape) for tensor in weights.values()],
    }
