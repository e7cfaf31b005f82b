"""Entry point of the ensemble: measures of completions, however the members' hidden states are obtained.

`EnsembleReader` decides what is read again and what sampling has left, how much goes through the model at once, and in
which order. A caller asks for a measure and gets numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.information import Statistics
from vdr_cli.disagreement.lower_states import LowerStateCache, cache_for
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.memory import default_budget, divided
from vdr_cli.disagreement.pieces import Part, Piece, Walk, breadth_first, depth_first, joined
from vdr_cli.disagreement.reading import Batch, Reading, RowDivision, divided_pass, of_this_rank, passes_of
from vdr_cli.disagreement.results import Results
from vdr_cli.models import anatomy
from vdr_cli.models.anatomy import WholeLayer
from vdr_cli.samples import Completions, last_tokens, to_device

WholeLayers = Callable[[], AbstractContextManager[WholeLayer]]
"""Opens a model whose layers are whole one at a time, for one walk through them in order. Collective."""


@dataclass(frozen=True)
class MeasureRequest:
    """Completions, and what to measure of them."""

    completions: Completions  # B rows, whole groups
    group_size: int
    step: int = 0
    """Selects the members' masks, together with the ensemble's seed."""
    positions: Literal["all", "last"] = "all"
    """Every token of the policy, giving (B, T), or each row's last one, giving (B,)."""
    measures: Collection[str] = ("bald",)
    """Names of `information.Statistics`."""
    last_n: int | None = None
    """Only the policy's last n tokens of a row; the others stay 0. None: all."""
    shown_rows: int = 0
    """First rows that are measured at every token as well, for people to look at (`EnsembleReader.shown`)."""
    budget: int | None = None
    """Bytes of activations and logits at once; None: from the device's memory."""

    def wanted(self) -> Tensor:
        """(B, T) bool, the tokens that are measured."""
        return last_tokens(self.completions.policy_mask, 1 if self.positions == "last" else self.last_n)


