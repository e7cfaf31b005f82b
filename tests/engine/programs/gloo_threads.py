"""Threads that this thread may use, and threads that large collectives start: with `keep`, none."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vdr_cli.engine.cpu import keep_to_one_thread_each

os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # where one thread of gloo's easily does the work of all
torch.set_num_threads(3)
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
if sys.argv[1] == "keep":
    keep_to_one_thread_each()
large = torch.zeros(2**22).add(1.0)  # this thread's own team
before = len(list(Path("/proc/self/task").iterdir()))
for work in [dist.all_gather([torch.empty_like(large)], large, async_op=True) for _ in range(16)]:
    work.wait()
print(torch.get_num_threads(), len(list(Path("/proc/self/task").iterdir())) - before, flush=True)
os._exit(0)  # an interpreter that ends while gloo's threads live aborts now and then
