"""Members' hidden states over completions: the forward passes, each as small as its purpose allows.

A member is a fixed sub-network, so a prompt's keys and values are the same for all completions of its group:
prompts run first, one row per group, and completions follow against the kept keys and values. With scope last_k the
layers below the members' run once, undropped, for all members.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import Members, first_layer
from vdr_cli.disagreement.layer_calls import (
    mlp_at_one_column,
    run_once_for_all_members,
    run_up_to,
    starting_from,
)
from vdr_cli.disagreement.lower_states import LowerStates
from vdr_cli.disagreement.masks import EnsembleSpec, prompt_keys, row_keys
from vdr_cli.models import anatomy
from vdr_cli.models.packed_rows import packed_rows
from vdr_cli.models.prefix import PrefixCache, RepeatedPrompts, shares_prompts
from vdr_cli.samples import Completions


class RowDivision(Protocol):
    """Ranks that read the same rows together, each its part of the columns. Every rank makes the same forwards."""

    size: int
    rank: int
    """This rank's number in the group."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank, in rank order. Collective in the group."""
        ...

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the group. Collective in it."""
        ...

    def attention_of(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the model's attention sees whole rows."""
        ...


@dataclass(frozen=True)
class Batch:
    """Whole groups, or a part of one, and the positions whose hidden states are wanted."""

    completions: Completions  # B rows, group-major
    group_size: int  # rows of each group in this batch
    rows: Tensor  # (N,) int64, row of each wanted position
    tokens: Tensor  # (N,) int64, completion token t that it predicts
    one_a_row: bool
    """At most one position per row is wanted."""


@dataclass(frozen=True)
class Pass:
    """One forward of the trunk over R rows of W new tokens, K tokens being visible."""

    ids: Tensor  # (R, W) int64
    mask: Tensor  # (R, K) bool
    positions: Tensor  # (R, W) int64
    keys: Callable[[], list[str]]
    """Makes a key for each row, for masks drawn per token."""
    column: Tensor | None
    """(R,) int64, the only column of each row whose state is wanted; None: any."""
    columns: Tensor | None = None
    """(R, T) int64, the column of this rank's part that predicts each completion token; None: rows are whole."""


def prompt_pass(batch: Batch) -> Pass:
    """Every prompt once; its last token predicts the first one of its completions."""
    c = batch.completions
    ids, mask = c.prompt_ids[:: batch.group_size], c.prompt_mask[:: batch.group_size]
    last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
    return Pass(ids, mask, anatomy.position_ids(mask), lambda: prompt_keys(ids, mask), last)


def completion_pass(batch: Batch) -> Pass:
    """Every completion without its last column, which predicts nothing.

    Its padding lies right of every valid token, where causal attention never looks: the mask need not name it.
    """
    c = batch.completions
    ids = c.completion_ids[:, :-1]
    mask = torch.cat([c.prompt_mask, torch.ones_like(ids, dtype=torch.bool)], 1)
    positions = anatomy.position_ids(mask)[:, c.prompt_ids.shape[1] :]
    return Pass(ids, mask, positions, lambda: _keys(c), _only_column(batch))


def whole_pass(batch: Batch) -> Pass:
    """Prompt and completion together, for models that remember more of a prompt than keys and values."""
    c = batch.completions
    ids = torch.cat([c.prompt_ids, c.completion_ids[:, :-1]], 1)
    mask = torch.cat([c.prompt_mask, torch.ones_like(c.completion_mask[:, :-1])], 1)
    return Pass(ids, mask, anatomy.position_ids(mask), lambda: _keys(c), None)


def divided_pass(batch: Batch, division: RowDivision) -> Pass:
    """This rank's columns of every prompt with its completion; attention sees the whole rows (`RowDivision`)."""
    c = batch.completions
    rows = packed_rows(c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask, division.size)
    own = rows.part(division.rank, division.size)
    mask = torch.ones_like(own.ids, dtype=torch.bool)
    return Pass(own.ids, mask, own.positions, lambda: _keys(c), None, own.columns)


def of_this_rank(batch: Batch, own: Pass) -> Batch:
    """The batch with those wanted positions alone that a divided pass reads."""
    assert own.columns is not None
    columns = own.columns[batch.rows, batch.tokens]
    kept = (columns >= 0) & (columns < own.ids.shape[1])
    return replace(batch, rows=batch.rows[kept], tokens=batch.tokens[kept])


def _keys(c: Completions) -> list[str]:
    return row_keys(c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask)


def _only_column(batch: Batch) -> Tensor | None:
    if not batch.one_a_row:
        return None
    column = torch.zeros(len(batch.completions), dtype=torch.int64, device=batch.rows.device)
    column[batch.rows] = (batch.tokens - 1).clamp_min(0)
    return column