class EnsembleReader:
    """Reads completions with every member and compares their predictions.

    Neither budget, padding, order, nor what sampling has left changes a number by more than rounding.
    """

    def __init__(
        self, spec: EnsembleSpec, whole_layers: WholeLayers | None = None, division: RowDivision | None = None
    ) -> None:
        """whole_layers: for a model whose layers are whole one at a time; None: it is whole.

        division: the ranks that read all their rows together, for masks that members share over positions; None: this
        rank reads its own alone.
        """
        self.spec, self.whole_layers, self.division = spec, whole_layers, division
        self.shown: Statistics | None = None
        """Measures (b, T) at every token of the newest request's first rows: of all where every token was asked for."""
        self._cache: LowerStateCache | None = None

    @contextmanager
    def watching(self, model: nn.Module, tokens: int) -> Iterator[LowerStateCache | None]:
        """Inside the block `model` samples at most `tokens` tokens, prompts and padding included.

        Yields the watcher to sample with, whose `completions` must be set before they are measured: layers that
        sampling has run are then not run again. None where nothing could be kept.
        """
        cache = None if self.whole_layers or self.division else cache_for(model, self.spec, tokens)
        if cache is None:
            yield None
            return
        with cache.watching():
            yield cache
        if cache.has_states:
            self._cache = cache

    @torch.no_grad()
    def measure(self, model: nn.Module, request: MeasureRequest) -> Statistics:
        """Measures in nats, float32 on the model's device: (B, T), or (B,) with positions "last".

        With `whole_layers` a collective: every rank goes through all layers once, whatever its rows and errors. With
        `division` one in its group, which an error on one rank breaks.
        Raises MachineError when one member and one completion do not fit in memory, ConfigError for settings that the
        model does not allow, ValueError for completions that are not whole groups of one prompt each.
        """
        cache, self._cache = self._cache, None
        if cache is not None and cache.completions is not request.completions:
            cache = None
        device = anatomy.output_head(model).weight.device
        request = replace(request, completions=to_device(request.completions, device))
        requests = [request]
        if request.shown_rows and request.positions == "last":
            first = request.completions.rows(slice(0, request.shown_rows))
            requests.append(replace(request, completions=first, positions="all"))
        found = self._read(model, requests, cache) if self.division is None else self._read_together(model, requests)
        self.shown = found[-1] if requests[-1].positions == "all" else None
        return found[0]

    def _read_together(self, model: nn.Module, requests: Sequence[MeasureRequest]) -> list[Statistics]:
        """The requests of the whole group, of which every rank reads its part of each row. Collective in the group."""
        assert self.division is not None
        division, device = self.division, requests[0].completions.prompt_ids.device
        on_cpu = [replace(each, completions=to_device(each.completions, torch.device("cpu"))) for each in requests]
        everybody = [each for own in division.gather_objects(on_cpu) for each in own]
        everybody = [replace(each, completions=to_device(each.completions, device)) for each in everybody]
        first = everybody[0]
        own = first.budget or default_budget(model, first.completions, first.group_size)
        prompt, width = first.completions.prompt_ids.shape[1], first.completions.completion_ids.shape[1]
        budget = min(division.gather_objects(own)) * width // (prompt + width)  # each row is read with its prompt
        with division.attention_of(model):
            found = self._read(model, [replace(each, budget=max(budget, 1)) for each in everybody], None)
        totals = [
            Statistics(**{name: division.sum(each.get(name)) for name in sorted(request.measures)})
            for each, request in zip(found, everybody, strict=True)
        ]
        return totals[division.rank * len(requests) :][: len(requests)]

    def _read(
        self, model: nn.Module, requests: Sequence[MeasureRequest], cache: LowerStateCache | None
    ) -> list[Statistics]:
        """One walk for all requests: a rank that fails in one of them still gathers with the others."""
        members, head = self.spec.members, anatomy.output_head(model)
        first = requests[0]
        budget = first.budget or default_budget(model, first.completions, first.group_size)
        results = [Results(each.completions, members, frozenset(each.measures), head, budget) for each in requests]
        pieces = (
            piece
            for request, own in zip(requests, results, strict=True)
            for piece in self._pieces(model, request, own, budget, cache)
        )
        with self._walk(model) as walk:
            for finished in walk.run(pieces):
                for part, hidden in joined(finished, members):
                    if not len(part.batch.rows):  # other ranks have read the positions that are wanted
                        continue
                    part.results.take(hidden, part.first_row + part.batch.rows, part.batch.tokens)
        return [own.statistics(each.positions == "last") for each, own in zip(requests, results, strict=True)]

    @contextmanager
    def _walk(self, model: nn.Module) -> Iterator[Walk]:
        with nullcontext() if self.whole_layers is None else self.whole_layers() as whole_layer:
            walk = (
                depth_first(model, self.spec) if whole_layer is None else breadth_first(model, self.spec, whole_layer)
            )
            walk.may_halve = self.division is None
            yield walk

    def _pieces(
        self, model: nn.Module, request: MeasureRequest, results: Results, budget: int, cache: LowerStateCache | None
    ) -> Iterator[Piece]:
        """The rank's rows, as many at once as the budget allows."""
        check_groups(request.completions, request.group_size)
        wanted, size = request.wanted(), request.group_size
        for rows, together in divided(model, request.completions, size, self.spec.members, budget):
            own = request.completions.rows(rows).trimmed()
            row, token = wanted[rows].nonzero(as_tuple=True)
            if not len(row):
                continue
            batch = Batch(own, min(size, len(own)), row, token, request.positions == "last")
            states = cache.states_of(rows, own, size) if cache is not None else ()
            if self.division is None:
                passes = passes_of(model, batch)
            else:
                passes = (divided_pass(batch, self.division),)
                batch = of_this_rank(batch, passes[0])
            reading = Reading(model, self.spec, request.step, batch, passes, states)
            yield Piece(Part(rows.start, batch, results), reading, together, slice(0, len(batch.rows)))


def check_groups(completions: Completions, group_size: int) -> None:
    """ValueError unless the rows are groups of `group_size` next to each other, of one prompt each."""
    if len(completions) % group_size:
        raise ValueError(f"{len(completions)} completions are not whole groups of {group_size}")
    prompts = torch.where(completions.prompt_mask.bool(), completions.prompt_ids, -1)
    groups = prompts.view(-1, group_size, prompts.shape[1])
    if not bool((groups == groups[:, :1]).all()):
        raise ValueError("the completions of a group must share their prompt: groups are contiguous rows")
