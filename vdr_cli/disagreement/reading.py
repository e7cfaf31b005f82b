"""Hidden states of the members over completions: the passes, each as small as its purpose allows.

A member is a fixed sub-network, so a prompt's keys and values are the same for all completions of its group:
prompts run first, one row a group, and completions follow against what was kept. With scope last_k the layers
below the members' run once, undropped, for all members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import ensemble, evaluating, first_layer, hooked
from vdr_cli.disagreement.masks import EnsembleSpec, prompt_keys, row_keys
from vdr_cli.disagreement.prefix import PrefixCache, shares_prompts
from vdr_cli.models import anatomy
from vdr_cli.rollout.base import Completions


@dataclass(frozen=True)
class Batch:
    """Groups, or a part of one, and the positions whose hidden states are wanted."""

    completions: Completions  # B rows, group-major
    group_size: int  # rows of each group in this batch
    rows: Tensor  # (N,) row of each wanted position
    tokens: Tensor  # (N,) completion token t that it predicts
    one_a_row: bool
    """At most one position of a row is wanted."""


@dataclass(frozen=True)
class Pass:
    """One forward of the trunk over R rows of W new tokens, K tokens being visible."""

    ids: Tensor  # (R, W)
    mask: Tensor  # (R, K)
    positions: Tensor  # (R, W)
    keys: Callable[[], list[str]]
    """Of the rows, for masks drawn per token."""
    column: Tensor | None
    """(R,) the only column of each row whose state is wanted; None: any."""


def prompt_pass(batch: Batch) -> Pass:
    """Every prompt once; wanted is its last token, which predicts the first one of the completions."""
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


def _keys(c: Completions) -> list[str]:
    return row_keys(c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask)


def _only_column(batch: Batch) -> Tensor | None:
    if not batch.one_a_row:
        return None
    column = torch.zeros(len(batch.completions), dtype=torch.int64, device=batch.rows.device)
    column[batch.rows] = (batch.tokens - 1).clamp_min(0)
    return column


@dataclass(frozen=True)
class Stem:
    """What the layers below the members' give, the same for all members."""

    hidden: Tensor  # (R, W, D)
    others: int | None
    """Layers return a tuple with this many entries after the hidden state; None: the hidden state alone."""


@dataclass(frozen=True)
class Reading:
    """What is needed to read a batch with any members: its passes, and what enters their first layer in each."""

    model: nn.Module
    spec: EnsembleSpec
    step: int
    batch: Batch
    passes: tuple[Pass, ...]
    stems: tuple[Stem, ...]
    """Of each pass; empty when members differ from the first layer on."""

    @torch.no_grad()
    def states(self, members: Sequence[int]) -> Tensor:
        """(m, N, D) hidden states after the final norm at the wanted positions."""
        batch, count = self.batch, len(members)
        with ensemble(self.model, self.spec, self.step, members) as active:
            cache = self.new_cache()
            outputs = []
            for number, each in enumerate(self.passes):
                if self.spec.mask_sharing == "token":
                    active.keys = each.keys()
                active.positions = each.positions, anatomy.position_ids(each.mask)
                stem = self.stems[number] if self.stems else None
                hidden = self.run(each, cache, count, stem)
                outputs.append(hidden.view(count, -1, *hidden.shape[1:]))  # (m, R, W, D)
                _prompt_is_read(cache, each)
        if len(self.passes) == 1:
            first_column = outputs[0].shape[2] - batch.completions.completion_ids.shape[1]
            return outputs[0][:, batch.rows, first_column + batch.tokens]
        return _gathered(outputs[0][:, :, -1], outputs[1], batch)

    def run(self, each: Pass, cache: PrefixCache | None, count: int, stem: Stem | None) -> Tensor:
        """(count · R, W, D): one pass of the trunk with every row repeated for every member."""
        layers = anatomy.decoder_layers(self.model)
        mask, positions = each.mask.repeat(count, 1), each.positions.repeat(count, 1)
        arguments = anatomy.forward_arguments(self.model, mask, positions)
        with ExitStack() as context:
            if stem is not None:
                below = layers[: first_layer(len(layers), self.spec)]
                context.enter_context(skipping(below, stem, count))
            if each.column is not None and self.spec.mask_sharing == "member":
                _, mlp = anatomy.residual_blocks(layers[-1], self.spec.block_names)
                context.enter_context(only_at(mlp, each.column.repeat(count)))
            ids = each.ids.repeat(count, 1)
            return anatomy.backbone(self.model)(
                input_ids=ids, **arguments, past_key_values=cache, use_cache=cache is not None
            )[0]

    def new_cache(self) -> PrefixCache | None:
        return PrefixCache(len(anatomy.decoder_layers(self.model))) if len(self.passes) == 2 else None


