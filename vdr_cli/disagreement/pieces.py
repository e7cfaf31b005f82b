"""Pieces of a batch on their way through the model, depth-first or breadth-first.

Depth-first, a piece goes through all layers before the next one starts: the fewest states are held. Breadth-first, all
pieces go through a layer before the next layer is looked at: for models of which no full copy fits on a device. A layer
is then gathered once, whatever M and however many pieces memory asks for; a state of every token and member is held
meanwhile. For each layer the model's own forward runs, with the layers below it replaced by their output and those
above it left out, so masks and positions are the architecture's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import Members, ensemble, evaluating, first_layer
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.memory import is_out_of_memory, too_little_for_divided_rows, too_little_memory
from vdr_cli.disagreement.reading import Batch, Reading, passes_of
from vdr_cli.disagreement.results import Results
from vdr_cli.errors import ConfigError
from vdr_cli.models import anatomy
from vdr_cli.models.anatomy import WholeLayer
from vdr_cli.models.prefix import layers_stand_alone


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a request that begin their way together."""

    first_row: int
    """Index of the batch's first row in the request."""
    batch: Batch
    results: Results
    """The result that takes the part's measures."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a part as some members read them, between two layers."""

    part: Part
    reading: Reading
    together: int
    """Members at once, from where they differ."""
    positions: slice
    """The part's wanted positions that belong to the piece."""
    members: range | None = None
    """None below the layer in which members begin to differ."""
    hidden: Tensor | None = None
    """(m, N, D) after the final norm at those positions, at the end of the way."""

    @property
    def count(self) -> int:
        """Copies of each row."""
        return 1 if self.members is None else len(self.members)

    @property
    def size(self) -> int:
        """Rows that go through the model at once."""
        return self.count * len(self.reading.batch.completions)

    def through(self, layer: int) -> Piece:
        """The same piece above this layer."""
        with self._members(layer) as active:
            states = self.reading.through(layer, self.count, active)
        return replace(self, reading=replace(self.reading, states=states))

    def to_the_end(self) -> Piece:
        """The same piece with its hidden states, and without those on the way."""
        with self._members() as active:
            hidden = self.reading.wanted(self.count, active)
        return replace(self, reading=replace(self.reading, states=()), hidden=hidden)

    def _members(self, layer: int | None = None) -> AbstractContextManager[Members | None]:
        """Eval mode, with the members' masks in this layer, None: in all, once members differ."""
        reading = self.reading
        if self.members is None:
            return evaluating(reading.model)
        return ensemble(reading.model, reading.spec, reading.step, self.members, layer)

    def of_members(self) -> list[Piece]:
        """From where members differ: a piece for every `together` of them, which share the states from below."""
        everyone, size = range(self.reading.spec.members), self.together
        return [replace(self, members=everyone[at : at + size]) for at in range(0, len(everyone), size)]

    def halves(self) -> list[Piece]:
        """Half the members each; with one member half the rows. Raises MachineError for one row."""
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

    def _of_some(self, start: int, stop: int) -> Piece:
        """The same rows for the members at these indices of `members`."""
        assert self.members is not None
        states = []
        for each, own in zip(self.reading.states, self.reading.passes, strict=False):  # no states before layer 0
            rows = len(own.ids)
            is_shared = len(each.hidden) == rows
            states.append(each if is_shared else replace(each, hidden=each.hidden[start * rows : stop * rows]))
        return replace(self, reading=replace(self.reading, states=tuple(states)), members=self.members[start:stop])

    def _of_rows(self, start: int, stop: int) -> Piece:
        """Rows start to stop of the piece, whole groups or a part of one, for at most one member."""
        whole = self.reading.batch
        size = whole.group_size
        first, last = (int((whole.rows < row).sum()) for row in (start, stop))  # positions go with their rows, in order
        completions = whole.completions.rows(slice(start, stop))
        batch = Batch(
            completions,
            min(size, len(completions)),
            whole.rows[first:last] - start,
            whole.tokens[first:last],
            whole.one_a_row,
        )
        states = []
        for each in self.reading.states:
            a_row_each = len(each.hidden) == len(whole.completions)
            own = slice(start, stop) if a_row_each else slice(start // size, -(-stop // size))
            states.append(replace(each, hidden=each.hidden[own]))
        passes = passes_of(self.reading.model, batch)
        reading = replace(self.reading, batch=batch, passes=passes, states=tuple(states))
        at = self.positions.start
        return replace(self, reading=reading, positions=slice(at + first, at + last))


def joined(pieces: Sequence[Piece], members: int) -> Iterator[tuple[Part, Tensor]]:
    """Each part with its hidden states (M, N, D), from all its pieces, which lie next to each other."""
    for part, own in itertools.groupby(pieces, key=lambda piece: piece.part):
        found = [(piece, piece.hidden) for piece in own if piece.hidden is not None]
        if len(found) == 1:
            yield part, found[0][1]
            continue
        first = found[0][1]
        hidden = first.new_empty(members, len(part.batch.rows), first.shape[-1])
        for piece, states in found:
            assert piece.members is not None
            hidden[piece.members.start : piece.members.stop, piece.positions] = states
        yield part, hidden


@dataclass(frozen=True)
class Stage:
    """One stretch of the way: `work` on every piece, while the weights that it needs are there."""

    work: Callable[[Piece], Piece]
    weights: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes them whole; every rank enters it once, whatever its pieces and errors."""
    members_begin: bool = False
    """Members differ from here on: pieces are divided among them first."""


class Walk:
    """Takes pieces through the stages. A piece that runs out of memory is halved, by members and then by rows."""

    def __init__(self, stages: Sequence[Stage], breadth_first: bool) -> None:
        self.stages, self.breadth_first = stages, breadth_first
        self.may_halve = True
        """False: other ranks make the same forwards, so a piece that runs out of memory ends the run."""
        self.too_large: int | None = None
        """Smallest size that ran out of memory; pieces as large are halved before they are tried."""

    def run(self, pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
        """The pieces at the end of their way, those of one or more parts at a time.

        Breadth-first, all come together, and a rank that fails enters the remaining stages with the others before it
        raises. Raises MachineError when one member and one row do not fit in memory.
        """
        if self.breadth_first:
            yield self._finished(pieces)
            return
        for piece in pieces:
            yield self._finished(iter((piece,)))

    def _finished(self, start: Iterator[Piece]) -> list[Piece]:
        pieces: list[Piece] = []
        error: Exception | None = None
        for number, stage in enumerate(self.stages):
            with stage.weights():
                if error is not None:
                    continue
                try:
                    if number == 0:
                        pieces = list(start)
                    if stage.members_begin:
                        pieces = [each for piece in pieces for each in piece.of_members()]
                    pieces = self._worked(pieces, stage.work)
                except Exception as raised:  # the others wait for this rank in the next stage
                    error = raised
        if error is not None:
            raise error
        return pieces

    def _worked(self, pieces: list[Piece], work: Callable[[Piece], Piece]) -> list[Piece]:
        """work(piece) for each, in order. Empties the list, so that states are freed on the way."""
        pieces.reverse()
        done = []
        while pieces:
            piece = pieces.pop()
            if self.too_large is None or piece.size < self.too_large:
                try:
                    done.append(work(piece))
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if not self.may_halve:
                        raise too_little_for_divided_rows() from error
                self.too_large = piece.size
                if piece.reading.batch.rows.is_cuda:
                    torch.cuda.empty_cache()
            pieces.extend(piece.halves()[::-1])
        return done


def depth_first(model: nn.Module, spec: EnsembleSpec) -> Walk:
    """One part after another: the layers that all members share, then all the others. The model is whole."""
    first = first_layer(len(anatomy.decoder_layers(model)), spec)

    def below(piece: Piece) -> Piece:
        return piece if piece.reading.states else piece.through(first - 1)

    shared = [Stage(below)] if first else []
    return Walk([*shared, Stage(Piece.to_the_end, members_begin=True)], breadth_first=False)


def breadth_first(model: nn.Module, spec: EnsembleSpec, whole_layer: WholeLayer) -> Walk:
    """One layer after another, for all parts. whole_layer: makes a layer whole, a collective.

    Raises ConfigError for a model whose layers use each other's keys.
    """
    if not layers_stand_alone(model):
        raise ConfigError(
            f"engine.gather: layers of {type(anatomy.unwrapped(model)).__name__} use each other's keys, so "
            "they cannot be read one by one; set it to whole, or disagreement.mode to none"
        )
    count = len(anatomy.decoder_layers(model))
    first = first_layer(count, spec)
    layers = [
        Stage(partial(Piece.through, layer=layer), partial(whole_layer, layer), layer == first)
        for layer in range(count)
    ]
    return Walk([*layers, Stage(Piece.to_the_end)], breadth_first=True)
