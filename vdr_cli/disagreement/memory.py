"""Division of a batch so that it fits in memory: budgets in bytes, and the rows and members that go together."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch
from torch import nn

from vdr_cli.errors import MachineError
from vdr_cli.models import anatomy
from vdr_cli.models.sizes import INNER_WIDTHS, largest
from vdr_cli.samples import Completions

CPU_BUDGET = 2**27
"""Bytes of activations on a CPU, where larger batches leave the caches and gain nothing."""


def default_budget(model: nn.Module, completions: Completions, group_size: int) -> int:
    """Bytes: about half of a GPU's free memory; on a CPU a fixed amount, or what one member and one group need.

    On a GPU a power of two: the division of the work decides the last bits, and a resumed run finds about as much
    memory as the first one, never exactly as much. What the allocator keeps for later counts as free.
    """
    device = completions.prompt_ids.device
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        half = (torch.cuda.mem_get_info(device)[0] + kept) // 2
        return 1 << max(half.bit_length() - 1, 0)
    row, prompt = bytes_per_row(model, completions)
    return min(max(CPU_BUDGET, group_size * row + prompt), psutil.virtual_memory().available // 2)


def divided(
    model: nn.Module, completions: Completions, group_size: int, members: int, budget: int
) -> Iterator[tuple[slice, int]]:
    """(rows, members at once) of each part of the batch, so that its activations fit the budget in bytes.

    As many whole groups as fit with all members; else one group with as many members as fit; else one member and
    a part of a group. The division changes no number by more than rounding.
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


def is_out_of_memory(error: Exception) -> bool:
    """True for a failed allocation, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def too_little_for_divided_rows() -> MachineError:
    """The error for rows that ranks read together: one rank cannot divide its work alone."""
    return MachineError(
        "disagreement: not enough memory for rows that engine.sequence_parallel divides; raise it, or lower "
        "rollout.max_new_tokens"
    )


def too_little_memory() -> MachineError:
    """The error for work that cannot be divided any further."""
    return MachineError(
        "disagreement: not enough memory for one member and one completion; lower rollout.max_new_tokens or "
        "disagreement.members"
    )