def prepare(model: nn.Module, spec: EnsembleSpec, step: int, batch: Batch) -> Reading:
    """Choose the passes and, with scope last_k, run the layers that all members share."""
    if not shares_prompts(model):
        passes: tuple[Pass, ...] = (whole_pass(batch),)
    elif batch.completions.completion_ids.shape[1] == 1:
        passes = (prompt_pass(batch),)
    else:
        passes = (prompt_pass(batch), completion_pass(batch))
    reading = Reading(model, spec, step, batch, passes, ())
    layers = anatomy.decoder_layers(model)
    first = first_layer(len(layers), spec)
    if first == 0:
        return reading
    cache = reading.new_cache()
    stems = []
    with torch.no_grad(), evaluating(model):
        for each in passes:
            stems.append(entering(layers, first, partial(reading.run, each, cache, 1, None)))
            _prompt_is_read(cache, each)
    return Reading(model, spec, step, batch, passes, tuple(stems))


def _prompt_is_read(cache: PrefixCache | None, each: Pass) -> None:
    if cache is not None and cache.prompt_width is None:
        cache.prompt_width = each.ids.shape[1]


def _gathered(at_prompt_end: Tensor, read: Tensor, batch: Batch) -> Tensor:
    """(m, N, D) from (m, prompts, D) and (m, B, T-1, D): token 0 is predicted by the prompt, t by completion t-1."""
    later = batch.tokens > 0
    states = read[:, batch.rows, (batch.tokens - 1).clamp_min(0)]
    states[:, ~later] = at_prompt_end[:, batch.rows[~later] // batch.group_size]
    return states


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Carries what enters a layer out of a forward that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def entering(layers: Sequence[nn.Module], number: int, forward: Callable[[], object]) -> Stem:
    """What enters layer `number` >= 1 when `forward` runs; the layers from there on do not run."""
    others: list[int | None] = []

    def look(module: nn.Module, arguments: object, output: object) -> None:
        others.append(len(output) - 1 if isinstance(output, tuple) else None)

    def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise _Reached(arguments[0] if arguments else keywords["hidden_states"])

    with (
        hooked(layers[0].register_forward_hook, look),
        hooked(layers[number].register_forward_pre_hook, stop, with_kwargs=True),
    ):
        try:
            forward()
        except _Reached as reached:
            return Stem(reached.hidden, others[0])
    raise RuntimeError(f"{type(layers[number]).__name__} {number} did not run: its model has another order of layers")


@contextmanager
def skipping(layers: Sequence[nn.Module], stem: Stem, count: int) -> Iterator[None]:
    """Inside the block these layers do nothing, and the stem leaves them, once for each of `count` members.

    The model's own forward runs on, so masks, positions and whatever else it prepares fit the larger batch.
    """
    hidden = stem.hidden.repeat(count, 1, 1)
    output = hidden if stem.others is None else (hidden, *[None] * stem.others)
    saved = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = lambda *arguments, **keywords: output
        yield
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@contextmanager
def only_at(mlp: nn.Module, column: Tensor) -> Iterator[None]:
    """Inside the block an MLP reads one column of each row and gives 0 elsewhere.

    For the last layer, whose output at the other positions nobody needs: the MLP works on each position alone.
    """
    full: list[torch.Size] = []

    def narrow(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        full.clear()
        if not arguments or arguments[0].ndim != 3:
            return None
        full.append(arguments[0].shape)
        rows = torch.arange(len(column), device=column.device)
        return (arguments[0][rows, column].unsqueeze(1), *arguments[1:])

    def widen(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if not full:
            return None
        branch = output[0] if isinstance(output, tuple) else output
        wide = branch.new_zeros(*full[0][:2], branch.shape[-1])
        wide[torch.arange(len(column), device=column.device), column] = branch.view(len(column), -1)
        return (wide, *output[1:]) if isinstance(output, tuple) else wide

    with hooked(mlp.register_forward_pre_hook, narrow), hooked(mlp.register_forward_hook, widen):
        yield
