"""Layer-major reading: all rows and members go through a layer before the next layer is looked at.

For models of which no full copy fits on a device: a layer is gathered once, whatever M and however many pieces the
memory asks for, so the ensemble costs one gather of the model. What it holds instead is a hidden state of every token
and member, M·tokens·D. For each layer the model's own forward runs, with the layers below it replaced by what they
gave and those above it left out, so masks and positions are the architecture's own.

Ranks gather in step. Inside a layer there is no collective: every rank splits its own rows as its memory asks, and one
that fails goes on gathering with the others and raises at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import ensemble, evaluating, first_layer
from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import (
    Results,
    batch_of,
    check_groups,
    default_budget,
    logits_budget,
    out_of_memory,
    plan,
    too_little_memory,
)
from vdr_cli.disagreement.reading import Batch, Reading, passes_of
from vdr_cli.errors import ConfigError
from vdr_cli.models import anatomy
from vdr_cli.models.anatomy import Lend
from vdr_cli.models.prefix import layers_stand_alone
from vdr_cli.samples import Completions, last_tokens

Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """Some rows as some members read them, between two layers."""

    reading: Reading
    """Its stems are what left the layer below; none before layer 0."""
    first_row: int
    """Of the rank's completions, the one that the batch begins with."""
    together: int
    """Members at once, from where they differ."""
    members: range | None = None
    """None below the layer in which members begin to differ."""

    @property
    def count(self) -> int:
        return 1 if self.members is None else len(self.members)

    def through(self, layer: int) -> Piece:
        """The same piece above this layer."""
        reading = self.reading
        if self.members is None:
            with evaluating(reading.model):
                return self._with(stems=reading.through(layer, 1))
        with ensemble(reading.model, reading.spec, reading.step, self.members, layer) as active:
            return self._with(stems=reading.through(layer, self.count, active))

    def states(self) -> Tensor:
        """(m, N, D) after the final norm, all layers being done."""
        with evaluating(self.reading.model):
            return self.reading.wanted(self.count)

    def of_members(self) -> list[Piece]:
        """From where members differ: a piece for every so many of them, which share what the layers below gave."""
        everyone, size = range(self.reading.spec.members), self.together
        return [replace(self, members=everyone[at : at + size]) for at in range(0, len(everyone), size)]

    def halves(self) -> list[Piece]:
        """Half the members each; of one member half the rows; of one row MachineError."""
        batch = self.reading.batch
        rows = len(batch.completions)
        if self.members is not None and self.count > 1:
            middle = self.count // 2
            return [self._of_some(0, middle), self._of_some(middle, self.count)]
        if rows == 1:
            raise too_little_memory()
        groups = rows // batch.group_size
        middle = groups // 2 * batch.group_size if groups > 1 else rows // 2
        return [self._of_rows(0, middle), self._of_rows(middle, rows)]

    def _with(self, **changes: Any) -> Piece:
        return replace(self, reading=replace(self.reading, **changes))

    def _of_some(self, start: int, stop: int) -> Piece:
        assert self.members is not None
        stems = []
        for stem, each in zip(self.reading.stems, self.reading.passes, strict=False):  # no stems before layer 0
            rows = len(each.ids)
            shared = len(stem.hidden) == rows
            stems.append(stem if shared else replace(stem, hidden=stem.hidden[start * rows : stop * rows]))
        return replace(self._with(stems=tuple(stems)), members=self.members[start:stop])

    def _of_rows(self, start: int, stop: int) -> Piece:
        whole = self.reading.batch
        size = whole.group_size
        mine = (whole.rows >= start) & (whole.rows < stop)
        part = whole.completions.rows(slice(start, stop))
        batch = Batch(part, min(size, len(part)), whole.rows[mine] - start, whole.tokens[mine], whole.one_a_row)
        stems = []
        for stem in self.reading.stems:
            a_completion_each = len(stem.hidden) == len(whole.completions)
            of = slice(start, stop) if a_completion_each else slice(start // size, -(-stop // size))
            stems.append(replace(stem, hidden=stem.hidden[of]))
        divided = self._with(batch=batch, passes=passes_of(self.reading.model, batch), stems=tuple(stems))
        return replace(divided, first_row=self.first_row + start)


@torch.no_grad()
def measure_by_layers(
    model: nn.Module,
    lend: Lend,
    completions: Completions,
    group_size: int,
    spec: EnsembleSpec,
    step: int,
    positions: Literal["all", "last"] = "all",
    measures: Collection[str] = ("bald",),
    budget: int | None = None,
    last_n: int | None = None,
) -> Statistics:
    """`members.measure` with one decoder layer whole at a time; the rest of the model is whole all along.

    Collective: every rank enters lend(0), lend(1), ... once, whatever its rows, its memory and its errors.
    """
    if not layers_stand_alone(model):
        raise ConfigError(
            f"engine.copy_of_weights: layers of {type(anatomy.unwrapped(model)).__name__} use each other's keys, so "
            "they cannot be read one by one; set it to whole, or disagreement.mode to none"
        )
    wanted = last_tokens(completions.completion_mask, 1 if positions == "last" else last_n)  # (B, T)
    count = len(anatomy.decoder_layers(model))
    first = first_layer(count, spec)
    pieces: list[Piece] = []
    error: Exception | None = None
    for layer in range(count):
        with lend(layer):
            try:
                if layer == 0:
                    budget = budget or default_budget(model, completions, group_size)
                    pieces = _pieces(model, completions, group_size, spec, step, wanted, positions == "last", budget)
                if layer == first:
                    pieces = [part for piece in pieces for part in piece.of_members()]
                if error is None:
                    pieces = _split_until_they_fit(pieces, partial(Piece.through, layer=layer))
            except Exception as raised:  # the others wait for this rank in the next layer
                error = raised
    if error is not None:
        raise error
    try:
        return _finished(model, completions, spec, wanted, positions, frozenset(measures), pieces, budget or 0)
    except RuntimeError as fault:
        if not out_of_memory(fault):
            raise
        raise too_little_memory() from fault


def _pieces(
    model: nn.Module,
    completions: Completions,
    group_size: int,
    spec: EnsembleSpec,
    step: int,
    wanted: Tensor,
    one_a_row: bool,
    budget: int,
) -> list[Piece]:
    """The rank's rows, as many at once as the budget allows."""
    check_groups(completions, group_size)
    pieces = []
    for rows, together in plan(model, completions, group_size, spec.members, budget):
        batch = batch_of(completions, rows, group_size, wanted, one_a_row)
        if len(batch.rows):
            reading = Reading(model, spec, step, batch, passes_of(model, batch), ())
            pieces.append(Piece(reading, rows.start, together))
    return pieces


def _split_until_they_fit(pieces: list[Piece], work: Callable[[Piece], Result]) -> list[Result]:
    """work(piece) for each; one that runs out of memory is halved and tried again."""
    waiting, done = pieces[::-1], []
    while waiting:
        piece = waiting.pop()
        try:
            done.append(work(piece))
            continue
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        waiting.extend(piece.halves()[::-1])
        if piece.reading.batch.completions.prompt_ids.is_cuda:
            torch.cuda.empty_cache()
    return done


def _finished(
    model: nn.Module,
    completions: Completions,
    spec: EnsembleSpec,
    wanted: Tensor,
    positions: str,
    measures: frozenset[str],
    pieces: list[Piece],
    budget: int,
) -> Statistics:
    """The measures, from pieces that every layer has read."""
    rows, tokens = wanted.nonzero(as_tuple=True)
    number = torch.zeros_like(wanted, dtype=torch.int64)
    number[rows, tokens] = torch.arange(len(rows), device=rows.device)  # of each wanted position
    head = anatomy.output_head(model)
    hidden = torch.empty(0)
    for piece, states in _split_until_they_fit(pieces, lambda piece: (piece, piece.states())):
        if not len(hidden):
            hidden = states.new_empty(spec.members, len(rows), states.shape[-1])
        batch = piece.reading.batch
        assert piece.members is not None
        hidden[piece.members.start : piece.members.stop, number[piece.first_row + batch.rows, batch.tokens]] = states
    results = Results(completions, spec.members, measures)
    if len(hidden):
        results.take(hidden, head, rows, tokens, logits_budget(head, budget))
    return results.statistics(positions)
