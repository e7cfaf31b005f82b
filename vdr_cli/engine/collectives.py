"""Communication between ranks, as plain functions; each is a no-op with one process.

Rule: no collective depends on a condition that only one rank knows. Errors are agreed on first (`agreed`).
"""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from vdr_cli.errors import VdrError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def even_shares(count: int) -> list[int]:
    """Shares of `count` things, by rank; they differ by at most one."""
    size = world_size()
    return [count * (each + 1) // size - count * each // size for each in range(size)]


def ranks_per_host() -> int:
    """The ranks on each host; where hosts have different numbers, the largest part of which all are multiples.

    Collective.
    """
    return math.gcd(*Counter(gather_objects(socket.gethostname())).values())


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sums over ranks, in float64: the same numbers on every rank."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: Sequence[float]) -> list[float]:
    return _all_reduce(values, dist.ReduceOp.MAX)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _raise_everywhere(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error, as `agreed` says."""
    failed = all_reduce_max([0.0 if error is None else 1.0])[0] > 0
    if not failed:
        return
    described = None if error is None else (type(error), str(error), isinstance(error, VdrError))
    everybody = gather_objects(described)
    first_rank, first = next((r, e) for r, e in enumerate(everybody) if e is not None)
    if error is not None and not isinstance(error, VdrError):
        raise error
    kind, message, is_users = first
    raise kind(message) if is_users else RuntimeError(f"rank {first_rank} failed: {kind.__name__}: {message}")


@contextmanager
def agreed() -> Iterator[None]:
    """A block that every rank leaves in the same way: an exception on any rank is raised on all. Collective on exit.

    Errors that a user can fix (VdrError) become the same error everywhere. A bug keeps its own traceback on the rank
    that has it, and is a RuntimeError that names this rank on the others. Inside the block there is no collective that
    a failed rank would miss.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # a rank that stopped alone would leave the others waiting
        error = raised
    _raise_everywhere(error)


def _all_reduce(values: Sequence[float], op: Any) -> list[float]:
    if world_size() == 1:
        return [float(value) for value in values]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()  # type: ignore[no-any-return]
