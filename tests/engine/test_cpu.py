"""Threads on a CPU: gloo's may not start OpenMP teams of their own."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import os, torch, torch.distributed as dist
from vdr_cli.engine.cpu import keep_to_one_thread_each

os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # where one thread of gloo's easily does the work of all
torch.set_num_threads(3)
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
if {keep}:
    keep_to_one_thread_each()
large = torch.zeros(2**22).add(1.0)  # this thread's own team
before = len(os.listdir("/proc/self/task"))
for work in [dist.all_gather([torch.empty_like(large)], large, async_op=True) for _ in range(16)]:
    work.wait()
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before, flush=True)
os._exit(0)  # an interpreter that ends while gloo's threads live aborts now and then
"""


def started(keep: bool) -> list[int]:
    """Threads that this thread may use, and threads that large collectives started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_gloos_threads_copy_alone() -> None:
    assert started(keep=False)[1] > 0, "what the function is for no longer happens: it may go"
    for _ in range(3):
        assert started(keep=True) == [3, 0]
