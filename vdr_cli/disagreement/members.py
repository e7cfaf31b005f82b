"""From completions to disagreement: which rows and members go through the network together, and the result.

No collective happens in here: a rank that runs out of memory splits its work and tries again alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.information import Statistics, token_statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reading import Batch, prepare
from vdr_cli.disagreement.stems import StemKeeper
from vdr_cli.errors import MachineError
from vdr_cli.models import anatomy
from vdr_cli.models.anatomy import Head
from vdr_cli.models.sizes import INNER_WIDTHS, largest
from vdr_cli.samples import Completions, last_tokens

__all__ = ["EnsembleSpec", "ensemble", "measure"]

CPU_BUDGET = 2**27
"""Bytes of activations on a CPU, where larger batches leave the caches and gain nothing."""

MOST_LOGITS = 2**31
"""Bytes of logits, and of what is made from them, beyond which a larger product is not faster on any device."""

HEAD_ROWS = 256
"""Rows that the LM head's product needs at once to reach the matrix rate of a CPU."""


@torch.no_grad()
def measure(
    model: nn.Module,
    completions: Completions,
    group_size: int,
    spec: EnsembleSpec,
    step: int,
    positions: Literal["all", "last"] = "all",
    measures: Collection[str] = ("bald",),
    budget: int | None = None,
    last_n: int | None = None,
    stems: StemKeeper | None = None,
) -> Statistics:
    """The measures of every completion under the ensemble of one step.

    positions: all valid tokens, giving (B, T), or each row's last valid one, giving (B,). last_n: only the last n valid
    tokens of a row (the others stay 0). budget: bytes of activations and logits at once; None: what the device
    has. stems: of these completions, from a pass made before; None: made here. Neither they, nor budget, padding, order
    or split of the batch change a number.
    """
    budget = budget or default_budget(model, completions, group_size)
    least = min(sum(bytes_per_row(model, completions)), 2**20)  # a member and a completion at once, whatever they need
    while True:
        try:
            return _measure(
                model, completions, group_size, spec, step, positions, frozenset(measures), budget, last_n, stems
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if budget <= least:
            raise too_little_memory()
        budget = max(budget // 2, least)
        if completions.prompt_ids.is_cuda:
            torch.cuda.empty_cache()


def default_budget(model: nn.Module, completions: Completions, group_size: int) -> int:
    """Bytes: about half of what a GPU has free; on a CPU a fixed amount, or what one member and one group need.

    On a GPU a power of two: the division of the work decides the last bits, and a resumed run finds about as much
    memory as the first one, never exactly as much. What the allocator keeps for later is free.
    """
    device = completions.prompt_ids.device
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        half = (torch.cuda.mem_get_info(device)[0] + kept) // 2
        return 1 << max(half.bit_length() - 1, 0)
    row, prompt = bytes_per_row(model, completions)
    return min(max(CPU_BUDGET, group_size * row + prompt), psutil.virtual_memory().available // 2)


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def too_little_memory() -> MachineError:
    return MachineError(
        "disagreement: not enough memory for one member and one completion; lower rollout.max_new_tokens or "
        "disagreement.members"
    )


def _measure(
    model: nn.Module,
    completions: Completions,
    group_size: int,
    spec: EnsembleSpec,
    step: int,
    positions: str,
    measures: frozenset[str],
    budget: int,
    last_n: int | None,
    stems: StemKeeper | None,
) -> Statistics:
    check_groups(completions, group_size)
    wanted = last_tokens(completions.completion_mask, 1 if positions == "last" else last_n)  # (B, T)
    head = anatomy.output_head(model)
    results = Results(completions, spec.members, measures)
    for rows, member_count in plan(model, completions, group_size, spec.members, budget):
        batch = batch_of(completions, rows, group_size, wanted, positions == "last")
        if len(batch.rows) == 0:
            continue
        reading = prepare(model, spec, step, batch, stems.of(rows, batch) if stems and stems.is_full else ())
        everyone = range(spec.members)
        parts = [reading.states(everyone[at : at + member_count]) for at in range(0, spec.members, member_count)]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        results.take(hidden, head, rows.start + batch.rows, batch.tokens, logits_budget(head, budget))
    return results.statistics(positions)


class Results:
    """The measures of a rank's completions, filled in as hidden states arrive."""

    def __init__(self, completions: Completions, members: int, measures: frozenset[str]) -> None:
        self.ids, self.measures = completions.completion_ids, measures
        shape, device = self.ids.shape, self.ids.device
        self.values = {
            name: torch.zeros((members, *shape) if name == "member_logps" else shape, device=device)
            for name in measures
        }

    def take(self, hidden: Tensor, head: Head, rows: Tensor, tokens: Tensor, budget: int) -> None:
        """hidden (M, N, D) at the positions that predict `tokens` (N,) of `rows` (N,); budget: bytes of logits.

        Out of memory: half the logits at once, again, down to those of one position.
        """
        targets, least = self.ids[rows, tokens], 4 * len(hidden) * head.weight.shape[0]
        while (found := self._tried(hidden, targets, head, budget, last=budget <= least)) is None:
            budget //= 2
            if hidden.is_cuda:
                torch.cuda.empty_cache()
        for name in self.measures:
            self.values[name][..., rows, tokens] = found.get(name)

    def _tried(self, hidden: Tensor, targets: Tensor, head: Head, budget: int, last: bool) -> Statistics | None:
        try:
            return token_statistics(hidden, targets, head, self.measures, budget)
        except RuntimeError as error:
            if last or not out_of_memory(error):
                raise
            return None

    def statistics(self, positions: str) -> Statistics:
        """(B, T), or (B,) with positions "last"."""
        if positions == "last":
            return Statistics(**{name: values.sum(-1) for name, values in self.values.items()})  # one column is not 0
        return Statistics(**self.values)


def logits_budget(head: Head, budget: int) -> int:
    """Bytes of logits at once, out of a budget for everything."""
    return min(budget, max(min(budget // 2, MOST_LOGITS), 4 * head.weight.shape[0] * HEAD_ROWS))


def check_groups(completions: Completions, group_size: int) -> None:
    if len(completions) % group_size:
        raise ValueError(f"{len(completions)} completions are not whole groups of {group_size}")
    prompts = torch.where(completions.prompt_mask.bool(), completions.prompt_ids, -1)
    groups = prompts.view(-1, group_size, prompts.shape[1])
    if not bool((groups == groups[:, :1]).all()):
        raise ValueError("the completions of a group must share their prompt: groups are contiguous rows")


def batch_of(completions: Completions, rows: slice, group_size: int, wanted: Tensor, one_a_row: bool) -> Batch:
    """The rows without padding that all of them have, and the positions to read in them."""
    part = completions.rows(rows).trimmed()
    row, token = wanted[rows].nonzero(as_tuple=True)
    return Batch(part, min(group_size, len(part)), row, token, one_a_row)


def plan(
    model: nn.Module, completions: Completions, group_size: int, members: int, budget: int
) -> Iterator[tuple[slice, int]]:
    """(rows, members at once) of each batch, so that its activations fit the budget.

    As many whole groups as fit with all members; else one group with as many members as fit; else one member and
    a part of a group. The division never changes a number.
    """
    row, prompt = bytes_per_row(model, completions)
    group = group_size * row + prompt
    total = len(completions)
    if members * group <= budget:
        size, together = group_size * max(1, budget // (members * group)), members
    elif group <= budget:
        size, together = group_size, budget // group
    else:
        part = max(1, (budget - prompt) // row)
        size, together = max(n for n in range(1, group_size + 1) if group_size % n == 0 and n <= part), 1
    return ((slice(at, min(at + size, total)), together) for at in range(0, total, size))


def bytes_per_row(model: nn.Module, completions: Completions) -> tuple[int, int]:
    """Peak bytes of activations that one member needs for (a completion, a prompt).

    A completion: the widest layer's activations, and its keys and values joined with the prompt's. A prompt: keys
    and values in all layers, or the widest layer's activations.
    """
    config = anatomy.text_config(model)
    size = anatomy.output_head(model).weight.element_size()
    width = config.hidden_size
    inner = largest(config, *INNER_WIDTHS) or 4 * width
    active = largest(config, "num_experts_per_tok") or 1
    heads = largest(config, "num_attention_heads") or 1
    kept = largest(config, "num_key_value_heads") or heads
    keys = 2 * width * kept // heads  # D of keys and values together
    per_token = 8 * width + 3 * inner * active
    lengths = completions.prompt_ids.shape[1], completions.completion_ids.shape[1]
    row = size * (lengths[1] * per_token + sum(lengths) * keys)
    prompt = size * lengths[0] * (per_token + config.num_hidden_layers * keys)
    return row, prompt