def passes_of(model: nn.Module, batch: Batch) -> tuple[Pass, ...]:
    """The forwards that read a batch."""
    if not shares_prompts(model):
        return (whole_pass(batch),)
    if batch.completions.completion_ids.shape[1] == 1:
        return (prompt_pass(batch),)
    return prompt_pass(batch), completion_pass(batch)


@dataclass(frozen=True)
class Reading:
    """A batch on its way through the model: its passes, and the states that enter the next layer in each."""

    model: nn.Module
    spec: EnsembleSpec
    step: int
    batch: Batch
    passes: tuple[Pass, ...]
    states: tuple[LowerStates, ...] = ()
    """One per pass, with R rows or R rows for every member; empty before the first layer."""

    def wanted(self, count: int, active: Members | None = None) -> Tensor:
        """(m, N, D) states after the final norm at the wanted positions, in the model's dtype; m = count."""
        cache = self._new_cache()
        outputs = []
        for number, each in enumerate(self.passes):
            hidden = self._run(number, cache, count, active)
            outputs.append(hidden.view(count, -1, *hidden.shape[1:]))  # (m, R, W, D)
            _prompt_is_read(cache, each)
        if (columns := self.passes[0].columns) is not None:
            return outputs[0][:, self.batch.rows, columns[self.batch.rows, self.batch.tokens]]
        if len(self.passes) == 1:
            rows_each = len(self.batch.completions) // outputs[0].shape[1]  # G where prompts alone are read
            first_column = outputs[0].shape[2] - self.batch.completions.completion_ids.shape[1]
            return outputs[0][:, self.batch.rows // rows_each, first_column + self.batch.tokens]
        return _gathered(outputs[0][:, :, -1], outputs[1], self.batch)

    def through(self, layer: int, count: int, active: Members | None = None) -> tuple[LowerStates, ...]:
        """Each pass's output of this layer. Layers above it do not run, nor those below `states`."""
        layers = anatomy.decoder_layers(self.model)
        cache = self._new_cache()
        found = []
        for number, each in enumerate(self.passes):
            found.append(run_up_to(layers, layer, partial(self._run, number, cache, count, active)))
            _prompt_is_read(cache, each)
        return tuple(found)

    def _run(self, number: int, cache: PrefixCache | None, count: int, active: Members | None) -> Tensor:
        """(count · R, W, D): one pass of the trunk with every row repeated for every member."""
        each, layers = self.passes[number], anatomy.decoder_layers(self.model)
        mask, positions = each.mask.repeat(count, 1), each.positions.repeat(count, 1)
        arguments = anatomy.forward_arguments(self.model, mask, positions)
        if active is not None:
            active.keys = each.keys() if self.spec.mask_sharing == "token" else []
            active.positions = each.positions, anatomy.position_ids(each.mask)
        with ExitStack() as context:
            if self.states:
                context.enter_context(starting_from(layers, self.states[number], len(mask)))
            if each.column is not None and self.spec.mask_sharing == "member":
                for mlp in anatomy.residual_blocks(layers[-1], self.spec.block_names)[1:]:
                    context.enter_context(mlp_at_one_column(mlp, each.column.repeat(count)))
            shared = self.shared_attention(count) if active is not None else None
            if shared is not None:
                context.enter_context(run_once_for_all_members(shared, count))
            arguments |= anatomy.cache_arguments(self.model, cache)
            hidden: Tensor = anatomy.backbone(self.model)(input_ids=each.ids.repeat(count, 1), **arguments)[0]
            return hidden

    def shared_attention(self, count: int) -> nn.Module | None:
        """The attention of the first layer that members differ in: all give it the same input, masks act after it.

        None where that is not so, or where `run_once_for_all_members` could not tell rows from positions or heads.
        """
        layers = anatomy.decoder_layers(self.model)
        first = first_layer(len(layers), self.spec)
        if count == 1 or first != (self.states[0].layer if self.states else 0):
            return None
        attention = anatomy.residual_blocks(layers[first], self.spec.block_names)[0]
        biased = {"alibi", "position_bias"} & set(inspect.signature(attention.forward).parameters)
        if biased or any(count * len(each.ids) == each.ids.shape[1] for each in self.passes):
            return None
        return attention

    def _new_cache(self) -> PrefixCache | None:
        if len(self.passes) != 2:
            return None
        return PrefixCache(len(anatomy.decoder_layers(self.model)), RepeatedPrompts())


def _prompt_is_read(cache: PrefixCache | None, each: Pass) -> None:
    if cache is not None and cache.prompts.width is None:
        cache.prompts.width = each.ids.shape[1]


def _gathered(at_prompt_end: Tensor, read: Tensor, batch: Batch) -> Tensor:
    """(m, N, D) from (m, prompts, D) and (m, B, T-1, D): token 0 is predicted by the prompt, t by completion t-1."""
    later = batch.tokens > 0
    states = read[:, batch.rows, (batch.tokens - 1).clamp_min(0)]
    states[:, ~later] = at_prompt_end[:, batch.rows[~later] // batch.group_size]
    return states
