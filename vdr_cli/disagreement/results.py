"""A rank's measures, filled in as the members' hidden states arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_cli.disagreement.information import Statistics, token_statistics
from vdr_cli.disagreement.memory import is_out_of_memory, too_little_memory
from vdr_cli.models.head import Head
from vdr_cli.samples import Completions

MOST_LOGITS = 2**31
"""Bytes of logits, and of what is made from them, beyond which a larger product is not faster on any device."""

HEAD_ROWS = 256
"""Rows that the LM head's product needs at once to reach the matrix rate of a CPU."""


class Results:
    """The measures of some completions, float32 in nats on their device; 0 where nothing was asked."""

    def __init__(
        self, completions: Completions, members: int, measures: frozenset[str], head: Head, budget: int
    ) -> None:
        """budget: bytes for everything; the logits take a part of it."""
        self.ids, self.measures, self.head = completions.completion_ids, measures, head
        self.budget = min(budget, max(min(budget // 2, MOST_LOGITS), 4 * head.weight.shape[0] * HEAD_ROWS))
        """Bytes of logits at once."""
        shape, device = self.ids.shape, self.ids.device
        self.values = {
            name: torch.zeros((members, *shape) if name == "member_logps" else shape, device=device)
            for name in measures
        }

    def take(self, hidden: Tensor, rows: Tensor, tokens: Tensor) -> None:
        """hidden (M, N, D): the states that predict `tokens` (N,) of `rows` (N,).

        Out of memory: halve the logits at once, down to one position. Raises MachineError if that does not fit.
        """
        targets, least = self.ids[rows, tokens], 4 * len(hidden) * self.head.weight.shape[0]
        while (found := self._tried(hidden, targets, last=self.budget <= least)) is None:
            self.budget //= 2
            if hidden.is_cuda:
                torch.cuda.empty_cache()
        for name in self.measures:
            self.values[name][..., rows, tokens] = found.get(name)

    def _tried(self, hidden: Tensor, targets: Tensor, last: bool) -> Statistics | None:
        try:
            return token_statistics(hidden, targets, self.head, self.measures, self.budget)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if last:
                raise too_little_memory() from error
            return None

    def statistics(self, one_a_row: bool) -> Statistics:
        """(B, T) per measure, or (B,) when at most one position per row was taken."""
        if one_a_row:
            return Statistics(**{name: values.sum(-1) for name, values in self.values.items()})  # the others are 0
        return Statistics(**self.values)
