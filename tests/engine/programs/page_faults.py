"""Print the page faults of three pairs of tensors of 64 MB, after the first ten."""

from __future__ import annotations

import resource
import sys

import torch

from vdr_cli.engine.cpu import reuse_freed_memory

if sys.argv[1] == "keep":
    reuse_freed_memory()


def fill() -> None:
    first, second = (torch.ones(2**24) for _ in range(2))
    del first, second


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


for _ in range(10):
    fill()
before = faults()
for _ in range(3):
    fill()
print(faults() - before)
