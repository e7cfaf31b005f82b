"""Token steps as CUDA graphs: one launch per step instead of about a thousand.

A graph holds the addresses of weights and buffers, so it lives as long as one decode batch: the weights of the next
step are gathered elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdr_cli.rollout.static_cache import Columns
from vdr_cli.samples import Watcher
from vdr_cli.system.text import first_line

Forward = Callable[[Tensor, Tensor], Tensor]
"""(R, 1) ids and positions to (R, V) logits."""


@dataclass
class _Captured:
    graph: Any
    ids: Tensor  # (R, 1)
    positions: Tensor  # (R, 1)
    logits: Tensor  # (R, V)
    seen: Tensor | None
    """The watched layer's output, at its fixed address."""


class GraphedForward:
    """A decode step's forward, captured once for each number of rows and of columns.

    A model that cannot be captured (its forward waits for the GPU) is called without a graph, after a warning.
    """

    def __init__(self, forward: Forward, columns: Columns, watcher: Watcher | None) -> None:
        self.forward, self.columns, self.watcher = forward, columns, watcher
        self.has_failed = False
        self._captured: dict[int, _Captured] = {}
        self._rows, self._pool = columns.rows, torch.cuda.graph_pool_handle()

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits stay valid until the next call."""
        if self.has_failed:
            return self.forward(ids, positions)
        if self._rows != len(ids):
            self._captured.clear()
            self._rows, self._pool = len(ids), torch.cuda.graph_pool_handle()  # a pool ends with its last graph
        if self.columns.length not in self._captured:
            try:
                self._captured[self.columns.length] = self._capture(ids, positions)
            except RuntimeError as error:
                why = first_line(error)
                warnings.warn(f"sampling continues without CUDA graphs: {why} (rollout.cuda_graphs)", stacklevel=2)
                self.has_failed = True
                return self.forward(ids, positions)
        step = self._captured[self.columns.length]
        step.ids.copy_(ids)
        step.positions.copy_(positions)
        step.graph.replay()
        if self.watcher is not None and step.seen is not None:
            self.watcher.seen = step.seen.clone()
        return step.logits

    def _capture(self, ids: Tensor, positions: Tensor) -> _Captured:
        ids, positions = ids.clone(), positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward(ids, positions)  # libraries allocate their workspaces outside the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Reward functions may use the GPU from other threads meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self.forward(ids, positions)
        return _Captured(graph, ids, positions, logits, None if self.watcher is None else self.watcher.seen)
