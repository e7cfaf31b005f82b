"""The run's weights at a step: the start model's, or a checkpoint's; and the model that computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vdr_cli.audit import checkpoint, model
from vdr_cli.audit.checkpoint import Saved
from vdr_cli.audit.files import RunFiles

REFERENCE = "reference.safetensors"
"""In a checkpoint, once the reference is not the start model."""


class Models:
    """One float64 model that takes the weights of any step."""

    def __init__(self, run: RunFiles, dtype: str) -> None:
        """dtype: what the run computed in."""
        self.run, self.dtype = run, dtype
        self._saved: dict[int, Saved | None] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return model.load_tokenizer(self.run.config.model)

    @cached_property
    def policy(self) -> Any:
        """With the start weights, until `at` or `update.make` give it others."""
        config = self.run.config
        return model.load_start(config.model, self.dtype, config.train.seed)

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The start weights, as the optimizer holds them."""
        _ = self._fresh
        return {name: parameter.detach().clone() for name, parameter in model.trained(self.policy).items()}

    @cached_property
    def _fresh(self) -> bool:
        """The policy is loaded, and nobody has given it other weights."""
        return self.policy is not None

    def saved(self, step: int) -> Saved | None:
        """Weights and moments after this many steps, float64; None: no checkpoint lies there."""
        if step == 0:
            return Saved(dict(self.start))
        if step not in self._saved:
            path = self.run.checkpoint(step)
            found = None if path is None else checkpoint.read(path)
            self._saved = {step: found} | {s: v for s, v in self._saved.items() if s >= step - 1}
        return self._saved[step]

    def at(self, step: int) -> Any:
        """The policy after this many steps; None: its weights are not on file."""
        _ = self.start
        saved = self.saved(step)
        if saved is None:
            return None
        model.put(self.policy, saved.weights, self.dtype)
        return self.policy

    @contextmanager
    def reference(self, step: int) -> Iterator[Any]:
        """The reference model of this step; None: its weights are not on file."""
        config = self.run.config
        if config.model.lora is not None:
            with self.at(0).disable_adapter():
                yield self.policy
            return
        synced = last_sync(step, config.grpo.sync_reference_every, config.grpo.updates_per_rollout)
        found = self.at(synced)
        path = self.run.checkpoint(step)
        if found is None and path is not None and (path / REFERENCE).is_file():
            from safetensors.torch import load_file

            model.put(self.policy, load_file(path / REFERENCE), self.dtype)
            found = self.policy
        yield found


def last_sync(step: int, every: int | None, stride: int) -> int:
    """The step whose policy is the reference at `step`: rollouts take `stride` steps, and the reference follows the
    policy when a rollout ends on or beyond a multiple of `every`."""
    if not every:
        return 0
    ends = [end for end in range(stride, step + 1, stride) if end // every > (end - stride) // every]
    return ends[-1] if ends else 0


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, to be changed."""
    return {name: weight.to(torch.float64, copy=True) for name, weight in weights.items()}
