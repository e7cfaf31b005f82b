"""Hidden states of the members over completions: the passes, each as small as its purpose allows.

A member is a fixed sub-network, so a prompt's keys and values are the same for all completions of its group:
prompts run first, one row a group, and completions follow against what was kept. With scope last_k the layers
below the members' run once, undropped, for all members.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import Members, ensemble, evaluating, first_layer, hooked
from vdr_cli.disagreement.masks import EnsembleSpec, prompt_keys, row_keys
from vdr_cli.models import anatomy
from vdr_cli.models.prefix import PrefixCache, shares_prompts
from vdr_cli.samples import Completions


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
    """What the layers below one give: with scope last_k the same for all members."""

    hidden: Tensor  # (R, W, D)
    others: int | None
    """Layers return a tuple with this many entries after the hidden state; None: the hidden state alone."""
    layer: int
    """The number of the layer that it enters."""


@dataclass(frozen=True)
class Reading:
    """What is needed to read a batch with any members: its passes, and what enters their first layer in each."""

    model: nn.Module
    spec: EnsembleSpec
    step: int
    batch: Batch
    passes: tuple[Pass, ...]
    stems: tuple[Stem, ...]
    """Of each pass; empty when no layer has run yet. Of R rows, or of R rows for every member."""

    @torch.no_grad()
    def states(self, members: Sequence[int]) -> Tensor:
        """(m, N, D) hidden states of these members after the final norm at the wanted positions."""
        with ensemble(self.model, self.spec, self.step, members) as active:
            return self.wanted(len(members), active)

    def wanted(self, count: int, active: Members | None = None) -> Tensor:
        """(m, N, D) where every row stands once for each of `count` members."""
        cache = self.new_cache()
        outputs = []
        for number, each in enumerate(self.passes):
            hidden = self.run(number, cache, count, active)
            outputs.append(hidden.view(count, -1, *hidden.shape[1:]))  # (m, R, W, D)
            _prompt_is_read(cache, each)
        if len(self.passes) == 1:
            rows_each = len(self.batch.completions) // outputs[0].shape[1]  # G where prompts alone are read
            first_column = outputs[0].shape[2] - self.batch.completions.completion_ids.shape[1]
            return outputs[0][:, self.batch.rows // rows_each, first_column + self.batch.tokens]
        return _gathered(outputs[0][:, :, -1], outputs[1], self.batch)

    def through(self, layer: int, count: int, active: Members | None = None) -> tuple[Stem, ...]:
        """Of each pass, what leaves this layer; the layers above it do not run, nor those below the stems'."""
        layers = anatomy.decoder_layers(self.model)
        cache = self.new_cache()
        stems = []
        for number, each in enumerate(self.passes):
            stems.append(leaving(layers, layer, partial(self.run, number, cache, count, active)))
            _prompt_is_read(cache, each)
        return tuple(stems)

    def run(self, number: int, cache: PrefixCache | None, count: int, active: Members | None) -> Tensor:
        """(count · R, W, D): one pass of the trunk with every row repeated for every member."""
        each, layers = self.passes[number], anatomy.decoder_layers(self.model)
        mask, positions = each.mask.repeat(count, 1), each.positions.repeat(count, 1)
        arguments = anatomy.forward_arguments(self.model, mask, positions)
        if active is not None:
            active.keys = each.keys() if self.spec.mask_sharing == "token" else []
            active.positions = each.positions, anatomy.position_ids(each.mask)
        with ExitStack() as context:
            if self.stems:
                context.enter_context(skipping(layers, self.stems[number], len(mask)))
            if each.column is not None and self.spec.mask_sharing == "member":
                _, mlp = anatomy.residual_blocks(layers[-1], self.spec.block_names)
                context.enter_context(only_at(mlp, each.column.repeat(count)))
            shared = self.shared_attention(count) if active is not None else None
            if shared is not None:
                context.enter_context(for_one(shared, count))
            arguments |= anatomy.cache_arguments(self.model, cache)
            hidden: Tensor = anatomy.backbone(self.model)(input_ids=each.ids.repeat(count, 1), **arguments)[0]
            return hidden

    def shared_attention(self, count: int) -> nn.Module | None:
        """The attention of the first layer that members differ in, where all give it the same input: masks come after.

        None where that is not so or where `for_one` could not tell rows from positions or heads.
        """
        layers = anatomy.decoder_layers(self.model)
        first = first_layer(len(layers), self.spec)
        if count == 1 or self.spec.site != "residual" or first != (self.stems[0].layer if self.stems else 0):
            return None
        attention, _ = anatomy.residual_blocks(layers[first], self.spec.block_names)
        biased = {"alibi", "position_bias"} & set(inspect.signature(attention.forward).parameters)
        if biased or any(count * len(each.ids) == each.ids.shape[1] for each in self.passes):
            return None
        return attention

    def new_cache(self) -> PrefixCache | None:
        return PrefixCache(len(anatomy.decoder_layers(self.model))) if len(self.passes) == 2 else None


