"""Prompts and completions as rows without padding inside: a completion's first token stands right behind its prompt.

Padding is at a row's end alone, so causal attention without any mask is exact for every token that counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """The trunk's input, and where each completion token is predicted."""

    ids: Tensor  # (B, S), token 0 behind a row's end
    positions: Tensor  # (B, S)
    columns: Tensor  # (B, T) the column whose hidden state produced each token; the prompt's last one at padding


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
