"""The reference model of the KL term, sharded like the policy under ZeRO-3 and never trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vdr_cli.config import Config
from vdr_cli.engine.build import Engine, gather, sharded_loading
from vdr_cli.engine.twin import Twin
from vdr_cli.models.loading import load_for_training, resolve_dtype


class FrozenCopy:
    """The starting weights in memory of their own; each rank holds its shard (ZeRO-3) or all of them."""

    def __init__(self, config: Config, engine: Engine) -> None:
        with sharded_loading(engine.ds_config):
            model = load_for_training(config.model, resolve_dtype(config.model.dtype))
        if engine.stage < 3:
            model.to(engine.device)
        self._model = model.requires_grad_(False)
        self._engine = engine
        self._twin = Twin(model, engine.device)

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[Any]:
        """The full reference model. Collective on entry under ZeRO-3. policy: not used, see Adapterless."""
        with self._twin.borrowed(gather if self._engine.stage == 3 else None) as model, torch.no_grad():
            yield model

    def synchronise(self) -> None:
        """Become the policy as it is now. Collective: every rank copies the shards it holds."""
        for own, theirs in zip(self._model.parameters(), self._engine.causal_lm.parameters(), strict=True):
            source, target = getattr(theirs, "ds_tensor", theirs), getattr(own, "ds_tensor", own)
            target.data.copy_(source.data)


class Adapterless:
    """With LoRA: the policy itself with its adapters off."""

    @contextmanager
    def whole(self, policy: Any) -> Iterator[Any]:
        """policy: the twin, already whole."""
        with policy.disable_adapter():
            yield policy


def build_reference(config: Config, engine: Engine) -> FrozenCopy | Adapterless | None:
    """None with beta 0: nothing is loaded."""
    if config.grpo.beta == 0.0:
        return None
    return Adapterless() if config.model.lora else FrozenCopy(config, engine)
