"""A prompt and all its completions as one row: every layer is called once, and reads the prompt once.

The mask lets a completion see its prompt and itself, not its neighbours. Attention goes through the scores between
neighbours all the same, so this pays where the completions of a prompt are short (`limits.TREE_TOKENS`).
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vdr_cli.models import anatomy
from vdr_cli.models.prefix import shares_prompts

FULL_ATTENTION = frozenset({"full_attention", "attention"})
"""Entries of a configuration's layer_types that see all tokens before theirs."""


class TreeLayout(NamedTuple):
    """Places of the tokens of B completions in their trees, U of them, S wide: the prompt first, then those tokens of
    its completions that others follow, without padding between them."""

    firsts: Tensor  # (U,) the first row of each prompt
    owner: Tensor  # (B,) the tree of each completion
    columns: Tensor  # (B, T) the column whose hidden state produced each token; the prompt's last one at padding
    read: Tensor  # (B, T - 1) bool, the tokens that others follow
    width: int  # S


class Trees(NamedTuple):
    """The trunk's input."""

    ids: Tensor  # (U, S)
    positions: Tensor  # (U, S)
    mask: Tensor  # (U, 1, S, S), what attention adds to its scores


def can_read_trees(causal_lm: nn.Module) -> bool:
    """True if the model takes a mask of any shape as it is, and positions beside it, in every layer."""
    config = anatomy.text_config(causal_lm)
    kinds = set(getattr(config, "layer_types", None) or ["attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return (
        shares_prompts(causal_lm)
        and kinds <= FULL_ATTENTION
        and not any(windows)
        and not getattr(config, "alibi", False)
        and "position_ids" in inspect.signature(anatomy.backbone(causal_lm).forward).parameters
        and bool(getattr(anatomy.unwrapped(causal_lm), "_supports_attention_backend", False))
        and config._attn_implementation in ("sdpa", "eager")
    )


def tree_completion_hidden(
    causal_lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """(B, T, D): the hidden states that produced each completion token. Always one pass, whatever the batch."""
    layout = layout_of(prompt_ids, prompt_mask, completion_mask)
    dtype = anatomy.output_head(causal_lm).weight.dtype
    trees = pack(prompt_ids, prompt_mask, completion_ids, layout, dtype)
    arguments = {"attention_mask": trees.mask, "position_ids": trees.positions}
    return unpack(anatomy.backbone(causal_lm)(input_ids=trees.ids, use_cache=False, **arguments)[0], layout)


def layout_of(prompt_ids: Tensor, prompt_mask: Tensor, completion_mask: Tensor) -> TreeLayout:
    """The layout in which rows with the same prompt (B, P), next to each other, become one tree."""
    firsts, owner = distinct_prompts(prompt_ids, prompt_mask)
    P, read = prompt_ids.shape[1], completion_mask[:, 1:].bool()
    count = read.sum(1)
    before = count.cumsum(0) - count
    start = before - before[firsts][owner]  # (B,) where a completion begins behind the prompt
    columns = P + start[:, None] + torch.arange(read.shape[1], device=read.device)
    columns = nn.functional.pad(columns.masked_fill(~read, P - 1), (1, 0), value=P - 1)
    return TreeLayout(firsts, owner, columns, read, P + int((start + count).max()))


def pack(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, layout: TreeLayout, dtype: torch.dtype
) -> Trees:
    """prompts (B, P), completions (B, T); columns that nothing takes hold token 0."""
    prompts, behind = prompt_mask[layout.firsts], layout.width - prompt_ids.shape[1]
    ids = nn.functional.pad(prompt_ids[layout.firsts], (0, behind))
    positions = nn.functional.pad(anatomy.position_ids(prompts), (0, behind))
    branch = nn.functional.pad(prompts.long() - 1, (0, behind), value=-1)  # (U, S), 0 in the prompt, -1 at padding
    row, t = layout.read.nonzero(as_tuple=True)  # of each token that is read
    at = layout.owner[row], layout.columns[row, t + 1]
    ids[at] = completion_ids[row, t]
    positions[at] = prompts.sum(1)[layout.owner[row]] + t
    branch[at] = row + 1
    return Trees(ids, positions, _mask(branch, dtype))


def unpack(hidden: Tensor, layout: TreeLayout) -> Tensor:
    """(U, S, D) to (B, T, D)."""
    at = layout.owner[:, None] * layout.width + layout.columns
    return hidden.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)


def _mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """(U, S) to (U, 1, S, S): 0 where the token of the row sees that of the column. Padding sees padding."""
    of_query, of_key = branch[:, :, None], branch[:, None]
    sees = ((of_key == 0) | (of_key == of_query)).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def distinct_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P) prompts → the first row of each run of equal ones (U,), and each row's run (B,)."""
    same = ((prompt_ids[1:] == prompt_ids[:-1]) | ~prompt_mask[1:]) & (prompt_mask[1:] == prompt_mask[:-1])
    new = torch.cat([same.new_ones(1), ~same.all(dim=1)])
    return new.nonzero().squeeze(1), new.long().cumsum(0) - 1
