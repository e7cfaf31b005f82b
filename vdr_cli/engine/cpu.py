"""What a process does on a CPU so that its threads do not stand in each other's way."""

from __future__ import annotations

import torch
import torch.distributed as dist

LARGE = 2**16
"""Elements of a tensor that no thread copies alone if it may have others."""

ROUNDS = 16
"""More collectives at once than gloo has threads to take them."""


def keep_to_one_thread_each() -> None:
    """Let gloo's threads copy tensors alone for as long as they live. Collective, right after the process group began.

    A thread starts an OpenMP team of its own at its first large copy, as large as is allowed at that moment. With more
    OpenMP threads than cores libgomp puts every waiting thread to sleep at once, and each operator of the whole process
    pays for waking its own: sampling took 4.5 s instead of 3.0 s (66M parameters, 2 cores).
    """
    allowed = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sent = torch.zeros(LARGE)
        received = [[torch.empty_like(sent) for _ in range(dist.get_world_size())] for _ in range(ROUNDS)]
        for work in [dist.all_gather(parts, sent, async_op=True) for parts in received]:
            work.wait()
    finally:
        torch.set_num_threads(allowed)
