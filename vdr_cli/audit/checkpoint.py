"""Weights and AdamW's moments out of a run's checkpoint, with torch alone.

DeepSpeed's files are read without DeepSpeed: `*_model_states.pt` says which parameters there are and in which order,
`*_optim_states.pt` holds each rank's flat float32 share of the weights and moments. Nothing in them is executed: names
that are neither torch's nor plain containers become inert stand-ins.
"""

from __future__ import annotations

import collections
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vdr_cli.errors import DataError

PREFIX = "causal_lm."
"""Prefix of every parameter's name in a checkpoint: the engine wraps the model once more."""

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """The trained parameters in a checkpoint, by name: float32 weights and moments."""

    weights: Named
    first: Named = field(default_factory=dict)
    second: Named = field(default_factory=dict)
    count: int = 0
    """Updates that the optimizer has made."""


class _Inert:
    """Stands in for an object of a class that is not needed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Finds torch's tensors, plain containers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch") and not module.startswith(("torch.hub", "torch.utils.cpp_extension")):
            return super().find_class(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return _Inert


def read(path: Path) -> Saved:
    """The checkpoint's weights and moments. DataError when its files are missing or of another form."""
    folder = path / "engine"
    try:
        models = [_load(file) for file in sorted(folder.glob("*model_states.pt"))]
        optimizers = [_load(file) for file in sorted(folder.glob("*optim_states.pt"))]
        return _joined(models, optimizers)
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: weights cannot be read from this checkpoint ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _load(file: Path) -> dict[str, Any]:
    module = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")
    return dict(torch.load(file, map_location="cpu", weights_only=False, pickle_module=module))


def _joined(models: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> Saved:
    shapes = models[0]["param_shapes"]
    if not optimizers:
        return _plain(models[0])
    states = [each["optimizer_state_dict"] for each in optimizers]
    if "fp32_flat_groups" in states[0]:
        inner = [state["optimizer_state_dict"]["state"] for state in states]
        flat = [state["fp32_flat_groups"] for state in states]
        cut = _sharded
    else:
        inner = [state["base_optimizer_state"]["state"] for state in states]
        flat = [state["single_partition_of_fp32_groups"] for state in states]
        cut = _partitioned
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]

    def moment(name: str) -> Named:
        if any(name not in entry for state in inner for entry in state.values()):
            return {}  # Muon's: one mean, by another name
        return cut(shapes, [[state[group][name] for group in sorted(state)] for state in inner], paddings)

    return Saved(
        cut(shapes, flat, paddings),
        moment("exp_avg"),
        moment("exp_avg_sq"),
        max(int(entry.get("step", 0)) for entry in inner[0].values()),
    )


def _sharded(shapes: Sequence[Mapping[str, Any]], ranks: list[list[Tensor]], paddings: Any) -> Named:
    """ZeRO-3: every rank holds its share of every parameter, one after the other, the last rank's padded."""
    whole = [torch.cat([group.flatten() for group in groups]) for groups in ranks]
    found: Named = {}
    offset = 0
    for name, shape in (entry for group in shapes for entry in group.items()):
        size, share = math.prod(shape), -(-math.prod(shape) // len(ranks))
        parts = torch.cat([rank[offset : offset + share] for rank in whole])
        found[name.removeprefix(PREFIX)] = parts[:size].view(tuple(shape))
        offset += share
    return found


def _partitioned(shapes: Sequence[Mapping[str, Any]], ranks: list[list[Tensor]], paddings: Any) -> Named:
    """ZeRO-1 and 2: all parameters of a group one after the other, cut into equal shares."""
    found: Named = {}
    for number, group in enumerate(shapes):
        whole = torch.cat([groups[number].flatten() for groups in ranks])
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[number], strict=True):
            size = math.prod(shape)
            found[name.removeprefix(PREFIX)] = whole[offset : offset + size].view(tuple(shape))
            offset += size + padding
    return found


def _plain(model: dict[str, Any]) -> Saved:
    """ZeRO-0: the model's own state, and torch's optimizer state by the parameters' order."""
    state = model["optimizer"]["state"]
    names = [name for group in model["param_shapes"] for name in group]
    entries = {name.removeprefix(PREFIX): state[index] for index, name in enumerate(names)}
    return Saved(
        {name.removeprefix(PREFIX): model["module"][name].float() for name in names},
        {name: entry["exp_avg"] for name, entry in entries.items()},
        {name: entry["exp_avg_sq"] for name, entry in entries.items()},
        int(state[0]["step"]),
    )
