"""Source `counts`: how often an answer was given before (Song, Kempe and Munos, arXiv 2509.06941)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def ucb(visits: Tensor, b0: float = 0.5) -> Tensor:
    """(B,): 1/sqrt(N) - b0, N (B,) the times that this answer was given to this prompt, this time included.

    Historical exploration, the paper's UCB with a baseline: an answer seen more than 1/b0² times is penalised.
    """
    return (visits.double().rsqrt() - b0).float()


def batch(answers: Sequence[int], group_size: int) -> Tensor:
    """(B,): -(1/G) times the number of others in the group that gave the same answer.

    Batch exploration. answers: a key per completion, equal for equal answers.
    """
    groups = torch.tensor(list(answers), dtype=torch.int64).view(-1, group_size)
    same = (groups[:, :, None] == groups[:, None, :]).sum(2) - 1
    return -(same.flatten().float() / group_size)


class Visits:
    """N(x, a): times that answer a was given to prompt x in the run, by a key of both. The same on every rank."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._step: Counter[int] = Counter()

    def take(self, keys: Iterable[int]) -> None:
        """The step's completions, over all ranks. They count as finished once `commit` is called."""
        self._step = Counter(keys)

    def of(self, keys: Iterable[int]) -> Tensor:
        """(n,) int64: N of each, the step's own completions included."""
        return torch.tensor([self._counts.get(key, 0) + self._step[key] for key in keys], dtype=torch.int64)

    def commit(self) -> None:
        """The step is done."""
        for key, count in self._step.items():
            self._counts[key] = self._counts.get(key, 0) + count
        self._step = Counter()

    def state_dict(self) -> dict[str, Any]:
        """Keys and counts of finished steps, as tensors."""
        counts = torch.tensor(list(self._counts.values()), dtype=torch.int64)
        return {"keys": torch.tensor(list(self._counts), dtype=torch.int64), "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = dict(zip(state["keys"].tolist(), state["counts"].tolist(), strict=True))
        self._step = Counter()
