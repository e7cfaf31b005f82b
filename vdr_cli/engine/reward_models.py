"""The weights of reward models during a run: where they lie, and how they become whole while completions are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import psutil
import torch
from torch import nn

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.reference import sharded_like
from vdr_cli.models.loading import resolve_dtype
from vdr_cli.models.placement import placement
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.model import RewardModel, reward_models


class HeldRewardModels:
    """The reward models of a run. Between two `ready` blocks large ones take little of the devices' memory."""

    def __init__(self, rewards: Sequence[LoadedReward], config: Config, engine: Engine) -> None:
        """Loads the weights. Collective."""
        self._ready = [_held(each, config, engine) for each in reward_models(rewards)]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the block the models can be asked. Collective."""
        with ExitStack() as stack:
            for model in self._ready:
                stack.enter_context(model())
            yield


def _held(model: RewardModel, config: Config, engine: Engine) -> Any:
    """A function that opens a block in which the model is whole on the rank's device."""
    width = torch.empty(0, dtype=resolve_dtype("auto")).element_size()
    is_sharded = engine.stage == 3 and collectives.world_size() > 1 and not engine.by_layers
    memory = _memory(engine.device)
    where = placement(model.num_parameters * width, memory, is_sharded, engine.device.type == "cpu")
    if where == "sharded":
        _, gathered = sharded_like(engine, lambda: model.load(None))

        def whole() -> AbstractContextManager[Any]:
            return _gathered(model, gathered)

        return whole
    weights = model.load(engine.device if where == "device" else "cpu")
    return lambda: _on_device(model, weights, engine.device)


@contextmanager
def _gathered(model: RewardModel, gathered: Any) -> Iterator[None]:
    with gathered.whole_model() as weights, model.reading_with(weights):
        yield


@contextmanager
def _on_device(model: RewardModel, weights: nn.Module, device: torch.device) -> Iterator[None]:
    """The weights on the device; back where they were afterwards."""
    home = next(weights.parameters()).device
    weights.to(device)
    try:
        with model.reading_with(weights):
            yield
    finally:
        weights.to(home)


def _memory(device: torch.device) -> int:
    """Bytes of the device, or this rank's share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total // collectives.world_size())
