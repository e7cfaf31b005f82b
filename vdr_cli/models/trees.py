"""A prompt and all its completions as one row: every layer is called once, and reads the prompt once.

The mask lets a completion see its prompt and itself, not its neighbours. Attention goes through the scores between
neighbours all the same, so this pays where the completions of a prompt are short (`plan.TREE_TOKENS`).
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.prefix import shares_prompts
from vdr_cli.models import anatomy

FULL_ATTENTION = frozenset({"full_attention", "attention"})
"""Entries of a configuration's layer_types that see all tokens before theirs."""


class Trees(NamedTuple):
    """Rows of prompts and completions, folded by prompt: U prompts, c places for completions of T tokens."""

    ids: Tensor  # (U, P + c·T)
    mask: Tensor  # (U, 1, P + c·T, P + c·T), what attention adds to its scores
    positions: Tensor  # (U, P + c·T)


class Places(NamedTuple):
    """Where each of B completions is: which tree of U, and which place of all U·c."""

    firsts: Tensor  # (U,) the first row of each prompt
    owner: Tensor  # (B,)
    place: Tensor  # (B,)
    c: int


def can_read_trees(causal_lm: nn.Module) -> bool:
    """Whether the model takes a mask of any shape as it is, and positions beside it, in every layer."""
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
    """(B, T, D): the hidden states that produced each completion token. Always one pass, whatever the batch.

    Nothing is read off the last token, so it is left out; a completion of one token is read in vain.
    """
    P, T = prompt_ids.shape[1], completion_ids.shape[1]
    read = max(T - 1, 1)
    dtype = anatomy.output_head(causal_lm).weight.dtype
    places = places_of(prompt_ids, prompt_mask)
    trees = folded(prompt_ids, prompt_mask, completion_ids[:, :read], places, dtype)
    arguments = {"attention_mask": trees.mask, "position_ids": trees.positions}
    hidden = anatomy.backbone(causal_lm)(input_ids=trees.ids, use_cache=False, **arguments)[0]
    first = hidden[:, P - 1].index_select(0, places.owner)[:, None]  # (B, 1, D)
    others = unfolded(hidden[:, P:], places)  # (B, T', D)
    return torch.cat([first, others[:, : T - 1]], dim=1)


def places_of(prompt_ids: Tensor, prompt_mask: Tensor) -> Places:
    """Rows (B, P) with the same prompt, next to each other, become one tree; c is the largest tree's number of them."""
    firsts, owner = distinct_prompts(prompt_ids, prompt_mask)
    rank = torch.arange(len(owner), device=owner.device) - firsts[owner]
    c = int(rank.max()) + 1
    return Places(firsts, owner, owner * c + rank, c)


def unfolded(branches: Tensor, places: Places) -> Tensor:
    """(U, c·T, D) to (B, T, D)."""
    return branches.unflatten(1, (places.c, -1)).flatten(0, 1).index_select(0, places.place)


def folded(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, places: Places, dtype: torch.dtype
) -> Trees:
    """prompts (B, P), completions (B, T); places that no completion takes hold token 0."""
    U, c, T = len(places.firsts), places.c, completion_ids.shape[1]
    completions = completion_ids.new_zeros(U * c, T).index_copy(0, places.place, completion_ids).view(U, c * T)
    prompts = prompt_mask[places.firsts]
    after = prompts.sum(1, keepdim=True) + torch.arange(T, device=prompts.device).repeat(c)  # (U, c·T)
    return Trees(
        torch.cat([prompt_ids[places.firsts], completions], dim=1),
        _mask(prompts, c, T, dtype),
        torch.cat([anatomy.position_ids(prompts), after], dim=1),
    )


def _mask(prompts: Tensor, c: int, T: int, dtype: torch.dtype) -> Tensor:
    """(U, P) to (U, 1, S, S): 0 where the token of the row sees that of the column. Padding sees itself alone."""
    branch = torch.arange(1, c + 1, device=prompts.device).repeat_interleave(T)
    branch = torch.cat([branch.new_zeros(prompts.shape[1]), branch])  # (S,), 0 in the prompt
    before = torch.ones(len(branch), len(branch), dtype=torch.bool, device=prompts.device).tril()
    sees = before & ((branch == 0) | (branch == branch[:, None]))
    real = torch.cat([prompts, prompts.new_ones(len(prompts), c * T)], dim=1)
    itself = torch.eye(len(branch), dtype=torch.bool, device=prompts.device)
    hidden = ~(sees & real[:, None] | itself)
    return torch.zeros(hidden.shape, dtype=dtype, device=prompts.device).masked_fill_(hidden, torch.finfo(dtype).min)[
        :, None
    ]


def distinct_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P) prompts → the first row of each run of equal ones (U,), and each row's run (B,)."""
    same = ((prompt_ids[1:] == prompt_ids[:-1]) | ~prompt_mask[1:]) & (prompt_mask[1:] == prompt_mask[:-1])
    new = torch.cat([same.new_ones(1), ~same.all(dim=1)])
    return new.nonzero().squeeze(1), new.long().cumsum(0) - 1
