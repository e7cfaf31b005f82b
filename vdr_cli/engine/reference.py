"""The starting weights, which the KL term and bonus.source novelty read.

A frozen copy, sharded like the policy, or the policy without its adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.gathered import GatheredModel
from vdr_cli.engine.partition import gather, gather_to_read, gather_to_write, sharded_loading
from vdr_cli.models.loading import load_for_training, resolve_dtype

WEIGHTS = "reference.safetensors"
"""In a checkpoint, once the reference is no longer the model that the run started from."""


def sharded_like(engine: Engine, load: Callable[[], nn.Module]) -> tuple[nn.Module, GatheredModel]:
    """A model that is never trained: each rank holds its shard (ZeRO-3) or all of it, and how it is shown whole.

    load: loads it, inside `sharded_loading`. Collective.
    """
    with sharded_loading(engine.ds_config):
        model = load()
    if engine.stage < 3:
        model.to(engine.device)
    model.requires_grad_(False)
    return model, GatheredModel(model, engine.device, gather_to_read(engine.ds_config))


class FrozenCopy:
    """The starting weights in memory of their own; each rank holds its shard (ZeRO-3) or all of them."""

    def __init__(self, config: Config, engine: Engine) -> None:
        dtype, gather_to = resolve_dtype(config.model.dtype), gather_to_write(engine.ds_config)
        self._engine = engine
        self._model, self._gathered = sharded_like(engine, lambda: load_for_training(config.model, dtype, gather_to))
        self._moved = False

    @contextmanager
    def whole(self, policy: nn.Module) -> Iterator[Any]:
        """The gathered reference model, as `Engine.gathered_model` describes. Collective.

        policy: not used, see Adapterless.
        """
        with self._engine.show(self._gathered) as model, torch.no_grad():
            yield model

    def synchronise(self) -> None:
        """Become the policy as it is now: every rank copies the shards it holds."""
        for own, theirs in zip(self._model.parameters(), self._engine.causal_lm.parameters(), strict=True):
            source, target = getattr(theirs, "ds_tensor", theirs), getattr(own, "ds_tensor", own)
            target.data.copy_(source.data)
        self._moved = True

    def save(self, folder: Path) -> None:
        """Write the weights to `folder` when they are no longer the starting ones. Collective; rank 0 writes.

        The policy of the last synchronisation may be in no checkpoint that still exists, so it is in this one. The
        file is whole: another number of processes can read it.
        """
        if not self._moved:
            return
        with self._engine.for_writing(self._gathered) as model:
            if collectives.is_main():
                save_file({name: p.contiguous() for name, p in model.named_parameters()}, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, if it wrote anything. Collective."""
        path = folder / WEIGHTS
        self._moved = collectives.broadcast_object(path.is_file())
        if not self._moved:
            return
        with safe_open(path, framework="pt") as file:
            for name, own in self._model.named_parameters():
                with self._written(own):
                    own.data.copy_(file.get_tensor(name))

    def _written(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        return gather([parameter], writer=0) if self._engine.stage == 3 else nullcontext()


class Adapterless:
    """The reference with LoRA: the policy itself with its adapters off."""

    @contextmanager
    def whole(self, policy: Any) -> Iterator[Any]:
        """The policy without its adapters. policy: the gathered model."""
        with policy.disable_adapter():
            yield policy


def build_reference(config: Config, engine: Engine) -> FrozenCopy | Adapterless | None:
    """The reference model that the KL or the bonus reads; None where neither does: nothing is loaded. Collective."""
    if not config.needs_reference:
        return None
    return Adapterless() if config.model.lora else FrozenCopy(config, engine)
