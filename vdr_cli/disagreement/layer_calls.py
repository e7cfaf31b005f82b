"""Running a part of a model: up to a layer, from a layer on, a block for one member, an MLP at one column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.lower_states import LowerStates, split_output


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Carries a layer's output out of a forward that need not go on."""

    def __init__(self, states: LowerStates) -> None:
        self.states = states


def run_up_to(layers: Sequence[nn.Module], number: int, forward: Callable[[], object]) -> LowerStates:
    """The output of layer `number` when `forward` runs; the layers above it do not run.

    Raises RuntimeError if the forward never reaches that layer.
    """

    def stop(module: nn.Module, arguments: object, output: Any) -> None:
        raise _Reached(LowerStates(*split_output(output), number + 1))

    with hooked(layers[number].register_forward_hook, stop):
        try:
            forward()
        except _Reached as reached:
            return reached.states
    raise RuntimeError(f"{type(layers[number]).__name__} {number} did not run: its model has another order of layers")


@contextmanager
def starting_from(layers: Sequence[nn.Module], states: LowerStates, rows: int) -> Iterator[None]:
    """Inside the block the layers below `states.layer` do nothing and pass on the states, repeated to `rows` rows.

    The model's own forward runs on, so masks, positions and whatever else it prepares fit the larger batch.
    """
    hidden = states.hidden.repeat(rows // len(states.hidden), 1, 1)
    output = hidden if states.extra_outputs is None else (hidden, *[None] * states.extra_outputs)
    below = layers[: states.layer]
    saved = [layer.__dict__.get("forward") for layer in below]
    try:
        for layer in below:
            layer.forward = lambda *arguments, **keywords: output
        yield
    finally:
        for layer, forward in zip(below, saved, strict=True):
            _restore_forward(layer, forward)


@contextmanager
def mlp_at_one_column(mlp: nn.Module, column: Tensor) -> Iterator[None]:
    """Inside the block an MLP reads one column of each row and returns 0 elsewhere. column: (R,) int64.

    For the last layer, when nobody needs its output at the other positions: the MLP treats each position alone.
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
def run_once_for_all_members(block: nn.Module, count: int) -> Iterator[None]:
    """Inside the block a module whose input is the same for each of `count` members runs for the first one only.

    Its keys and values in a cache are then one member's too; the cache joins them with one member's completions.
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
        _restore_forward(block, saved)


def _restore_forward(module: nn.Module, saved: Any) -> None:
    """saved: the forward set on the instance before; None: it had none of its own."""
    if saved is None:
        del module.forward
    else:
        module.forward = saved


def _first_rows(value: Any, rows: int, kept: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_first_rows(each, rows, kept) for each in value)
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows:
        return value[:kept]
    return value


def _repeated(branch: Tensor, count: int) -> Tensor:
    return branch.repeat(count, *[1] * (branch.ndim - 1))
