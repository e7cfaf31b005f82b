"""Settings of a process that trains on a CPU: its threads keep out of each other's way, its memory is used again."""

from __future__ import annotations

import ctypes
import threading

import torch
import torch.distributed as dist

LARGE = 2**18
"""Elements of a tensor that no thread copies alone if it may have others, and that takes a moment to copy."""

ROUNDS = 16
"""Collectives begun at once: enough for each of gloo's threads to find one."""

GLOO_THREADS = 2
"""Threads that torch gives a process group."""

COPY_SECONDS = 1.0
"""Seconds that a thread is held for the others, in case there are none."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's settings, from malloc.h."""

KEPT_BYTES = 2**30
"""Blocks up to this size are taken from memory that the process has freed, of which this much is kept."""


def reuse_freed_memory() -> None:
    """Have malloc keep what tensors leave, for the next ones. Without glibc nothing happens.

    By default glibc maps every large block anew, and the system fills each of its pages with zeros: a pass of the
    ensemble made 500,000 page faults, and an update spent a sixth of its time on them (66M parameters, 2 cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def keep_to_one_thread_each() -> None:
    """Let gloo's threads copy tensors alone for as long as they live. Collective, right after the process group began.

    A thread starts an OpenMP team of its own at its first large copy, as large as is allowed at that moment. With more
    OpenMP threads than cores libgomp puts every waiting thread to sleep at once, and each operator of the whole process
    pays for waking its own: sampling took 4.5 s instead of 3.0 s (66M parameters, 2 cores).

    A thread that has copied is held until the others have: one that is quick would do all the work, and the others
    would start their teams later, which one run in seven did.
    """
    copied: set[int] = set()
    all_have = threading.Event()
    here = threading.get_ident()

    def hold(_: object) -> None:
        if threading.get_ident() != here:
            copied.add(threading.get_ident())
            if len(copied) == GLOO_THREADS or not all_have.wait(COPY_SECONDS):
                all_have.set()

    allowed = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sent = torch.zeros(LARGE)
        received = [[torch.empty_like(sent) for _ in range(dist.get_world_size())] for _ in range(ROUNDS)]
        works = []
        for parts in received:
            works.append(dist.all_gather(parts, sent, async_op=True))
            works[-1].get_future().then(hold)
        for work in works:
            work.wait()
    finally:
        torch.set_num_threads(allowed)