def passes_of(model: nn.Module, batch: Batch) -> tuple[Pass, ...]:
    """The forwards that read a batch."""
    if not shares_prompts(model):
        return (whole_pass(batch),)
    if batch.completions.completion_ids.shape[1] == 1:
        return (prompt_pass(batch),)
    return prompt_pass(batch), completion_pass(batch)


@torch.no_grad()
def prepare(model: nn.Module, spec: EnsembleSpec, step: int, batch: Batch, stems: tuple[Stem, ...] = ()) -> Reading:
    """Choose the passes and, with scope last_k, run the layers that all members share, unless their stems are known."""
    reading = Reading(model, spec, step, batch, passes_of(model, batch), stems)
    first = first_layer(len(anatomy.decoder_layers(model)), spec)
    if first == 0 or stems:
        return reading
    with evaluating(model):
        return replace(reading, stems=reading.through(first - 1, 1))


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
    """Carries what leaves a layer out of a forward that need not go on."""

    def __init__(self, stem: Stem) -> None:
        self.stem = stem


def leaving(layers: Sequence[nn.Module], number: int, forward: Callable[[], object]) -> Stem:
    """What leaves layer `number` when `forward` runs; the layers above it do not run."""

    def stop(module: nn.Module, arguments: object, output: Any) -> None:
        if isinstance(output, tuple):
            raise _Reached(Stem(output[0], len(output) - 1, number + 1))
        raise _Reached(Stem(output, None, number + 1))

    with hooked(layers[number].register_forward_hook, stop):
        try:
            forward()
        except _Reached as reached:
            return reached.stem
    raise RuntimeError(f"{type(layers[number]).__name__} {number} did not run: its model has another order of layers")


@contextmanager
def skipping(layers: Sequence[nn.Module], stem: Stem, rows: int) -> Iterator[None]:
    """Inside the block the layers below the stem's do nothing, and the stem leaves them, repeated to `rows` rows.

    The model's own forward runs on, so masks, positions and whatever else it prepares fit the larger batch.
    """
    hidden = stem.hidden.repeat(rows // len(stem.hidden), 1, 1)
    output = hidden if stem.others is None else (hidden, *[None] * stem.others)
    below = layers[: stem.layer]
    saved = [layer.__dict__.get("forward") for layer in below]
    try:
        for layer in below:
            layer.forward = lambda *arguments, **keywords: output
        yield
    finally:
        for layer, forward in zip(below, saved, strict=True):
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


@contextmanager
def for_one(block: nn.Module, count: int) -> Iterator[None]:
    """Inside the block, one that gets the same input for each of `count` members runs for the first of them alone.

    What it writes into a cache is then of one member too, which the cache joins with completions of one member.
    """
    saved = block.__dict__.get("forward")
    forward = block.forward

    def run(*arguments: Any, **keywords: Any) -> Any:
        rows = len(arguments[0] if arguments else keywords["hidden_states"])
        first = partial(_first_rows, rows=rows, kept=rows // count)
        output = forward(*map(first, arguments), **{name: first(value) for name, value in keywords.items()})
        if isinstance(output, tuple):
            return (_repeated(output[0], count), *output[1:])
        return _repeated(output, count)

    block.forward = run
    try:
        yield
    finally:
        if saved is None:
            del block.forward
        else:
            block.forward = saved


def _first_rows(value: Any, rows: int, kept: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_first_rows(each, rows, kept) for each in value)
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows:
        return value[:kept]
    return value


def _repeated(branch: Tensor, count: int) -> Tensor:
    return branch.repeat(count, *[1] * (branch.ndim - 1))
