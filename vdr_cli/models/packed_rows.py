"""Prompts and completions as rows without padding inside: a completion's first token stands right behind its prompt.

Padding is at a row's end alone, so causal attention without any mask is exact for every token that counts. A mask of
tokens x tokens, of which every layer keeps a copy for backward, is what fills the memory as rows grow: long rows are
read this way (`limits.PACKED_TOKENS`), each with its prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vdr_cli.models import anatomy
from vdr_cli.models.prefix import shares_prompts


class PackedRows(NamedTuple):
    """The trunk's input, and where each completion token is predicted."""

    ids: Tensor  # (B, S), token 0 behind a row's end
    positions: Tensor  # (B, S)
    columns: Tensor  # (B, T) the column whose hidden state produced each token; the prompt's last one at padding

    def part(self, rank: int, size: int) -> PackedRows:
        """One of `size` equal parts of the columns; its `columns` count from its own first, the others lie outside."""
        width = self.ids.shape[1] // size
        own = slice(rank * width, (rank + 1) * width)
        return PackedRows(self.ids[:, own], self.positions[:, own], self.columns - own.start)


def packed_rows(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor, multiple: int
) -> PackedRows:
    """prompts (B, P), padded left; completions (B, T), padded right. S is a multiple of `multiple`.

    Nothing is read off a row's last token, so it is left out.
    """
    P, lengths = prompt_ids.shape[1], completion_mask.sum(1)
    before = prompt_mask.sum(1)
    read = before + (lengths - 1).clamp_min(0)  # (B,)
    longest = int(read.max())
    width = -(-longest // multiple) * multiple
    column = torch.arange(width, device=prompt_ids.device)[None]
    whole = torch.cat([prompt_ids, completion_ids], dim=1)
    source = ((P - before)[:, None] + column).clamp_max(whole.shape[1] - 1)
    ids = whole.gather(1, source).masked_fill(column >= read[:, None], 0)
    t = torch.arange(completion_ids.shape[1], device=ids.device)[None]
    columns = before[:, None] - 1 + t.masked_fill(~completion_mask.bool(), 0)
    return PackedRows(ids, column.clamp_max(longest - 1).expand_as(ids), columns)


def packed_completion_hidden(
    causal_lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """(B, T, D): the hidden states that produced each completion token. Always one pass, whatever the batch."""
    rows = packed_rows(prompt_ids, prompt_mask, completion_ids, completion_mask, multiple=1)
    arguments = anatomy.forward_arguments(causal_lm, torch.ones_like(rows.ids), rows.positions)
    hidden = anatomy.backbone(causal_lm)(input_ids=rows.ids, use_cache=False, **arguments)[0]  # (B, S, D)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], rows.columns]  # type: ignore[no-any-return]


def can_read_packed(causal_lm: nn.Module) -> bool:
    """True if what the model remembers of a token is keys and values, so that padding behind a row changes nothing."""
    return shares_prompts(causal_lm)
